"""Views: the structure of the base, bound to one task's tensors. What actually runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from weft.errors import LeaseError, PlanError, close_matches

from .adapter import Call, Records
from .pool import Pool


class View(nn.Module):
    """The structure of the base bound to one task's tensors; it owns nothing.

    ``view(x)`` is the task's backbone output. A view is a module: it can be compiled and exported.
    It is made by ``model.view(task)``, is never stored, and returns its structure when dropped.

    Args:
        pool: where the structure comes from.
        tensors: ``{name: tensor}``, complete.
        writable: names of the buffers that a forward may change.
        training: the mode to start in.
    """

    def __init__(
        self,
        pool: Pool,
        tensors: Mapping[str, Tensor],
        writable: frozenset[str],
        *,
        training: bool,
    ) -> None:
        super().__init__()
        structure = pool.acquire()
        weakref.finalize(self, pool.release, structure).atexit = False
        self._structure = structure
        self.structure = structure.module
        self.records: Records = {}
        self._writable = writable
        self.train(training)
        self.bind(tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors that `bind` needs."""
        return self._structure.names

    def bind(self, tensors: Mapping[str, Tensor]) -> View:
        """Bind other tensors, for instance composed ones to differentiate with respect to.

        Args:
            tensors: ``{name: tensor}`` for every name in `names`, no more and no less, each in the
                shape of the tensor it replaces.

        Returns:
            The view itself.

        Raises:
            PlanError: a name is missing or unknown.
            LeaseError: a forward is running or a backward of this view is still to come.
        """
        if len(tensors) != len(self.names) or not all(map(tensors.__contains__, self.names)):
            self._refuse_names(tensors)
        if self._structure.busy:
            raise LeaseError(
                "The view cannot be bound to other tensors: a forward is running or a backward "
                "has not run yet. Call backward() or drop the outputs first, or take another view."
            )
        self._structure.bind(tensors)
        return self

    def _refuse_names(self, tensors: Mapping[str, Tensor]) -> NoReturn:
        missing = [n for n in self.names if n not in tensors]
        unknown = [n for n in tensors if n not in set(self.names)]
        wrong = (missing or unknown)[0]
        known: Any = tensors if missing else self.names
        raise PlanError(
            f"A view binds every tensor of its structure: {len(missing)} missing, "
            f"{len(unknown)} unknown, first '{wrong}'." + close_matches(wrong, known)
        )

    def train(self, mode: bool = True) -> View:
        """Training or eval mode; statistics that the task does not train stay in eval mode."""
        self.training = mode
        self._structure.set_mode(mode, self._writable)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone output of the bound task, with the signature of the base.

        Raises:
            LeaseError: another forward of this view is running.
            PlanError: the parent of an adapter's site never calls it.
        """
        call = Call()
        if torch.compiler.is_compiling():
            self._structure.begin(call)
            return self.structure(*args, **kwargs)
        output = self._structure.run(args, kwargs, call)
        self.records = call.records
        return output

    def requires_grad_(self, requires_grad: bool = True) -> View:  # noqa: ARG002
        """Refused: the tensors are the model's.

        Raises:
            LeaseError: always.
        """
        raise LeaseError(
            "A view owns no tensors. To differentiate with respect to what it runs, bind tensors "
            "of your own: view.bind(model.tensors(task))."
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> View:  # noqa: ARG002
        raise LeaseError(
            "A view owns no tensors to move or convert. Move the model, model.to(...), and take a "
            "new view."
        )

    def __reduce__(self) -> NoReturn:
        raise LeaseError("A view is never copied or stored. Take a new one: model.view(task).")
