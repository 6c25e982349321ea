"""What forwards cost in multiply-adds, and how much of it tasks have in common.

The second cost of sharing beside bytes: when one input needs the outputs of all tasks, what two
tasks compute alike needs computing once. Private tops share their trunk; private bottoms share
nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from weft.core.memory import bytes_of, storage_of
from weft.core.model import MultiTaskModel
from weft.training.evaluation import modes_kept


@dataclass(frozen=True)
class Compute:
    """Multiply-adds of the forwards of one batch, heads included.

    Args:
        common: what all tasks compute alike.
        own: by task, the rest of its forward.
        all_tasks: all outputs of one input, with everything that any tasks compute alike done once.
    """

    common: int
    own: Mapping[str, int]
    all_tasks: int

    def of(self, task: str) -> int:
        """One task's forward."""
        return self.common + self.own[task]


def multiply_adds(
    model: MultiTaskModel, x: Any, *, tasks: Sequence[str] | None = None, skip_zeros: bool = False
) -> Compute:
    """Count the multiply-adds of tasks' forwards, and what of them they have in common.

    Two operations are the same if they do the same to the same tensors, back to the inputs and the
    stored tensors: what follows an own tensor, or a block that only one task skips, is not.
    Matrix products, convolutions and attention count, as in torch's own counter; normalisation,
    activations, and recurrent layers that run as one fused kernel do not.

    Args:
        model: the model; it runs in eval mode and is left as it was.
        x: a batch for the base: a tensor, or a tuple or dict of tensors; one row gives the cost of
            one input.
        tasks: which; default all.
        skip_zeros: leave out multiply-adds with stored weights that are zero. This counts what a
            sparse kernel would have to do; nothing here runs faster for it.

    Returns:
        The counts.

    Raises:
        TaskError: no such task.
    """
    chosen = model.task_names if tasks is None else tuple(tasks)
    # The registry knows neither the fused attention of CPUs nor the fused encoder layers, which
    # PyTorch leaves aside where an input requires a gradient.
    with torch.inference_mode(False):
        x = pytree.tree_map_only(Tensor, _differentiable, x)
    inputs = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    stored = {storage_of(t) for t in (*model.parameters(), *model.buffers(), *inputs)}
    weights = {storage_of(t) for t in model.parameters()} if skip_zeros else set()
    found: dict[str, Counter[Hashable]] = {}
    with modes_kept(model), torch.inference_mode(False), torch.enable_grad():
        model.eval()
        for task in chosen:
            tracer = _Tracer(stored, weights)
            with sdpa_kernel(SDPBackend.MATH), tracer:
                model(x, task=task)
            found[task] = tracer.counts
    if not found:
        return Compute(0, {}, 0)
    common = reduce(Counter.__and__, found.values()).total()
    own = {task: counts.total() - common for task, counts in found.items()}
    return Compute(common, own, reduce(Counter.__or__, found.values()).total())


def _differentiable(tensor: Tensor) -> Tensor:
    tensor = tensor.clone() if tensor.is_inference() else tensor
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


class _Tracer(TorchDispatchMode):
    """Names every operation that runs inside by what it does to what, and counts its multiply-adds.

    A piece of memory is named by the operation that wrote to it last; an input or a stored tensor
    by its place; any other, such as a constant that the forward makes of Python's numbers, by what
    is in it.

    Args:
        stored: places of the inputs and of the model's tensors.
        weights: places of tensors whose zeros are not multiplied.
    """

    def __init__(self, stored: Collection[int], weights: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[Hashable] = Counter()
        self._stored = stored
        self._weights = weights
        self._written: dict[int, Hashable] = {}
        self._alive: list[Any] = []  # so that no place is used twice in a trace

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        leaves, structure = pytree.tree_flatten((args, kwargs))
        name = hash((str(func), structure, *map(self._name, leaves)))
        output = func(*args, **kwargs)
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is not None:
            count = formula(*args, **kwargs, out_val=output) // 2
            self.counts[name] += round(count * math.prod(map(self._density, leaves)))
        read = {storage_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        for place, tensor in enumerate(pytree.tree_leaves(output)):
            # A view reads what was written before; only new memory, or changed one, has a new name.
            if not isinstance(tensor, Tensor):
                continue
            storage = storage_of(tensor)
            if storage not in read or func._schema.is_mutable:
                self._written[storage] = (name, place)
                self._alive.append(tensor.untyped_storage())
        return output

    def _density(self, leaf: Any) -> float:
        """The share of a stored matrix or kernel that is not zero, where that matters; else 1."""
        if not isinstance(leaf, Tensor) or leaf.dim() < 2 or not leaf.numel():
            return 1.0
        place = storage_of(leaf)
        if place not in self._weights or place in self._written:
            return 1.0
        return int(leaf.count_nonzero()) / leaf.numel()

    def _name(self, leaf: Any) -> Hashable:
        if not isinstance(leaf, Tensor):
            return str(leaf)
        storage = storage_of(leaf)
        where = (tuple(leaf.shape), leaf.stride(), leaf.storage_offset())
        if storage in self._written:
            return (self._written[storage], where)
        if storage in self._stored:
            return (storage, where)
        return (str(leaf.dtype), bytes(bytes_of(leaf)), where)
