"""Views: the structure of the base, bound to one task's tensors.

A *structure* is a copy of the base's modules whose parameter and buffer slots are emptied. Binding
writes tensors into the slots, one dictionary write each; a forward then runs as ordinary PyTorch.
A structure serves one task at a time: it is leased for a forward and, where a backward may still
re-run parts of it (activation checkpointing), until that backward has run.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.errors import LeaseError, PlanError, close_matches

from .adapter import Adapter, Call, InlineAdapter, Insertion, Records, SideAdapter
from .sites import named_tensors, statistics_modules, tensor_slots

SLOT = ":"
"""Separates a site from what is attached there, in keys of own and adapter tensors."""


class Inserted(nn.Module):
    """A site of a structure with an adapter around it; other attributes are the site's."""

    def __init__(self, site: str, inner: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.site = site
        self.inner = inner
        self.adapter = adapter
        self.call = Call()
        self.reached = False

    def __getattr__(self, name: str) -> Any:
        # Parents read attributes of their children (a stride, a weight's dtype): show the site's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.reached:
            self.reached = True
        if isinstance(self.adapter, InlineAdapter):
            inner = (lambda *a: self.inner(*a, **kwargs)) if kwargs else self.inner
            return self.adapter(self.call, self.site, inner, *args)
        output = self.inner(*args, **kwargs)
        self.call.records.setdefault(self.site, {})["feature"] = self.adapter(output)
        return output


@dataclass(eq=False)
class _Pending:
    """Lives in the graph of one output until its backward has run or the graph is dropped."""

    done: bool = False


class _Scratch:
    """A copy of a shared buffer, good as long as neither it nor the buffer has been written to."""

    def __init__(self, buffer: Tensor) -> None:
        self.copy = buffer.detach().clone()
        self._source = buffer
        self._versions = (buffer._version, self.copy._version)

    def fresh(self, buffer: Tensor) -> bool:
        versions = (buffer._version, self.copy._version)
        return buffer is self._source and versions == self._versions


class Structure:
    """An emptied copy of a base with adapters inserted, and the places to bind tensors to.

    Args:
        base: the module to copy; its tensors are never copied.
        adapters: by site, what to insert.
    """

    def __init__(self, base: nn.Module, adapters: Mapping[str, Insertion]) -> None:
        memo = {id(t): t for _, t in named_tensors(base)}
        self.module = copy.deepcopy(base, memo)
        self.statistics = statistics_modules(self.module)
        self._modules = dict(self.module.named_modules())
        self._slots = tensor_slots(self.module)
        self.buffers = frozenset(n for n, table, a in self._slots if _is_buffer(table[a]))
        self.inserted: dict[str, Inserted] = {}
        for site, insertion in adapters.items():
            self._insert(site, insertion)
        self.unbind()
        self.names = tuple(dict.fromkeys(name for name, _, _ in self._slots))
        self.running = False
        self._pending: weakref.WeakSet[_Pending] = weakref.WeakSet()
        self._mode: tuple[bool, frozenset[str]] | None = None
        self._scratch: dict[str, _Scratch] = {}

    def _insert(self, site: str, insertion: Insertion) -> None:
        if not site or site not in self._modules:
            raise PlanError(
                f"The plan inserts an adapter at '{site}', which is no module inside the base."
                + close_matches(site, self._modules)
            )
        inner = self._modules[site]
        inserted = Inserted(site, inner, insertion.build(inner))
        for parent in self._modules.values():
            for child, module in parent._modules.items():
                if module is inner:
                    parent._modules[child] = inserted
        for name, table, attribute in tensor_slots(inserted.adapter):
            self._slots.append((f"{site}{SLOT}{name}", table, attribute))
        self.inserted[site] = inserted

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one task's tensors into the slots: one dictionary write each."""
        for name, table, attribute in self._slots:
            table[attribute] = tensors[name]

    def unbind(self) -> None:
        """Empty all slots, so that a forgotten tensor raises instead of computing nonsense."""
        for _, table, attribute in self._slots:
            table.pop(attribute, None)

    def set_mode(self, training: bool, trained_statistics: frozenset[str]) -> None:
        """Training or eval mode, except that statistics that no plan trains stay in eval mode."""
        if self._mode == (training, trained_statistics):
            return
        self.module.train(training)
        for path, buffers in self.statistics.items():
            if not trained_statistics.issuperset(buffers):
                self._modules[path].eval()
        self._mode = (training, trained_statistics)

    def foreign_buffers(self, trained_statistics: frozenset[str]) -> frozenset[str]:
        """Shared buffers that some module could change in training mode, for instance its own
        moving averages or a spectral norm's vectors."""
        known = {b for buffers in self.statistics.values() for b in buffers}
        return self.buffers - known - trained_statistics

    def scratch(self, name: str, buffer: Tensor) -> Tensor:
        """A copy of a shared buffer for modules to write to; always equal to the buffer at first.

        A forward in training mode gets the copy, so that no forward can change shared state.
        """
        kept = self._scratch.get(name)
        if kept is None or not kept.fresh(buffer):
            kept = self._scratch[name] = _Scratch(buffer)
        return kept.copy

    def bypassed(self) -> list[str]:
        """Sites whose adapter the last forwards never reached: the parent did not call the site."""
        return [
            site
            for site, inserted in self.inserted.items()
            if not inserted.reached
            # An outer adapter may skip its site, and with it what is inside.
            and not any(site.startswith(f"{other}.") for other in self.inserted)
        ]

    @property
    def busy(self) -> bool:
        """Whether a forward is running or a backward is still to come."""
        return self.running or any(not p.done for p in self._pending)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], call: Call) -> Any:
        """One forward of the bound structure; waits in the graph of the outputs for its backward.

        Raises:
            LeaseError: if another forward of this structure is running.
        """
        if self.running:
            raise LeaseError(
                "A forward of this view is running in another thread. "
                "Use one view per thread: model.view(task) in each."
            )
        self.running = True
        try:
            for inserted in self.inserted.values():
                inserted.call = call
            output = self.module(*args, **kwargs)
        finally:
            self.running = False
        if torch.is_grad_enabled():
            self._await_backward([output, call.records])
        return output

    def _await_backward(self, outputs: Any) -> None:
        for tensor in pytree.tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                pending = _Pending()
                self._pending.add(pending)
                node = tensor.grad_fn
                # The node keeps the token alive; the hook must not, or the graph would keep itself.
                node.metadata[("weft", id(pending))] = pending
                node.register_prehook(_settles(weakref.ref(pending)))

    def hold_statistics(self, names: frozenset[str]) -> None:
        """Bind throw-away copies of trained statistics until the backward has run.

        Activation checkpointing runs parts of the forward again during the backward; without this
        it would update the statistics twice.
        """
        if not self.busy:
            return
        for name, table, attribute in self._slots:
            if name in names:
                table[attribute] = table[attribute].clone()


