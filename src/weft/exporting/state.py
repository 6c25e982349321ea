"""Tensors alone: a state dict in a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor

from weft.errors import ExportError

from .network import Network


def state_dict(network: Network, *, head: bool) -> dict[str, Tensor]:
    """The tensors of a plain network by name; tied ones under each of their names.

    Args:
        network: the network.
        head: whether names start with ``base.`` and ``head.``, or are the base's own.

    Returns:
        Tensors of which no two share memory.

    Raises:
        ExportError: a module keeps something else than tensors in its state.
    """
    state = (network if head else network.base).state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ExportError(
                f"'{name}' of the state dict is a {type(value).__name__}; safetensors holds "
                "tensors. Keep it outside the module's state, or export with format='torch'."
            )
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }


def state_bytes(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """A safetensors file.

    Args:
        tensors: by name.
        about: what it says about itself.
    """
    content: bytes = save(dict(tensors), metadata={"format": "pt", **about})
    return content


def check_state(data: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Read a file's bytes and compare them bit for bit.

    Raises:
        ExportError: they do not hold the tensors.
    """
    found = load(data)
    same = found.keys() == tensors.keys() and all(
        torch.equal(_bits(found[name]), _bits(tensor)) for name, tensor in tensors.items()
    )
    if not same:
        raise ExportError(
            "What safetensors reads is not what was to be stored. Nothing was written."
        )


def _bits(tensor: Tensor) -> Tensor:
    # Not a number is not equal to itself.
    return tensor.reshape(-1).view(torch.uint8)
