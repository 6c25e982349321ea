"""Checks of a plan against the base that it is for."""

from __future__ import annotations

from torch import Tensor, nn

from weft.errors import PlanError, close_matches

from .masks import shared_key
from .sharing import Sharing
from .sites import canonical_names, check_names, named_tensors
from .structure import SLOT


def check_plan(base: nn.Module, sharing: Sharing, trained: frozenset[str] = frozenset()) -> None:
    """Refuse a plan that does not fit.

    Args:
        base: the base.
        sharing: the plan.
        trained: names of base tensors that train in the model by another plan.

    Raises:
        PlanError: says which name is unknown, tied, taken or trained.
    """
    if not isinstance(sharing, Sharing):
        raise PlanError(
            "A plan is what a method makes of a base, for instance weft.taps(base); "
            f"found {type(sharing).__name__}."
        )
    canonical = canonical_names(base)
    check_names(sharing.patches, canonical, f"'{sharing.method}' patches")
    check_names(sharing.train_shared, canonical, f"'{sharing.method}' trains")
    for name in (*sharing.patches, *sharing.train_shared):
        if canonical[name] != name:
            raise PlanError(f"'{name}' is tied to '{canonical[name]}'; use that name in the plan.")
    for name, patch in sharing.patches.items():
        if patch.needs_frozen_base and name in trained | sharing.train_shared:
            raise PlanError(
                f"The patch of '{name}' by '{sharing.method}' is only right over a frozen base, "
                "but that tensor trains for all tasks. Use the residual form."
            )
    for name in sharing.masked:
        if name not in sharing.train_shared or shared_key(name) not in sharing.created:
            raise PlanError(
                f"'{sharing.method}' masks '{name}', which must train for all tasks and have a "
                f"created mask '{shared_key(name)}'."
            )
    for key in sharing.created:
        if key in canonical:
            raise PlanError(f"'{sharing.method}' creates '{key}', which is a tensor of the base.")
    modules = dict(base.named_modules())
    for site in sharing.adapters:
        if not site or site not in modules:
            raise PlanError(
                f"'{sharing.method}' inserts at '{site}', which is no module inside the base."
                + close_matches(site, modules)
            )


def adapter_tensors(
    base: nn.Module, sharing: Sharing
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Initial own and shared tensors of a plan's adapters, by key.

    Args:
        base: the base.
        sharing: a plan that fits it.
    """
    own: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for site, insertion in sharing.adapters.items():
        adapter = insertion.build(base.get_submodule(site))
        common = adapter.shared_names()
        for name, tensor in named_tensors(adapter):
            (shared if name in common else own)[site + SLOT + name] = tensor
    return own, shared
