"""Structures: copies of the base's modules whose tensor slots are emptied, to be bound to a task.

Binding writes tensors into the slots, one dictionary write each; a forward then runs as ordinary
PyTorch. A structure serves one task at a time: for the length of a forward and, where a backward
may still run parts of it again (activation checkpointing), until that backward has run.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import LeaseError, PlanError, close_matches

from .adapter import Adapter, Call, InlineAdapter, Insertion, Records, SideAdapter
from .pending import Pending
from .sites import (
    Slot,
    is_fused,
    keep_weights_apart,
    named_tensors,
    renormed_weights,
    statistics_modules,
    tensor_slots,
)

SLOT = ":"
"""Separates a site from what is attached there, in keys of own and adapter tensors."""


class Passage:
    """What happens at one site in one forward; a plain object, since modules are slow to write."""

    def __init__(self) -> None:
        self.begin(Call())

    def begin(self, call: Call) -> None:
        """Get ready for one forward."""
        self.call = call
        self.reached = False
        self.read = False

    @property
    def bypassed(self) -> bool:
        """Whether the parent read the site's tensors in this forward and never called it."""
        return self.read and not self.reached


_OF_INSERTED = frozenset(vars(nn.Module())) | {"site", "inner", "adapter", "passage", "_inline"}


class Inserted(nn.Module):
    """A site of a structure with an adapter around it; other attributes are the site's."""

    def __init__(self, site: str, inner: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.site = site
        self.inner = inner
        self.adapter = adapter
        self.passage = Passage()
        self._inline = isinstance(adapter, InlineAdapter)

    def __getattr__(self, name: str) -> Any:
        # Parents read attributes of their children (a stride, a weight's dtype): show the site's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("inner"), name)
        if isinstance(value, Tensor) and not self.passage.read:
            self.passage.read = True
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Parents also set attributes of their children, for instance a mask for one forward.
        if name in _OF_INSERTED or "_inline" not in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self.inner, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        passage = self.passage
        if not passage.reached:
            passage.reached = True
        modules: Any = self._modules  # directly: modules are slow to read from, too
        site, adapter = modules["inner"], modules["adapter"]
        if self._inline:
            inner = (lambda *a: site(*a, **kwargs)) if kwargs else site
            return adapter(passage.call, self.site, inner, *args)
        output = site(*args, **kwargs)
        passage.call.records.setdefault(self.site, {})["feature"] = adapter(output)
        return output


def keep_fused_paths_away(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing."""


class StandIn(nn.Module, ABC):
    """What may take the place of a module in a structure."""

    @abstractmethod
    def hold(self, names: frozenset[str]) -> None:
        """Hold throw-away copies of these buffers until the backward: it may run parts again."""

    @abstractmethod
    def let_go(self) -> None:
        """Refer to no task's tensors any more."""


class _Scratch:
    """A copy of a shared tensor, good as long as neither it nor the tensor has been written to.

    Args:
        tensor: to copy.
        lasting: whether what forwards write to the copy does no harm: scaling rows to a largest
            norm once more leaves them as they are.
    """

    def __init__(self, tensor: Tensor, *, lasting: bool) -> None:
        with torch.inference_mode(False):
            self.copy = tensor.detach().clone()
        self._source = tensor
        self._lasting = lasting
        self._versions = (tensor._version, self.copy._version)

    def fresh(self, tensor: Tensor) -> bool:
        written = self._versions[1] if self._lasting else self.copy._version
        return tensor is self._source and (tensor._version, written) == self._versions


class Structure:
    """An emptied copy of a base with adapters inserted, and the places to bind tensors to.

    Args:
        base: the module to copy; its tensors are never copied.
        adapters: by site, what to insert.
    """

    def __init__(self, base: nn.Module, adapters: Mapping[str, Insertion]) -> None:
        memo: dict[int, Any] = {id(t): t for _, t in named_tensors(base)}
        with torch.inference_mode(False):
            self.module = copy.deepcopy(base, memo)
        keep_weights_apart(self.module)
        self.statistics = statistics_modules(self.module)
        self._modules = dict(self.module.named_modules())
        self._slots = tensor_slots(self.module)
        self._renormed = renormed_weights(self.module, self._slots)
        self._held: dict[int, list[tuple[dict[str, nn.Module | None], str]]] | None = None
        self._replaced: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        self._stand_ins: list[StandIn] = []
        own_buffers = {n for names in self.statistics.values() for n in names}
        self._foreign = frozenset(n for n, _ in buffers_of(self._slots)) - own_buffers
        self.inserted: dict[str, Inserted] = {}
        before = len(self._slots)
        # Initial values are thrown away: random numbers drawn for them would change what others do.
        with torch.random.fork_rng(devices=[]) if adapters else nullcontext():
            for site, insertion in adapters.items():
                self._insert(site, insertion)
        self.adapter_names = tuple(dict.fromkeys(n for n, _, _ in self._slots[before:]))
        self.adapter_buffers = frozenset(n for n, _ in buffers_of(self._slots[before:]))
        self._buffer_slots = [s for s in self._slots if not isinstance(s[1][s[2]], nn.Parameter)]
        self.names = tuple(dict.fromkeys(name for name, _, _ in self._slots))
        self.unbind()

        self.running = False
        self._pending = Pending()
        self._bound: Mapping[str, Tensor] = {}
        self._mode: tuple[bool, frozenset[str]] | None = None
        self._writable: frozenset[str] = frozenset()
        self._guarded: list[Slot] = []
        self._scratch: dict[str, _Scratch] = {}
        self._holds_copies = False

    def _insert(self, site: str, insertion: Insertion) -> None:
        if not site or site not in self._modules:
            raise PlanError(
                f"The plan inserts an adapter at '{site}', which is no module inside the base."
                + close_matches(site, self._modules)
            )
        inner = self._modules[site]
        inserted = Inserted(site, inner, insertion.build(inner))
        replace_child(self._modules.values(), inner, inserted)
        if self.fused:
            # They read their children's weights instead of calling them, unless a child has a hook.
            inserted.register_forward_hook(keep_fused_paths_away)
        for name, table, attribute in tensor_slots(inserted.adapter):
            self._slots.append((f"{site}{SLOT}{name}", table, attribute))
        self.inserted[site] = inserted

    @property
    def fused(self) -> bool:
        """Whether a module may read its children's weights instead of calling them."""
        return any(map(is_fused, self._modules.values()))

    @property
    def slots(self) -> Sequence[Slot]:
        """Every place that holds a tensor."""
        return self._slots

    def parts(self) -> dict[str, nn.Module]:
        """The modules inside by path; what is inserted at a site by the site's path and a colon."""
        modules = {path: module for path, module in self._modules.items() if path}
        return modules | {f"{site}{SLOT}": module for site, module in self.inserted.items()}

    # ---------------------------------------------------------------- binding

    def set_mode(self, training: bool, writable: frozenset[str]) -> None:
        """Training or eval mode, and what a forward may write to.

        Args:
            training: the mode; a module with running statistics that are not all writable stays in
                eval mode.
            writable: names of the buffers that forwards may change. Of the others that are no
                statistics, forwards get copies: no module changes shared state, for instance by
                moving averages of its own.
        """
        if self._mode == (training, writable):
            return
        self.module.train(training)
        for path, buffers in self.statistics.items():
            if not writable.issuperset(buffers):
                self._modules[path].eval()
        self._mode = (training, writable)
        self._writable = writable
        guarded = self._foreign - writable
        self._guarded = [slot for slot in self._buffer_slots if slot[0] in guarded]
        self._guarded += [slot for slot in self._slots if slot[0] in self._renormed]

    @property
    def moving(self) -> frozenset[str]:
        """Paths of the modules whose running statistics the next forward updates."""
        if not self.module.training:
            return frozenset()
        mine = self.statistics.items()
        return frozenset(path for path, names in mine if self._writable.issuperset(names))

    @property
    def guarded(self) -> frozenset[str]:
        """Names of the buffers of which forwards get copies."""
        return self._foreign - self._writable

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Write one task's tensors into the slots: one dictionary write each."""
        self._restore()
        self._bound = tensors
        for name, table, attribute in self._slots:
            table[attribute] = tensors[name]
        self._holds_copies = False
        self._guard_buffers()

    def unbind(self) -> None:
        """Empty all slots, so that a forgotten tensor raises instead of computing nonsense."""
        self._restore()
        self._bound = {}
        for _, table, attribute in self._slots:
            table.pop(attribute, None)

    def replace(self, module: nn.Module, by: StandIn) -> None:
        """Put another module in the place of one of this structure, until tensors are bound anew.

        Args:
            module: one of this structure.
            by: what its parents call in its place.
        """
        self._stand_ins.append(by)
        for table, name in self._holders()[id(module)]:
            self._replaced.append((table, name, module))
            table[name] = by

    def _restore(self) -> None:
        while self._replaced:
            table, name, module = self._replaced.pop()
            table[name] = module
        while self._stand_ins:
            self._stand_ins.pop().let_go()

    def _holders(self) -> dict[int, list[tuple[dict[str, nn.Module | None], str]]]:
        """By the identity of a child, every place that holds it."""
        if self._held is None:
            self._held = {}
            for parent in self.module.modules():
                for name, child in parent._modules.items():
                    self._held.setdefault(id(child), []).append((parent._modules, name))
        return self._held

    def _guard_buffers(self) -> None:
        if self._holds_copies:
            for name, table, attribute in self._buffer_slots:
                table[attribute] = self._bound[name]
            self._holds_copies = False
        for name, table, attribute in self._guarded:
            buffer = self._bound[name]
            if buffer.requires_grad and torch.is_grad_enabled():
                table[attribute] = buffer  # to differentiate with respect to it; no copy could
                continue
            kept = self._scratch.get(name)
            if kept is None or not kept.fresh(buffer):
                lasting = name in self._renormed
                kept = self._scratch[name] = _Scratch(buffer, lasting=lasting)
            table[attribute] = kept.copy

    def _hold_statistics(self) -> None:
        # Activation checkpointing runs parts of the forward again during the backward; bound to
        # throw-away copies, it cannot update the statistics a second time.
        for name, table, attribute in self._buffer_slots:
            if name in self._writable and table.get(attribute) is self._bound[name]:
                table[attribute] = table[attribute].detach().clone()
        for stand_in in self._stand_ins:
            stand_in.hold(self._writable)
        self._holds_copies = True

    # ---------------------------------------------------------------- running

    @property
    def busy(self) -> bool:
        """Whether a forward is running or a backward is still to come."""
        return self.running or bool(self._pending)

    def begin(self, call: Call) -> None:
        """Give the adapters this forward's records and context."""
        for inserted in self.inserted.values():
            inserted.passage.begin(call)

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: Call,
        context: AbstractContextManager[Any] | None = None,
    ) -> Any:
        """One forward of the bound structure; waits in the graph of the outputs for its backward.

        Args:
            args: positional inputs of the base.
            kwargs: keyword inputs of the base.
            call: records and context for the adapters.
            context: entered for the forward alone.

        Raises:
            LeaseError: another forward of this structure is running.
            PlanError: the parent of an adapter's site never calls it.
        """
        if self.running:
            raise LeaseError(
                "A forward of this view is running in another thread. "
                "Use one view per thread: model.view(task) in each."
            )
        self.running = True
        try:
            self._guard_buffers()
            self.begin(call)
            with context or nullcontext():
                output = self.module(*args, **kwargs)
            self._check_reached()
        finally:
            self.running = False
        if torch.is_grad_enabled():
            self.await_backward([output, call.records])
        return output

    def await_backward(self, outputs: Any) -> None:
        """Stay leased until the backward of these outputs has run or their graph is dropped."""
        if self._pending.add(outputs) and self.module.training:
            self._hold_statistics()

    def _check_reached(self) -> None:
        for site, inserted in self.inserted.items():
            if inserted.passage.bypassed:
                raise PlanError(
                    f"The adapter at '{site}' has no effect: its parent uses the module's tensors "
                    "without calling it. Leave this site out (exclude=[...] of weft.lora), or "
                    "use a method that replaces tensors."
                )

    def taps(self, records: Records) -> dict[str, Tensor]:
        """What one task's head reads from the side sites, by the task's tensors now bound."""
        return {
            site: inserted.adapter.tap(records[site]["feature"])
            for site, inserted in self.inserted.items()
            if isinstance(inserted.adapter, SideAdapter) and site in records
        }


def buffers_of(slots: list[Slot]) -> list[tuple[str, Tensor]]:
    """The buffers among the tensors of filled slots, by name."""
    found = [(name, table[attribute]) for name, table, attribute in slots]
    return [(name, tensor) for name, tensor in found if not isinstance(tensor, nn.Parameter)]


def replace_child(parents: Any, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another one, in every parent that holds it."""
    for parent in list(parents):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
