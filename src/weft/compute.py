"""What a forward costs in multiply-adds, and how much of it tasks have in common.

The second cost of sharing beside bytes: when one input needs the outputs of all tasks, what
depends on no own tensor needs computing once. Private tops share their trunk; private bottoms share
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from weft.core.model import MultiTaskModel
from weft.core.sites import named_tensors
from weft.training.evaluation import modes_kept


@dataclass(frozen=True)
class Compute:
    """Multiply-adds of the forwards of one batch, heads included.

    Args:
        common: what depends on no tensor that any task owns, the same for all tasks.
        own: by task, the rest of its forward.
    """

    common: int
    own: Mapping[str, int]

    def of(self, task: str) -> int:
        """One task's forward."""
        return self.common + self.own[task]

    @property
    def all_tasks(self) -> int:
        """All tasks' outputs of one input, the common part computed once."""
        return self.common + sum(self.own.values())


def multiply_adds(model: MultiTaskModel, x: Any, *, tasks: Sequence[str] | None = None) -> Compute:
    """Count the multiply-adds of tasks' forwards, and what of them is common to all of them.

    Matrix products, convolutions and attention count, as in torch's own counter; normalisation,
    activations, and recurrent layers that run as one fused kernel do not.

    Args:
        model: the model; it runs in eval mode and is left as it was.
        x: a batch for the base: a tensor, or a tuple or dict of tensors; one row gives the cost of
            one input.
        tasks: which; default all.

    Returns:
        The counts.

    Raises:
        TaskError: no such task.
    """
    chosen = model.task_names if tasks is None else tuple(tasks)
    # The registry knows neither the fused attention of CPUs nor the fused encoder layers, which
    # PyTorch leaves aside where an input requires a gradient.
    x = pytree.tree_map_only(Tensor, _differentiable, x)
    counters: dict[str, _Counter] = {}
    with modes_kept(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()
        names = _owned_by_any(model, chosen)
        for task in chosen:
            tensors = model.tensors(task)
            own = [*model.tasks[task].parameters(), *model.tasks[task].buffers()]
            counters[task] = _Counter([*own, *(tensors[n] for n in names)])
            with counters[task]:
                model(x, task=task)
    common = min((c.total - c.own for c in counters.values()), default=0)
    return Compute(common, {task: c.total - common for task, c in counters.items()})


def _differentiable(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _owned_by_any(model: MultiTaskModel, tasks: Iterable[str]) -> set[str]:
    """Names of the tensors that some task does not share with the base."""
    base = {name: _storage(tensor) for name, tensor in named_tensors(model.base)}
    owned: set[str] = set()
    for task in tasks:
        tensors = model.tensors(task)
        owned |= {name for name, storage in base.items() if _storage(tensors[name]) != storage}
    return owned


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


class _Counter(TorchDispatchMode):
    """Counts the multiply-adds of what runs inside, and those that depend on given tensors.

    Args:
        own: the tensors.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.own = 0
        # Storages are kept alive, so that none is freed and its place taken by another.
        self._own = {_storage(tensor): tensor for tensor in own}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        depends = any(_storage(tensor) in self._own for tensor in read)
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is not None:
            count = formula(*args, **kwargs, out_val=output) // 2
            self.total += count
            self.own += count if depends else 0
        if depends:
            written = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
            self._own.update({_storage(tensor): tensor for tensor in written})
        return output
