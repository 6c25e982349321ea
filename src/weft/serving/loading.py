"""From bundles to tasks in memory, each on the model of the shared state that it needs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from weft.bank import Bank
from weft.bank.checking import well_formed
from weft.core.model import MultiTaskModel
from weft.core.sites import named_tensors
from weft.core.state import TaskState
from weft.core.subset import subset
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
            if half:
                halve(state)
        return Resident(state, key, bytes_of(state), stamp)

    def model(self, residents: Mapping[str, Resident]) -> MultiTaskModel:
        """A model with these tasks, which have one shared state."""
        shared = next((r.shared for r in residents.values()), None)
        states = {name: resident.state for name, resident in residents.items()}
        return subset(self._models[shared], states)

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
