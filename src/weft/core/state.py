"""Where a model keeps tensors: flat tables with readable keys inside an ordinary module tree."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import PlanError, TaskError

from .masks import head_buffers
from .patch import Patch
from .sharing import Sharing
from .sites import named_tensors
from .task import Task


@lru_cache(maxsize=1 << 16)
def escape(key: str) -> str:
    """A key as one part of a state-dict name: dots become slashes, reversibly.

    ``~`` becomes ``~0``, ``/`` becomes ``~1``, then ``.`` becomes ``/``.
    """
    return key.replace("~", "~0").replace("/", "~1").replace(".", "/")


@lru_cache(maxsize=1 << 16)
def unescape(part: str) -> str:
    """The inverse of `escape`."""
    return part.replace("/", ".").replace("~1", "/").replace("~0", "~")


class TensorTable(nn.Module, MutableMapping[str, Tensor]):
    """Tensors by key; a parameter trains, a plain tensor is a buffer."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        for key, tensor in (tensors or {}).items():
            self[key] = tensor

    def __getitem__(self, key: str) -> Tensor:
        part = escape(key)
        tensor: Tensor | None = self._parameters.get(part)
        if tensor is None:
            tensor = self._buffers.get(part)
        if tensor is None:
            raise KeyError(key)
        return tensor

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        # Written to the tables directly: a key may be any tensor's name, "forward" included.
        part = escape(key)
        self._parameters.pop(part, None)
        self._buffers.pop(part, None)
        if isinstance(tensor, nn.Parameter):
            self._parameters[part] = tensor
        else:
            self._buffers[part] = tensor

    def __delitem__(self, key: str) -> None:
        self[key]
        self._parameters.pop(escape(key), None)
        self._buffers.pop(escape(key), None)

    def __iter__(self) -> Iterator[str]:
        yield from (unescape(part) for part in self._parameters)
        yield from (unescape(part) for part in self._buffers)

    def __len__(self) -> int:
        return len(self._parameters) + len(self._buffers)

    def __bool__(self) -> bool:
        return True

    def tensors(self) -> Iterator[Tensor]:
        """The tensors without their keys."""
        return chain(self._parameters.values(), self._buffers.values())  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Tensor]:
        """A plain dictionary of the tensors, made faster than by the mapping's own means."""
        tables = (self._parameters, self._buffers)
        return {unescape(p): t for table in tables for p, t in table.items() if t is not None}

    # A module is equal to itself only; the mapping's field-wise equality would compare tensors.
    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class TaskState(nn.Module):
    """Everything a model holds for one task.

    Args:
        task: head, loss and metric.
        sharing: the plan it was made by.
        patches: by base tensor name, what the task does with it now (the plan's patches until the
            task is hardened).
        own: the task's own tensors by key.
    """

    def __init__(
        self,
        task: Task,
        sharing: Sharing,
        patches: Mapping[str, Patch],
        own: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        # A head given as a module is copied, so that two models never share one; the description
        # keeps no second copy of it.
        self.task = task if not isinstance(task.head, nn.Module) else replace(task, head=None)
        self.sharing = sharing
        self.patches = dict(patches)
        self.own = TensorTable(own)
        self.head: nn.Module | None = None
        self.head_is_built = task.head is None
        self.scores: dict[str, float] = {}  # of gates that are final, by base tensor name
        self.facts: dict[str, Any] = {}  # plain values that travel with the task: metrics, history
        if isinstance(task.head, nn.Module):
            self.set_head(copy.deepcopy(task.head))

    def set_head(self, head: nn.Module | None) -> None:
        """Install the head; from now on it belongs to the model."""
        self.head = head
        for key, buffer in head_buffers(head, self.sharing.head_buffers).items():
            self.own.setdefault(key, buffer)
        self.head_is_built = True

    def build_head(self, features: Tensor, like: Tensor) -> None:
        """Build a head that is sized by the base's output, if the task has one not built yet.

        Args:
            features: (rows, ...) what the head will read; rows of one suffice.
            like: a tensor of the device and floating type that the head shall have.

        Raises:
            TaskError: the task's function returned something else than a module.
        """
        if self.head_is_built:
            return
        make = self.task.head
        assert make is not None
        with torch.inference_mode(False):  # a head first seen in inference must still train
            head = make(features.detach().clone())
            if not isinstance(head, nn.Module):
                raise TaskError(
                    "A task's head is a module, or a function from features to a module; the "
                    f"function returned {type(head).__name__}."
                )
            self.set_head(head.to(like).train(self.training))


class TaskTable(nn.Module, Mapping[str, TaskState]):
    """Task states by name, in the order in which the tasks were added."""

    def __getitem__(self, name: str) -> TaskState:
        state = self._modules[escape(name)]
        assert isinstance(state, TaskState)
        return state

    def __iter__(self) -> Iterator[str]:
        return (unescape(part) for part in self._modules)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and escape(name) in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def __bool__(self) -> bool:
        return True

    def add(self, name: str, state: TaskState) -> None:
        """Append a task."""
        self._modules[escape(name)] = state

    def remove(self, name: str) -> None:
        """Drop a task with all it owns."""
        del self._modules[escape(name)]

    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def private_copy(base: nn.Module, own_storage: frozenset[str]) -> nn.Module:
    """A copy of a module that shares its tensors' memory but not its tensor objects.

    Moving or loading the copy never touches the original; its parameters do not require gradients.

    Args:
        base: the user's module, left alone.
        own_storage: names of tensors to copy for real, because they will train.

    Raises:
        PlanError: the module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(base):
        value = tensor.detach()
        if name in own_storage or value.is_inference():
            value = value.clone()
        trains = name in own_storage and (value.is_floating_point() or value.is_complex())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=trains) if is_parameter else value
    try:
        with torch.no_grad():
            return copy.deepcopy(base, memo)
    except (RuntimeError, TypeError) as error:
        raise PlanError(
            f"The base, a {type(base).__name__}, cannot be copied: {error}. A base holds its "
            "tensors as parameters and buffers. Remove tensors that it keeps from an earlier "
            "forward, and old weight normalisation (torch.nn.utils.remove_weight_norm); "
            "torch.nn.utils.parametrizations.weight_norm works."
        ) from error


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one place and kind hold the same values; False across places."""
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return torch.equal(one, other)


def restore_ties(module: nn.Module, names: Mapping[str, str]) -> None:
    """Tie tensors again that loading with ``assign=True`` has put apart.

    Args:
        module: the module.
        names: every name of every tensor, with the first name of the same tensor.
    """
    for name, first in names.items():
        if name != first:
            tensor = _table(module, first)[first.rpartition(".")[2]]
            _table(module, name)[name.rpartition(".")[2]] = tensor


def _table(module: nn.Module, name: str) -> dict[str, Tensor | None]:
    holder = module.get_submodule(name.rpartition(".")[0])
    parameters: Any = holder._parameters
    buffers: dict[str, Tensor | None] = holder._buffers
    return parameters if name.rpartition(".")[2] in parameters else buffers
