"""adapter_config.json: what it says, and what has no form here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.errors import BankError, PlanError
from weft.methods.lora import is_numerator, is_probability, is_rank

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

Names = tuple[str, ...] | str
"""Names of modules or what they end with, or a regular expression for whole names."""

NO_MATTER = {
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
    *("fan_in_fan_out", "inference_mode", "loftq_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "task_type"),
}
"""What changes nothing about given tensors."""

PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Starts that leave the base's weights alone."""


@dataclass(frozen=True)
class Described:
    """What a configuration says about the tensors beside it.

    Args:
        r: the rank, where no pattern says another.
        alpha: the numerator of the factor, likewise.
        dropout: of the branch's input.
        rslora: whether the factor is alpha / sqrt(r).
        rank_pattern: ranks by regular expressions for the end of names.
        alpha_pattern: numerators likewise.
        modules_to_save: names, or ends of names, of modules that are stored whole.
        target_modules: which modules have low rank, or None if that is not said.
        exclude_modules: which of them have not, nevertheless.
        layers_to_transform: numbers of layers, if only in those.
        layers_pattern: regular expressions for what such a number follows in a name.
        turned: whether linear layers keep their weights as (in, out); tells nothing when read.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    target_modules: Names | None = None
    exclude_modules: Names | None = None
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    turned: bool = False


def read_config(folder: Path) -> Described:
    """What a folder's configuration says.

    Raises:
        BankError: there is none, or it is damaged: it names the key, what was found and expected.
        PlanError: it asks for something that has no form here.
    """
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BankError(
            f"{path} cannot be read: {error.strerror or error}. A folder that PEFT's "
            f"save_pretrained wrote has {CONFIG} and {TENSORS}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise BankError(f"{path} is no JSON: {error}. Save the adapter again.") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
        raise PlanError(f"{path} describes an adapter of the kind {kind!r}; LORA can be loaded.")
    _check_plain(found, path)
    _check_forms(found, path)
    return Described(
        r=found["r"],
        alpha=float(found["lora_alpha"]),
        dropout=float(found.get("lora_dropout") or 0.0),
        rslora=bool(found.get("use_rslora")),
        rank_pattern=dict(found.get("rank_pattern") or {}),
        alpha_pattern={k: float(v) for k, v in (found.get("alpha_pattern") or {}).items()},
        modules_to_save=tuple(found.get("modules_to_save") or ()),
        target_modules=_names(found.get("target_modules")),
        exclude_modules=_names(found.get("exclude_modules")),
        layers_to_transform=_several(found.get("layers_to_transform")),
        layers_pattern=_several(found.get("layers_pattern")),
    )


def _names(value: str | list[str] | None) -> Names | None:
    return tuple(value) if isinstance(value, list) else value


def _several(value: Any) -> tuple[Any, ...]:
    """One value, a list of them or nothing, as a tuple."""
    if isinstance(value, list):
        return tuple(value)
    return () if value in (None, "") else (value,)


# --------------------------------------------------------------------------------- the checks


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_expression(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _is_part(value: Any) -> bool:
    """Whether something is an expression that others can stand around."""
    return isinstance(value, str) and _is_expression(f"x({value})")


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _by_expression(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(map(_is_part, value)) and all(map(fits, value.values()))
    )


def _any_of(*forms: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(fits(value) for fits in forms)


_CHOICE = (_any_of(_list_of(_is_name), _is_expression), "a list of names or a regular expression")

_FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (is_rank, "a whole number of 1 or more"),
    "lora_alpha": (is_numerator, "a number other than 0"),
    "lora_dropout": (is_probability, "a number in [0, 1)"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": (_by_expression(is_rank), "ranks by regular expressions"),
    "alpha_pattern": (
        _by_expression(is_numerator),
        "numbers other than 0 by regular expressions",
    ),
    "modules_to_save": (_list_of(_is_name), "a list of names"),
    "target_modules": _CHOICE,
    "exclude_modules": _CHOICE,
    "layers_to_transform": (
        _any_of(_is_number, _list_of(_is_number)),
        "a whole number, or a list of them",
    ),
    "layers_pattern": (
        _any_of(_is_part, _list_of(_is_part)),
        "a name, or a list of them",
    ),
}
"""By key, what a value must be. All but the first two may be null or missing."""

KNOWN = {*_FORMS, "bias", "peft_type", "init_lora_weights"}
"""What is read."""


def _check_forms(found: Mapping[str, Any], path: Path) -> None:
    for key, (fits, expected) in _FORMS.items():
        value = found.get(key)
        if not fits(value) and (value is not None or key in ("r", "lora_alpha")):
            shown = repr(value)[:100] if key in found else "missing"
            raise BankError(
                f"{path} is damaged: '{key}' is {shown}, expected {expected}. Correct it, or save "
                "the adapter again."
            )


def _check_plain(found: Mapping[str, Any], path: Path) -> None:
    start = found.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise PlanError(
            f"{path}: init_lora_weights={start!r} may have changed the weights of the base. Let "
            "PEFT convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    if found.get("bias") not in (None, "none"):
        raise PlanError(
            f"{path}: bias={found['bias']!r} trains biases of the base too, which a task of lora "
            "does not own. Only bias='none' can be loaded."
        )
    for key, value in found.items():
        if value and key not in KNOWN | NO_MATTER:
            raise PlanError(
                f"{path}: {key}={value!r} has no form here. What can be loaded is LoRA itself: r, "
                "lora_alpha, rank_pattern, alpha_pattern, use_rslora, lora_dropout and "
                "modules_to_save."
            )


def config_text(described: Described, base: str | None) -> str:
    """The text of a configuration.

    Args:
        described: what it shall say.
        base: where PEFT's users find the base, if anywhere.
    """
    target = described.target_modules
    content = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": described.turned,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _whole(described.alpha),
        "lora_dropout": described.dropout,
        "modules_to_save": list(described.modules_to_save) or None,
        "peft_type": "LORA",
        "r": described.r,
        "rank_pattern": dict(described.rank_pattern),
        "alpha_pattern": {k: _whole(v) for k, v in described.alpha_pattern.items()},
        "target_modules": list(target) if isinstance(target, tuple) else target,
        "task_type": None,
        "use_rslora": described.rslora,
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _whole(number: float) -> float:
    """PEFT writes whole numbers without a point."""
    return int(number) if float(number).is_integer() else number
