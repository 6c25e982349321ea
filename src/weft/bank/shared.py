"""Shared state on disk: the tensors that a model's plan trains or adds for all its tasks.

A file is named by the hash of its bytes and never changes; bundles name the one they depend on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from weft.core.model import MultiTaskModel
from weft.core.sites import named_tensors
from weft.errors import BankError

from . import tensors as files_of

BASE, CREATED = "base:", "created:"
"""Prefixes of keys: tensors of the base that the plan trains, and tensors that it adds."""


@dataclass(frozen=True)
class SharedState:
    """The tensors that tasks of one model share beside the frozen base.

    Args:
        hash: of the file's bytes, its name.
        data: the bytes.
    """

    hash: str
    data: bytes


class SharedCache:
    """Remembers which shared state a model holds, as long as its tensors stay what they are."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[MultiTaskModel, tuple[list[tuple[int, int]], str]]
        self._known = WeakKeyDictionary()

    def remember(self, model: MultiTaskModel, name: str) -> None:
        """Note the hash of the state that a model holds now."""
        self._known[model] = (_stamps(shared_tensors(model)), name)

    def hash(self, model: MultiTaskModel) -> str | None:
        """The hash of the model's shared state; None if its plan shares only the base."""
        tensors = shared_tensors(model)
        if not tensors:
            return None
        known = self._known.get(model)
        if known is None or known[0] != _stamps(tensors):
            state = shared_state(model)
            assert state is not None
            self.remember(model, state.hash)
            return state.hash
        return known[1]


def _stamps(tensors: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), t._version) for t in tensors.values()]


def shared_tensors(model: MultiTaskModel) -> dict[str, Tensor]:
    """The shared tensors of the model's own plan, by key of a file."""
    trained = model.sharing.train_shared
    base = {BASE + n: t for n, t in named_tensors(model.base) if n in trained}
    return {**base, **{CREATED + key: t for key, t in model.shared.items()}}


def shared_state(model: MultiTaskModel) -> SharedState | None:
    """The model's shared state as bytes; None if its plan shares only the base."""
    tensors = shared_tensors(model)
    if not tensors:
        return None
    data = files_of.to_bytes(tensors)
    return SharedState(hashlib.sha256(data).hexdigest(), data)


def created_part(tensors: Mapping[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    """The tensors that the plan added, by key, where the base is."""
    device = _device(base)
    created = {k.removeprefix(CREATED): t for k, t in tensors.items() if k.startswith(CREATED)}
    return {key: tensor.to(device) for key, tensor in created.items()}


def _device(base: nn.Module) -> torch.device:
    return next((t.device for _, t in named_tensors(base)), torch.device("cpu"))


def fill_shared(model: MultiTaskModel, stored: Mapping[str, Tensor]) -> None:
    """Give a new model the stored shared state.

    Raises:
        BankError: the model's plan shares other tensors.
    """
    mine = shared_tensors(model)
    expected = {k: files_of.describe(t) for k, t in stored.items()}
    found = {k: files_of.describe(t) for k, t in mine.items()}
    if found != expected:
        raise BankError(
            f"The plan '{model.sharing.method}' on this base shares other tensors than the tasks "
            f"were saved with: {files_of.first_difference(expected, found)}. Hand in the plan and "
            "the base that they were trained with, or no plan."
        )
    with torch.no_grad():
        for key, tensor in mine.items():
            if key.startswith(BASE):
                tensor.copy_(stored[key])
                continue
            value = stored[key].to(_device(model.base))
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            model.shared[key.removeprefix(CREATED)] = value
