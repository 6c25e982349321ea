"""Adapters: what may be inserted into a base, by name for files."""

from weft.core.adapter import Insertion

from .block_policy import BlockPolicy, KeptOutput
from .channel_affine import ChannelAffine
from .instance_gate import InstanceGate
from .low_rank import LowRank

INSERTIONS: dict[str, type[Insertion]] = {
    "channel_affine": ChannelAffine,
    "block_policy": BlockPolicy,
    "kept_output": KeptOutput,
    "instance_gate": InstanceGate,
    "low_rank": LowRank,
}

__all__ = [
    "INSERTIONS",
    "BlockPolicy",
    "ChannelAffine",
    "Insertion",
    "InstanceGate",
    "KeptOutput",
    "LowRank",
]
