"""Running: composes a task's tensors and leases structures to run them.

What is here is derived from a model's base, shared tensors and plans, and is made anew rather than
copied or stored.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.errors import DataError, WeftError

from .adapter import Call, Insertion, Records
from .folding import check_plain
from .patch import Patch, Replace
from .pool import Pool
from .rows import Arguments, Output, call_arguments, count_rows, select_output
from .sharing import Sharing
from .sites import tensor_slots
from .state import TaskState, TensorTable
from .structure import SLOT, buffers_of
from .together import SharedInputs
from .view import View


@dataclass(frozen=True)
class _Replacing:
    """The tensors of a task that only replaces tensors: they are the own ones, until those change.

    Args:
        patches: what they were found by.
        held: the own tensors that there were.
        tensors: by name.
    """

    patches: Mapping[str, Patch]
    held: tuple[Tensor, ...]
    tensors: dict[str, Tensor]

    def still(self, patches: Mapping[str, Patch], held: tuple[Tensor, ...]) -> bool:
        """Whether nothing has changed; numbers in the tensors may have."""
        same = patches is self.patches and len(held) == len(self.held)
        return same and all(map(operator.is_, held, self.held))


class Runner:
    """Runs the tasks of one model.

    Args:
        base: the model's own base.
        shared: the shared tensors that the model's plan adds.
        output: what heads read of the base's output.
    """

    def __init__(self, base: nn.Module, shared: TensorTable, output: Output) -> None:
        self._base = base
        self._shared = shared
        self.output = output
        self._slots = tensor_slots(base)
        self._buffers = frozenset(name for name, _ in buffers_of(self._slots))
        self._pools: dict[tuple[tuple[str, Insertion], ...], Pool] = {}
        self._pool_of_plan: WeakKeyDictionary[Sharing, Pool] = WeakKeyDictionary()
        self._replacing: WeakKeyDictionary[TaskState, _Replacing] = WeakKeyDictionary()
        self._known_shapes: list[tuple[int, ...]] = []

    # ---------------------------------------------------------------- tensors

    def base_tensors(self) -> dict[str, Tensor]:
        """The base's tensors by canonical name."""
        return {name: table[attribute] for name, table, attribute in self._slots}

    def reference(self) -> Tensor:
        """A tensor of the device and floating type of the base."""
        tensors = self.base_tensors().values()
        return next((t for t in tensors if t.is_floating_point()), torch.empty(0))

    def compose(self, state: TaskState) -> dict[str, Tensor]:
        """Every tensor that runs for a task, by name; differentiable in grad mode.

        A task whose own plan trains nothing shared reads shared tensors as constants, also in a
        model whose plan trains them.
        """
        tensors = self.tensors_read(state)
        return {**tensors, **self.changes(state, tensors)}

    def tensors_read(self, state: TaskState) -> dict[str, Tensor]:
        """The base's tensors as a task reads them, by name."""
        tensors = self.base_tensors()
        if state.sharing.trains_shared:
            return tensors
        return {n: t.detach() if t.requires_grad else t for n, t in tensors.items()}

    def changes(self, state: TaskState, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a task that are not the base's, by name.

        Args:
            state: the task.
            base: the base's tensors by name, as the task reads them.
        """
        held = tuple(state.own.tensors())
        known = self._replacing.get(state)
        if known is not None and known.still(state.patches, held):
            return known.tensors
        shared = self._shared.to_dict()
        if not state.sharing.trains_shared:
            # What the model's plan created does not train for a task of another plan; what
            # adapters share belongs to the plan that has them.
            sites = state.sharing.adapters
            shared = {
                k: t.detach() if t.requires_grad and k.partition(SLOT)[0] not in sites else t
                for k, t in shared.items()
            }
        own = {**shared, **state.own.to_dict()}
        found: dict[str, Tensor] = {}
        cast = False
        for name, patch in state.patches.items():
            found[name] = value = patch.compose(name, base[name], own)
            if value.dtype != base[name].dtype:  # own tensors may be kept in half precision
                found[name], cast = value.to(base[name].dtype), True
        for name in self.pool(state.sharing).adapter_names:
            found[name] = own[name]
        replaces = all(type(patch) is Replace for patch in state.patches.values())
        if replaces and not cast and found.keys() <= state.own.keys():
            self._replacing[state] = _Replacing(state.patches, held, found)
        return found

    def writable(self, state: TaskState) -> frozenset[str]:
        """Names of the buffers that a forward of the task may change in training mode."""
        owned = self._buffers.intersection(state.own.to_dict())
        trained = self._buffers & state.sharing.train_shared
        return owned | trained | self.pool(state.sharing).adapter_buffers

    # ---------------------------------------------------------------- running

    def run(
        self,
        states: Mapping[str, TaskState],
        parts: Mapping[str, Arguments],
        context: Mapping[str, Any],
        *,
        training: bool,
    ) -> tuple[dict[str, Any], dict[str, Records]]:
        """A forward of several tasks, each on inputs of its own, heads included.

        Args:
            states: by name, the tasks.
            parts: by name, the inputs of the base.
            context: handed to adapters.
            training: the mode of the base.

        Returns:
            By name, the outputs and the records.
        """
        single = training and any(count_rows(*part) == 1 for part in parts.values())
        outputs: dict[str, Any] = {}
        records: dict[str, Records] = {}
        shared = SharedInputs(parts.values())
        with self.statistics_kept_on_error(states.values() if single else ()):
            for name, state in states.items():
                args, kwargs = shared.take(parts[name])
                call = Call(context=context)
                features, side = self._features(state, args, kwargs, call, training=training)
                state.build_head(features, self.reference())
                if state.head is None:
                    outputs[name] = features
                else:
                    read = (features, side) if state.task.taps else (features,)
                    outputs[name] = state.head(*read)
                records[name] = call.records
        return outputs, records

    def dry_run(self, state: TaskState, example: Any) -> None:
        """Build a task's head from one batch for the base."""
        args, kwargs = self._batch_of(example)
        with torch.no_grad():
            features, _ = self._features(state, args, kwargs, Call(), training=False)
        state.build_head(features, self.reference())

    def check_plain(self, state: TaskState, plain: nn.Module, example: Any) -> None:
        """Refuse a plain module that does not compute what a task computes.

        Raises:
            PlanError: as for `folding.check_plain`.
        """

        def of_task(batch: Arguments) -> Tensor:
            return self._features(state, *batch, Call(), training=False)[0]

        check_plain(plain, of_task, self._batch_of(example), self.output, self.reference().device)

    def _batch_of(self, example: Any) -> Arguments:
        """The arguments of the base that an example stands for, as its tensors are."""
        like = self.reference()

        def fit(tensor: Tensor) -> Tensor:
            return tensor.to(like if tensor.is_floating_point() else like.device)

        return call_arguments((pytree.tree_map_only(Tensor, fit, example),), {})

    def _features(
        self,
        state: TaskState,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: Call,
        *,
        training: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What a task's head reads, and what it reads from side sites if it does."""
        tensors = self.compose(state)
        with self.pool(state.sharing).lease() as structure:
            structure.set_mode(training, self.writable(state))
            structure.bind(tensors)
            with self.shapes_explained(args, kwargs):
                output = structure.run(args, kwargs, call)
            features = select_output(output, self.output)
            if features is not output and torch.is_grad_enabled():
                structure.await_backward(features)
            return features, structure.taps(call.records) if state.task.taps else {}

    @contextmanager
    def shapes_explained(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Say so if the base fails on inputs of another shape than it has run on.

        Raises:
            DataError: in place of the base's own error.
        """
        shapes = _shapes(args, kwargs)
        try:
            yield
        except (WeftError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            if self._known_shapes and shapes != self._known_shapes:
                raise DataError(
                    f"The base failed on inputs of shape {_per_row(shapes)}; it has run on "
                    f"{_per_row(self._known_shapes)}. Bring the inputs to that shape. "
                    f"The base said: {error}"
                ) from error
            raise
        self._known_shapes = shapes

    def has_run_on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take note of inputs that the base takes, for `shapes_explained`."""
        self._known_shapes = _shapes(args, kwargs)

    def view(self, state: TaskState, *, training: bool) -> View:
        """A view of a task, bound to differentiable tensors in training mode, else to constants."""
        if training:
            tensors = self.compose(state)
        else:
            with torch.inference_mode(False), torch.no_grad():
                buffers = self._buffers | self.pool(state.sharing).adapter_buffers
                composed = self.compose(state)
                tensors = {
                    name: tensor.detach() if name in buffers else _constant(tensor)
                    for name, tensor in composed.items()
                }
        pool = self.pool(state.sharing)
        return View(pool, tensors, self.writable(state), training=training)

    def sweep(self) -> None:
        """Let go of tensors that idle structures are still bound to."""
        for pool in self._pools.values():
            pool.sweep()

    def pool(self, sharing: Sharing) -> Pool:
        """The structures that run tasks of a plan."""
        pool = self._pool_of_plan.get(sharing)
        if pool is None:
            # Plans that insert the same adapters, or none, run the same structures.
            key = tuple(sharing.adapters.items())
            pool = self._pools.get(key)
            if pool is None:
                pool = self._pools.setdefault(key, Pool(self._base, sharing.adapters))
            self._pool_of_plan[sharing] = pool
        return pool

    # ------------------------------------------------------------- statistics

    @contextmanager
    def statistics_kept_on_error(self, states: Iterable[TaskState]) -> Iterator[None]:
        """Take back what earlier layers wrote when a forward fails.

        Raises:
            DataError: a batch norm refuses a group of one row.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        for state in states:
            tensors = {**self.base_tensors(), **self._shared.to_dict(), **state.own.to_dict()}
            kept += [(tensors[n], tensors[n].clone()) for n in self.writable(state)]
        try:
            yield
        except Exception as error:
            with torch.no_grad():
                for tensor, before in kept:
                    tensor.copy_(before)
            if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
                raise DataError(
                    "A group of one row is too small for a batch normalisation that the task "
                    "trains: it needs more than one value per channel. Use larger batches, drop "
                    "the last incomplete one, or call model.eval()."
                ) from error
            raise


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    return [tuple(t.shape[1:]) for t in leaves if isinstance(t, Tensor)]


def _per_row(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(str(("rows", *shape)).replace("'", "") for shape in shapes)


def _constant(tensor: Tensor) -> nn.Parameter:
    # One kind of tensor for all tasks, so that they share a compiled graph.
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=False)
