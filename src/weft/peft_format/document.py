"""adapter_config.json: what it says, and what has no form here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.errors import BankError, PlanError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

KNOWN = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "bias", "peft_type", "init_lora_weights"),
}
"""What is read."""

NO_MATTER = {
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
}
"""What changes nothing about given tensors, or is said by their names."""

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
        turned: whether linear layers keep their weights as (in, out); tells nothing when read.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    turned: bool = False


def read_config(folder: Path) -> Described:
    """What a folder's configuration says.

    Raises:
        BankError: there is none, or it is damaged.
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
    except ValueError as error:
        raise BankError(f"{path} is no JSON: {error}. Save the adapter again.") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
        raise PlanError(f"{path} describes an adapter of the kind {kind!r}; LORA can be loaded.")
    _check_plain(found, path)
    try:
        for pattern in (*(found.get("rank_pattern") or ()), *(found.get("alpha_pattern") or ())):
            re.compile(pattern)
        return Described(
            r=int(found["r"]),
            alpha=float(found["lora_alpha"]),
            dropout=float(found.get("lora_dropout") or 0.0),
            rslora=bool(found.get("use_rslora")),
            rank_pattern={str(k): int(v) for k, v in (found.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (found.get("alpha_pattern") or {}).items()},
            modules_to_save=tuple(map(str, found.get("modules_to_save") or ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise BankError(f"{path} is damaged: {error!r}. Save the adapter again.") from error


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


def config_text(described: Described, targets: Iterable[str] | str, base: str | None) -> str:
    """The text of a configuration.

    Args:
        described: what it shall say.
        targets: names of the layers, or a regular expression for them.
        base: where PEFT's users find the base, if anywhere.
    """
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
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": None,
        "use_rslora": described.rslora,
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _whole(number: float) -> float:
    """PEFT writes whole numbers without a point."""
    return int(number) if float(number).is_integer() else number
