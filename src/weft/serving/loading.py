"""From bundles to tasks in memory, each on the model of the shared state that it needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from weft.bank import Bank
from weft.bank.checking import well_formed
from weft.core.model import MultiTaskModel
from weft.core.sites import named_tensors
from weft.core.state import TaskState
from weft.core.task import Task
from weft.errors import BankError

from .halving import halve
from .residency import Resident

Output = str | int | Callable[[Any], Tensor] | None


@final
class TaskLoader:
    """Reads tasks of a bank, one at a time.

    Args:
        bank: the bank.
        base: the base.
        heads: as for `Bank.load`.
        custom_tasks: as for `Bank.load`.
        example: as for `Bank.load`.
        output: as for `Bank.load`.
        device: where tasks run; default where the base is.
    """

    def __init__(
        self,
        bank: Bank,
        base: nn.Module,
        *,
        heads: Mapping[str, nn.Module],
        custom_tasks: Mapping[str, Task],
        example: Any,
        output: Output,
        device: torch.device | str | None,
    ) -> None:
        self._bank, self._base = bank, base
        self._heads, self._custom = dict(heads), dict(custom_tasks)
        self._example, self._output = example, output
        there = next((t.device for _, t in named_tensors(base)), torch.device("cpu"))
        self.device = there if device is None else torch.device(device)
        self._models: dict[str | None, MultiTaskModel] = {}  # by shared state; they hold no tasks
        # By task, the stamp and the shared state of what was read last.
        self._shared: dict[str, tuple[tuple[int, ...], str | None]] = {}
        self._lock = threading.Lock()

    def read(self, task: str, *, half: bool) -> Resident:
        """A task from the bank.

        Args:
            task: its name.
            half: whether to hold its own tensors in half precision.

        Raises:
            BankError: it is gone or damaged, or changes while it is read.
        """
        # Tensors that are made in inference mode do not count their changes, which others rely on.
        with self._lock, torch.inference_mode(False):
            stamp = self._bank.stamp(task)
            with well_formed(task):
                shared = self._bank.info(task)["shared"]
                key = None if shared is None else str(shared["sha256"])
            model = self._models.get(key) or self._new_model(task)
            if task not in model.tasks:
                head, custom = self._heads.get(task), self._custom.get(task)
                self._bank.add_to(model, task, head=head, custom_task=custom)
            state = model.tasks[task]
            model.tasks.remove(task)
            if self._bank.stamp(task) != stamp:
                raise BankError(f"'{task}' was saved again while it was read. Ask for it again.")
            self._models[key] = model
            self._shared[task] = stamp, key
            self._release_models()
            if half:
                halve(state)
        return Resident(state, model, bytes_of(state), stamp)

    def refresh(self, listed: Container[str]) -> None:
        """Let go of shared states that tasks had which are gone or have been saved again.

        Args:
            listed: the tasks of the bank.
        """
        with self._lock:
            for task, (stamp, _) in list(self._shared.items()):
                if task not in listed or self._moved(task, stamp):
                    del self._shared[task]
            self._release_models()

    def _moved(self, task: str, stamp: tuple[int, ...]) -> bool:
        try:
            return self._bank.stamp(task) != stamp
        except BankError:
            return True

    def _release_models(self) -> None:
        """Drop the models of shared states that no task refers to; forwards under way have them."""
        used = {None, *(key for _, key in self._shared.values())}
        self._models = {key: model for key, model in self._models.items() if key in used}

    def _new_model(self, task: str) -> MultiTaskModel:
        model = self._bank.load(
            self._base,
            task,
            heads={n: h for n, h in self._heads.items() if n == task},
            custom_tasks={n: t for n, t in self._custom.items() if n == task},
            example=self._example,
            output=self._output,
        )
        return model.eval().to(self.device)


def bytes_of(state: TaskState) -> int:
    """Bytes of a task's own tensors and of its head."""
    heads = [] if state.head is None else [t for _, t in named_tensors(state.head)]
    tensors = [*state.own.to_dict().values(), *heads]
    return sum(t.numel() * t.element_size() for t in tensors)
