"""From bundles to tasks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from weft.core.model import MultiTaskModel
from weft.core.sharing import Sharing
from weft.core.task import Task
from weft.errors import BankError

from .bundles import Bundle, check_fit, install, read_bundle, restore
from .checking import BaseCheck, common_output, default_plan, one_shared_state, well_formed
from .fingerprint import MarkCache, Marks
from .plans import PlanShelf
from .shared import SharedCache, created_part, fill_shared
from .store import Store

Output = str | int | Callable[[Any], Tensor] | None


class Loader:
    """Reads bundles, and makes models of them.

    Args:
        store: the bank's files.
        marks: what is known of bases.
        shared: what is known of models' shared states.
    """

    def __init__(self, store: Store, marks: MarkCache, shared: SharedCache) -> None:
        self._store = store
        self._marks = marks
        self._shared = shared
        self._plans = PlanShelf()
        self._checks: WeakKeyDictionary[nn.Module, BaseCheck] = WeakKeyDictionary()

    def read(self, task: str, *, verify: bool) -> Bundle:
        """A task's bundle.

        Raises:
            BankError: there is none, or it is damaged.
        """
        with self._store.reading(), well_formed(task):
            self._store.bank()
            return read_bundle(self._store.place(task), task, verify=verify)

    def model(
        self,
        base: nn.Module,
        bundles: Mapping[str, Bundle],
        *,
        sharing: Sharing | None,
        example: Any,
        output: Output,
        marks: Marks | None,
        verify: bool,
    ) -> MultiTaskModel:
        """A model without tasks, ready for these bundles: their plan, their shared state.

        Args:
            base: the base.
            bundles: by task.
            sharing: a plan that was handed in.
            example: as for `MultiTaskModel`.
            output: as for `MultiTaskModel`.
            marks: of the base; None to take it as it is.
            verify: whether to compare hashes.

        Raises:
            BankError: the base is another one, or the bundles do not go together.
        """
        with well_formed(next(iter(bundles))):
            entries = {name: bundle.entry for name, bundle in bundles.items()}
            if marks is not None:
                check = BaseCheck(self._store, marks)
                for entry in entries.values():
                    check(entry)
            shared = one_shared_state(entries)
            plan, stored = default_plan(entries), self._read_shared(shared, verify=verify)
            own = self._plans.plan(plan, created_part(stored, base))
            if sharing is not None and shared is not None and not self._plans.same(sharing, plan):
                raise BankError(
                    f"These tasks depend on shared tensors of the plan '{own.method}' with options "
                    f"{dict(own.options)}; the plan handed in, '{sharing.method}' with "
                    f"{dict(sharing.options)}, is another one. Hand in that plan, or none."
                )
            output = common_output(entries) if output is None else output
        with torch.random.fork_rng(devices=[]):
            model = MultiTaskModel(base, sharing or own, example=example, output=output)
        if shared is not None:
            fill_shared(model, stored)
            self._shared.remember(model, shared["sha256"])
        if marks is not None and not model.sharing.train_shared:
            self._marks.adopt(model.base, marks)
        return model

    def _read_shared(self, shared: Mapping[str, Any] | None, *, verify: bool) -> dict[str, Tensor]:
        if shared is None:
            return {}
        with self._store.reading():
            return self._store.read_shared(shared, verify=verify)

    def check(self, model: MultiTaskModel, bundle: Bundle, *, base: bool) -> None:
        """Refuse a bundle that does not belong to a model that exists already.

        Args:
            model: the model.
            bundle: the bundle.
            base: whether to compare the bases.

        Raises:
            BankError: another base, or a shared state that the model does not hold.
        """
        task, shared = bundle.entry["task"], bundle.entry["shared"]
        if base:
            marks = self._marks.marks(model.base)
            known = self._checks.get(model.base)
            if known is None or known.marks is not marks:
                known = self._checks[model.base] = BaseCheck(self._store, marks)
            known(bundle.entry)
        if shared is not None and shared["sha256"] != self._shared.hash(model):
            raise BankError(
                f"'{task}' depends on the shared state {shared['sha256'][:12]}…, which this model "
                f"does not hold. Load it into a model of its own: bank.load(base, {task!r})."
            )

    def add(
        self,
        model: MultiTaskModel,
        bundle: Bundle,
        head: nn.Module | None,
        task: Task | None,
        *,
        plans: Iterable[Sharing],
        fits: bool,
    ) -> None:
        """Make a bundle a task of a model.

        Args:
            model: the model.
            bundle: the bundle.
            head: a head that was handed in.
            task: a task that was handed in.
            plans: those that were handed in.
            fits: whether the model's base is known to be the bundle's.

        Raises:
            BankError: a part does not fit or was not handed in.
        """
        name = bundle.entry["task"]
        with well_formed(name):
            plan = self._plan_for(model, bundle, plans)
            state = restore(bundle, plan, task=task, head=head)
            if not fits:
                check_fit(model, state, name)
            install(model, bundle, state)

    def _plan_for(self, model: MultiTaskModel, bundle: Bundle, plans: Iterable[Sharing]) -> Sharing:
        """The bundle's plan: the model's or one handed in, otherwise one that its equals share."""
        entry = bundle.entry["plan"]
        for plan in (model.sharing, *plans):
            if self._plans.same(plan, entry):
                return plan
        if entry["created"] or entry["train_shared"]:
            raise BankError(
                f"'{bundle.entry['task']}' shares tensors by the plan '{entry['method']}', which "
                f"is not this model's ('{model.sharing.method}'). Load it into a model of its own."
            )
        return self._plans.plan(entry, {})