def _is_buffer(tensor: Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter)


def _settles(pending: weakref.ref[_Pending]) -> Callable[[Any], None]:
    def at_end_of_backward() -> None:
        token = pending()
        if token is not None:
            token.done = True

    def prehook(_: Any) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(at_end_of_backward)  # type: ignore[attr-defined]

    return prehook


class Pool:
    """Structures of one plan, leased one at a time; safe under threads.

    Args:
        base: the model's own base, copied without its tensors.
        adapters: what the plan inserts.
    """

    def __init__(self, base: nn.Module, adapters: Mapping[str, Insertion]) -> None:
        self._base = base
        self._adapters = adapters
        self._idle: list[Structure] = []
        self._lock = threading.Lock()

    def acquire(self) -> Structure:
        """A structure that no forward, backward or view is using."""
        with self._lock:
            for i, structure in enumerate(self._idle):
                if not structure.busy:
                    return self._idle.pop(i)
        return Structure(self._base, self._adapters)

    def release(self, structure: Structure) -> None:
        """Give a structure back; it is used again once its backward has run."""
        if not structure.busy:
            structure.unbind()
        with self._lock:
            self._idle.append(structure)

    @contextmanager
    def lease(self) -> Iterator[Structure]:
        """A structure for the length of a ``with`` block."""
        structure = self.acquire()
        try:
            yield structure
        finally:
            self.release(structure)


class View(nn.Module):
    """The structure of the base bound to one task's tensors; it owns nothing.

    ``view(x)`` is the task's backbone output. A view is a module: it can be compiled and exported.
    It is made by ``model.view(task)``, is never stored, and returns its structure when dropped.

    Args:
        pool: where the structure comes from.
        tensors: ``{name: tensor}``, complete.
        statistics: names of the buffers that are in training mode when the view is.
        training: the mode to start in.
    """

    def __init__(
        self,
        pool: Pool,
        tensors: Mapping[str, Tensor],
        statistics: frozenset[str],
        *,
        training: bool,
    ) -> None:
        super().__init__()
        structure = pool.acquire()
        weakref.finalize(self, pool.release, structure)
        self._structure = structure
        self.structure = structure.module
        self.records: Records = {}
        self._statistics = statistics
        self.bind(tensors)
        self.train(training)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors that `bind` needs."""
        return self._structure.names

    def bind(self, tensors: Mapping[str, Tensor]) -> View:
        """Bind other tensors, for instance composed ones to differentiate with respect to.

        Args:
            tensors: ``{name: tensor}`` for every name in `names`, no more and no less.

        Returns:
            The view itself.

        Raises:
            PlanError: a name is missing or unknown.
            LeaseError: a forward is running or a backward of this view is still to come.
        """
        missing = [n for n in self.names if n not in tensors]
        unknown = [n for n in tensors if n not in set(self.names)]
        if missing or unknown:
            wrong = (missing or unknown)[0]
            known: Any = tensors if missing else self.names
            raise PlanError(
                f"A view binds every tensor of its structure: {len(missing)} missing, "
                f"{len(unknown)} unknown, first '{wrong}'." + close_matches(wrong, known)
            )
        if self._structure.busy:
            raise LeaseError(
                "The view cannot be bound to other tensors: a forward is running or a backward "
                "has not run yet. Call backward() or drop the outputs first, or take another view."
            )
        self._structure.bind(tensors)
        return self

    def train(self, mode: bool = True) -> View:
        """Training or eval mode; statistics that the task does not train stay in eval mode."""
        self.training = mode
        self._structure.set_mode(mode, self._statistics)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone output of the bound task, with the signature of the base."""
        if torch.compiler.is_compiling():
            return self.structure(*args, **kwargs)
        call = Call()
        output = self._structure.run(args, kwargs, call)
        self.records = call.records
        return output

    def __reduce__(self) -> Any:
        raise LeaseError("A view is never copied or stored. Take a new one: model.view(task).")


def taps(structure: Structure, records: Records) -> dict[str, Tensor]:
    """What one task's head reads from the side sites, by the task's tensors now bound."""
    return {
        site: inserted.adapter.tap(records[site]["feature"])
        for site, inserted in structure.inserted.items()
        if isinstance(inserted.adapter, SideAdapter)
    }
