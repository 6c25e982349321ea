"""The methods by name, each with the laws that it is excepted from and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import nn

from . import citations
from .citations import Citation
from .core.sharing import Sharing
from .errors import ConfigError, close_matches
from .methods.adashare import adashare
from .methods.baselines import bias_only, full_finetune, linear_probe
from .methods.bora import bora
from .methods.disparse import disparse
from .methods.dynashare import dynashare
from .methods.hard_sharing import hard_sharing
from .methods.lora import lora
from .methods.model_patches import depthwise_patch, scale_bias
from .methods.paco import paco
from .methods.rcm import rcm
from .methods.taps import taps


class Law(IntEnum):
    """What holds for every method unless its registration says otherwise."""

    FRESH_IS_BASE = 1
    TASKS_ARE_ISOLATED = 2
    ALL_PATHS_AGREE = 3
    GRADIENTS_REACH_THE_TRAINABLE = 4
    TIES_AND_STATISTICS_HOLD = 5
    LEDGER_IS_EXACT = 6
    THREADS_AND_GRAPHS_AGREE = 7
    FILES_ARE_EXACT = 8
    LAYERS_ARE_RIGHT_OR_REFUSED = 9
    PROCESSES_AGREE = 10


@dataclass(frozen=True)
class Method:
    """A registered method.

    Args:
        plan: the function that makes its plan.
        summary: one line for lists.
        exceptions: laws that do not hold, with the reason.
        citation: the paper that it is from, if there is one.
    """

    plan: Callable[..., Sharing]
    summary: str
    exceptions: Mapping[Law, str] = field(default_factory=dict)
    citation: Citation | None = None


METHODS: dict[str, Method] = {
    "linear_probe": Method(linear_probe, "a head on the frozen base"),
    "bias_only": Method(bias_only, "own biases (BitFit)", citation=citations.BITFIT),
    "scale_bias": Method(
        scale_bias,
        "own scales and shifts (K for the Price of 1)",
        citation=citations.MODEL_PATCHES,
    ),
    "depthwise_patch": Method(
        depthwise_patch,
        "own depthwise kernels (K for the Price of 1)",
        citation=citations.MODEL_PATCHES,
    ),
    "taps": Method(
        taps, "own the layers that pay, by a learned gate each (TAPS)", citation=citations.TAPS
    ),
    "lora": Method(
        lora, "own low-rank additions to the weights of layers (LoRA)", citation=citations.LORA
    ),
    "bora": Method(
        bora,
        "LoRA for each task, tied to a mean that is learned with them (BoRA)",
        {Law.TASKS_ARE_ISOLATED: "the mean trains with every task, and pulls at all of them"},
        citations.BORA,
    ),
    "rcm": Method(
        rcm,
        "own a modulator of each layer's outputs over a frozen filter bank (RCM)",
        citation=citations.RCM,
    ),
    "hard_sharing": Method(
        hard_sharing,
        "own the bottom or the top, train the rest together",
        {Law.TASKS_ARE_ISOLATED: "the common part trains with every task"},
        citations.HARD_SHARING,
    ),
    "adashare": Method(
        adashare,
        "execute or skip each residual block of one network (AdaShare)",
        {
            Law.TASKS_ARE_ISOLATED: "the network trains with every task",
            Law.PROCESSES_AGREE: "each process draws samples of its own while policies are learned",
        },
        citations.ADASHARE,
    ),
    "dynashare": Method(
        dynashare,
        "AdaShare with gates that skip blocks for single inputs (DynaShare)",
        {
            Law.TASKS_ARE_ISOLATED: "the network and its gates train with every task",
            Law.ALL_PATHS_AGREE: "a gate that decides for each input has no plain form to fold to",
            Law.PROCESSES_AGREE: "each process draws samples of its own, of policies and of gates",
        },
        citations.DYNASHARE,
    ),
    "disparse": Method(
        disparse,
        "train one sparse network; a weight goes if every task lets it go (DiSparse)",
        {
            Law.TASKS_ARE_ISOLATED: "the network trains with every task, and its masks are of all",
            Law.PROCESSES_AGREE: "masks that change in training grow by the first process's rows",
        },
        citations.DISPARSE,
    ),
    "paco": Method(
        paco,
        "own a few numbers that mix shared sets of parameters (PaCo)",
        {
            Law.FRESH_IS_BASE: "a weighted sum of equal bases is the base's up to rounding",
            Law.TASKS_ARE_ISOLATED: "the bases train with every task",
            Law.PROCESSES_AGREE: "a limit on losses is for each process's own rows",
        },
        citations.PACO,
    ),
    "full_finetune": Method(full_finetune, "own everything"),
}


def method(name: str, base: nn.Module, **options: Any) -> Sharing:
    """The plan of a method by name.

    Args:
        name: one of ``weft methods``.
        base: the base network.
        options: the method's own options.

    Raises:
        ConfigError: an unknown method or option, with close matches.
    """
    if name not in METHODS:
        raise ConfigError(
            f"There is no method '{name}'. Methods: {', '.join(METHODS)}."
            + close_matches(name, METHODS)
        )
    known = options_of(name)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"'{name}' has no option '{option}'. Options: {', '.join(known) or 'none'}."
                + close_matches(option, known)
            )
    try:
        return METHODS[name].plan(base, **options)
    except TypeError as error:
        given = ", ".join(f"{k}={v!r}" for k, v in options.items())
        raise ConfigError(f"'{name}' cannot be used with {given}: {error}.") from error


def options_of(name: str) -> dict[str, Any]:
    """The options of a registered method with their defaults."""
    parameters = list(inspect.signature(METHODS[name].plan).parameters.values())[1:]
    return {p.name: p.default for p in parameters}
