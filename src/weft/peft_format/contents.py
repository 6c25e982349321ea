"""What an adapter folder of PEFT holds, by the names of the model's base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from weft.core.sites import canonical_names
from weft.errors import BankError, PlanError, close_matches

from .document import TENSORS, Described, read_config
from .layers import FACTORS, PREFIX
from .rules import stored_by


@dataclass(frozen=True)
class Contents:
    """A folder that was read.

    Args:
        file: where the tensors were.
        described: what the configuration says.
        inside: what comes before the base's names in PEFT's base, with its dot, or "".
        left: entries of ``modules_to_save`` that are not wanted.
        tensors: by their names in the base, without those that are not wanted.
    """

    file: Path
    described: Described
    inside: str
    left: tuple[str, ...]
    tensors: dict[str, Tensor]

    def stored_by(self, name: str) -> str:
        """The entry of ``modules_to_save`` by which a tensor of the base is stored, or ""."""
        full = self.inside + name
        unwanted = stored_by(full, self.left)
        return "" if unwanted else stored_by(full, self.described.modules_to_save)


def leaving(entry: str) -> str:
    """A sentence to append to an error: how to leave out what an entry stored, if there is one."""
    return f" It was stored whole and can be left out: leave=[{entry!r}]." if entry else ""


def read_contents(folder: Path, prefix: str, leave: Sequence[str]) -> Contents:
    """Read a folder.

    Args:
        folder: with a configuration and a file of tensors.
        prefix: the name of the model's base inside of PEFT's, or "".
        leave: entries of ``modules_to_save`` that are not wanted.

    Raises:
        BankError: a file is missing or damaged.
        PlanError: it holds something that has no form here, or is outside of the base.
    """
    described = read_config(folder)
    left = _left(leave, described, folder)
    inside = f"{prefix}." if prefix else ""
    tensors = {}
    for name, tensor in sorted(_tensors(folder / TENSORS).items()):
        full = name.removeprefix(PREFIX)
        if stored_by(full, left):
            continue
        if not full.startswith(inside):
            advice = leaving(stored_by(full, described.modules_to_save))
            raise PlanError(
                f"The adapter holds '{full}', which is not inside of '{prefix}'."
                + (advice or " Correct prefix=, or make the model over a base that has it.")
            )
        tensors[full.removeprefix(inside)] = tensor
    return Contents(folder / TENSORS, described, inside, left, tensors)


def _left(leave: Sequence[str], described: Described, folder: Path) -> tuple[str, ...]:
    if isinstance(leave, str) or not isinstance(leave, Iterable):
        raise PlanError(f"leave=[...] is a list of modules, found {leave!r}.")
    known = described.modules_to_save
    left = tuple(leave)
    for module in left:
        if module not in known:
            raise PlanError(
                f"leave: '{module}' is not among modules_to_save of {folder}, which are "
                f"{list(known)}." + close_matches(str(module), known)
            )
    return left


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BankError(
            f"{path} cannot be read: {error.strerror or error}. PEFT writes it with "
            "save_pretrained(..., safe_serialization=True); pickled files are not loaded."
        ) from error
    try:
        found: dict[str, Tensor] = load(data)
    except (SafetensorError, KeyError) as error:  # a key is a type that torch does not have
        raise BankError(f"{path} is damaged: {error}. Save the adapter again.") from error
    return found


# ------------------------------------------------------------------ what the base has already


def without_copies(base: nn.Module, contents: Contents) -> dict[str, Tensor]:
    """The tensors without those that repeat the base's own.

    PEFT stores embeddings and output layers themselves beside their factors, and where a
    vocabulary was resized.

    Args:
        base: the base.
        contents: of the folder.

    Raises:
        PlanError: one of them is not the base's: the adapter is for another base.
    """
    whole = {n: t for n, t in contents.tensors.items() if not n.endswith(FACTORS)}
    known = canonical_names(base) if whole else {}
    kept = {n: t for n, t in contents.tensors.items() if n not in whole}
    for name, tensor in whole.items():
        mine = known.get(name) or known.get(name.replace(".base_layer.", "."))
        if mine is None or contents.stored_by(name):
            kept[name] = tensor
        else:
            _check_copy(name, tensor, _tensor(base, mine))
    return kept


def _tensor(base: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    holder = base.get_submodule(module)
    found = holder._parameters.get(attribute)
    return holder._buffers[attribute] if found is None else found  # type: ignore[return-value]


def _check_copy(name: str, tensor: Tensor, base: Tensor) -> None:
    base = base.detach().to(tensor.device)
    if tensor.shape != base.shape:
        how = f"has the shape {tuple(tensor.shape)}, the base's is {tuple(base.shape)}"
    elif torch.equal(base.to(tensor.dtype), tensor) or torch.equal(tensor.to(base.dtype), base):
        return
    else:
        gap = float((tensor.float() - base.float()).abs().max())
        how = f"differs from the base's by up to {gap:.3g}"
    whole = "" if ".base_layer." in name else ", or list its module in modules_to_save"
    raise PlanError(
        f"The adapter holds '{name}', a tensor of its base, which {how}. Its base was trained or "
        f"its vocabulary resized: make the model over that base{whole}."
    )
