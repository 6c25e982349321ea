"""Patches: how one task changes one tensor of the base.

A patch is frozen data. It names the tensors that a task owns because of it (*keys*), says how they
start, and maps the base tensor and those own tensors to the tensor that the task uses. The map is
pure: nothing is edited in place, nothing is merged and un-merged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


class Patch(ABC):
    """Pure map from one base tensor and one task's own tensors to the tensor that the task uses.

    Implementations are frozen dataclasses whose fields are numbers, strings or booleans, so that a
    plan can be compared, pickled and written to a file.
    """

    needs_frozen_base: bool = False
    """True if the map is only right while the base tensor never trains."""

    @abstractmethod
    def keys(self, name: str) -> tuple[str, ...]:
        """The keys of the own tensors that this patch reads for the base tensor ``name``.

        Two patches may read one key, for instance one gate for the weight and the bias of a layer.
        """

    @abstractmethod
    def init(self, name: str, base: Tensor) -> dict[str, Tensor]:
        """The own tensors of a new task, by key.

        An ``nn.Parameter`` trains; a plain tensor is a buffer.

        Args:
            name: the base tensor's name.
            base: the base tensor, any shape; never returned itself.
        """

    @abstractmethod
    def compose(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor that the task uses in place of ``base``: same shape, pure, differentiable.

        Args:
            name: the base tensor's name.
            base: the shared tensor.
            tensors: the task's own tensors and the plan's created shared tensors, by key.
        """

    @abstractmethod
    def harden(
        self, name: str, base: Tensor, tensors: Mapping[str, Tensor]
    ) -> tuple[Patch | None, dict[str, Tensor]]:
        """What remains of the patch once training is over, for storing and serving.

        Returns:
            The patch to use from now on with its own tensors, or ``(None, {})`` if the task shares
            the base tensor after all.
        """

    def check_shared(self, name: str, shared: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Refuse a task whose model lacks created tensors that the patch reads.

        Args:
            name: the base tensor's name.
            shared: the tensors that the model's plan created, by key.

        Raises:
            PlanError: one is not there, or is of another shape.
        """

    def anchored(self, name: str) -> tuple[str, ...]:  # noqa: ARG002
        """Keys of own tensors that weight decay pulls towards the base tensor, not towards zero."""
        return ()

    def gate_score(self, tensors: Mapping[str, Tensor]) -> float | None:  # noqa: ARG002
        """The score of the patch's gate, or None if it has no gate; kept after hardening."""
        return None


@dataclass(frozen=True)
class Replace(Patch):
    """The task owns the whole tensor; it starts as a copy of the base's.

    Args:
        anchor: whether weight decay pulls it towards the base's tensor instead of zero.
    """

    anchor: bool = False

    def anchored(self, name: str) -> tuple[str, ...]:
        return (name,) if self.anchor else ()

    def keys(self, name: str) -> tuple[str, ...]:
        return (name,)

    def init(self, name: str, base: Tensor) -> dict[str, Tensor]:
        value = base.detach().clone()
        if isinstance(base, nn.Parameter):
            trains = value.is_floating_point() or value.is_complex()
            value = nn.Parameter(value, requires_grad=trains)
        return {name: value}

    def compose(self, name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        return tensors[name]

    def harden(
        self,
        name: str,
        base: Tensor,  # noqa: ARG002
        tensors: Mapping[str, Tensor],
    ) -> tuple[Patch | None, dict[str, Tensor]]:
        return self, {name: tensors[name]}
