"""Reading an adapter folder of PEFT as a task."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from weft.adapters.low_rank import LowRank
from weft.core.checks import check_plan
from weft.core.model import MultiTaskModel, check_model
from weft.core.patch import Replace
from weft.core.sharing import Sharing
from weft.core.sites import canonical_names, named_tensors
from weft.core.state import TaskState
from weft.core.task import Task, check_task, check_task_name
from weft.errors import BankError, PlanError, close_matches
from weft.methods.lora import lora

from .contents import Contents, leaving, read_contents, without_copies
from .document import Described
from .layers import FACTORS, from_peft, names, refusal, shapes
from .places import Place, exactly, pattern_of, places
from .rules import adapted

Number = TypeVar("Number", int, float)


def load_peft(
    model: MultiTaskModel,
    name: str,
    path: str | os.PathLike[str],
    task: Task,
    *,
    prefix: str = "",
    leave: Sequence[str] = (),
) -> None:
    """Add a task that owns what an adapter folder of PEFT (LoRA) holds; no other task changes.

    Args:
        model: the model, over the base that the adapter was trained on.
        name: the task's name, usable as a folder's name.
        path: a folder with adapter_config.json and adapter_model.safetensors.
        task: head, loss and metric; PEFT's adapters hold no head of ours.
        prefix: the name of the model's base inside of PEFT's base, "" if they are the same module.
        leave: modules among ``modules_to_save`` that are not loaded, for instance a head that is
            outside of the model's base.

    Raises:
        BankError: a file is missing, damaged or incomplete: a layer that ``target_modules`` names,
            or a tensor of a module that was stored whole, is not there.
        PlanError: the adapter does not fit the base, or holds something that has no form here
            (DoRA, trained biases, starts that change the base), by name.
        TaskError: the name is taken or cannot be one.
        ConfigError: this is no model.
    """
    check_model("load_peft", model)
    check_task_name(name, model.tasks)
    check_task(task)
    if not isinstance(path, (str, os.PathLike)):
        raise BankError(f"path is a folder's name, found {path!r}.")
    contents = read_contents(Path(path), prefix, leave)
    if contents.described.modules_to_save:
        _check_tied(model.base, contents)
    contents = replace(contents, tensors=without_copies(model.base, contents))
    layers = _layers(model.base, contents)
    whole = _whole(model.base, contents)
    plan = _known(model, layers, whole) or _plan(model, contents.described, layers, whole)
    own = _own(model.base, plan, contents)
    model.install(name, TaskState(task, plan, plan.patches, own))


def _check_tied(base: nn.Module, contents: Contents) -> None:
    """Refuse what was stored whole and is tied in the base, where PEFT parts it from its twin."""
    names_of: dict[str, list[str]] = {}
    for name, first in canonical_names(base).items():
        names_of.setdefault(first, []).append(name)
    for name in (n for several in names_of.values() if len(several) > 1 for n in several):
        entry = contents.stored_by(name) if name in contents.tensors else ""
        if entry:
            raise PlanError(
                f"The adapter holds '{name}', which is tied to another layer's in the base and "
                "would have to part from it. Untie the base." + leaving(entry)
            )


def _layers(base: nn.Module, contents: Contents) -> dict[str, LowRank]:
    """By name, the layers that the adapter changes, and how.

    Raises:
        PlanError: one is not in the base, or PEFT computes it otherwise.
        BankError: the configuration and the tensors do not fit.
    """
    described, tensors = contents.described, contents.tensors
    sites = {n.removesuffix(end) for n in tensors for end in FACTORS if n.endswith(end)}
    if not sites:
        raise PlanError(f"{contents.file} holds no low rank factors.")
    modules = dict(base.named_modules())
    found = {}
    for site in sorted(sites):
        if site not in modules:
            raise PlanError(
                f"The adapter is for '{site}', which is no module of the base. If the base was a "
                "part of PEFT's, say under which name: prefix='name'."
                + close_matches(site, modules)
            )
        if reason := refusal(modules[site]):
            raise PlanError(_CANNOT.format(site, reason))
        a, b = _factor_names(site, modules[site])
        if missing := [name for name in (a, b) if name not in tensors]:
            raise BankError(f"{contents.file} lacks '{missing[0]}'. Save the adapter again.")
        full = contents.inside + site
        r = _by_pattern(described.rank_pattern, full, described.r)
        if tensors[a].dim() and len(tensors[a]) != r:
            rank = len(tensors[a])
            raise BankError(f"'{a}' has rank {rank}, its configuration says {r}. Save it again.")
        alpha = _by_pattern(described.alpha_pattern, full, described.alpha)
        found[site] = LowRank(r, alpha, described.dropout, described.rslora)
    for site in adapted(base, described, contents.inside):
        if site not in found:
            a, b = _factor_names(site, modules[site])
            raise BankError(
                f"{contents.file} lacks '{a}' and '{b}', though target_modules names the layer. "
                "Save the adapter again, or name only layers that it has."
            )
    return found


def _factor_names(site: str, layer: nn.Module) -> tuple[str, str]:
    a, b = names(layer)
    return f"{site}.{a}", f"{site}.{b}"


def _whole(base: nn.Module, contents: Contents) -> list[str]:
    """The tensors of modules that were stored whole.

    Raises:
        BankError: a part of such a module is missing.
    """
    if not contents.described.modules_to_save:
        return []
    known = canonical_names(base)
    for name in (name for name in base.state_dict() if name in known):
        entry = contents.stored_by(name)
        if entry and name not in contents.tensors:
            raise BankError(
                f"{contents.file} lacks '{name}', though modules_to_save names '{entry}'. "
                f"Save the adapter again, or keep the base's: leave=[{entry!r}]."
            )
    return [name for name, _ in named_tensors(base) if name in contents.tensors]


def _known(
    model: MultiTaskModel, layers: Mapping[str, LowRank], whole: Sequence[str]
) -> Sharing | None:
    """A plan of the model by which a task owns just this, if there is one."""
    patches = dict.fromkeys(whole, Replace())
    for plan in dict.fromkeys([model.sharing, *map(model.plan, model.task_names)]):
        plain = plan.only_owns and not plan.penalties
        if plain and dict(plan.adapters) == layers and dict(plan.patches) == patches:
            return plan
    return None


def _plan(
    model: MultiTaskModel,
    described: Described,
    layers: Mapping[str, LowRank],
    whole: Sequence[str],
) -> Sharing:
    """A new plan."""
    r, alpha = described.r, described.alpha
    plan = lora(
        model.base,
        r=r,
        alpha=alpha,
        dropout=described.dropout,
        target=exactly(layers, model.base),
        rslora=described.rslora,
        rank_pattern={pattern_of(n): one.r for n, one in layers.items() if one.r != r},
        alpha_pattern={pattern_of(n): o.alpha for n, o in layers.items() if o.alpha != alpha},
    )
    for name in (*plan.refused, *plan.patches):
        reason = plan.refused.get(name, "its class may do more than its weight says")
        raise PlanError(_CANNOT.format(name, reason))
    plan = replace(plan, patches=dict.fromkeys(whole, Replace()))
    check_plan(model.base, plan, model.sharing.train_shared)
    return plan


def _by_pattern(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    """What PEFT's patterns say of a name."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def _own(base: nn.Module, plan: Sharing, contents: Contents) -> dict[str, Tensor]:
    """The own tensors of the plan, from a file's."""
    left = dict(contents.tensors)
    of_base = dict(named_tensors(base))
    own: dict[str, Tensor] = {}
    for name in (n for n, patch in plan.patches.items() if isinstance(patch, Replace)):
        advice = leaving(contents.stored_by(name))
        own[name] = _fitting(name, left.pop(name), of_base[name], advice)
    for place in places(base, plan.adapters, plan.patches):
        pair = [left.pop(name) for name in place.tensors]
        own |= dict(zip(place.keys, _factors(place, pair), strict=True))
    if left:
        name = next(iter(left))
        advice = leaving(contents.stored_by(name)) or close_matches(name, of_base)
        raise PlanError(
            f"The adapter holds '{name}', which has no form here and is no tensor of the base."
            + (advice or " Save the adapter without it.")
        )
    return own


def _factors(place: Place, pair: Sequence[Tensor]) -> list[Tensor]:
    """The factors of a place as own tensors."""
    expected = shapes(place.layer, place.r)
    for name, tensor, shape in zip(place.tensors, pair, expected, strict=True):
        if tuple(tensor.shape) != shape:
            raise PlanError(_OTHER_SHAPE.format(name, tuple(tensor.shape), shape))
        if not tensor.is_floating_point():
            raise BankError(_OTHER_TYPE.format(name, tensor.dtype, "floating point numbers"))
    try:
        a, b = from_peft(place.layer, *pair)
    except PlanError as error:
        raise PlanError(_CANNOT.format(place.site, error)) from error
    dtype = next(place.layer.parameters()).dtype
    own: list[Tensor] = [nn.Parameter(tensor.to(dtype).clone()) for tensor in (a, b)]
    for name, factor in zip(place.tensors, own, strict=True):
        if not factor.isfinite().all():
            raise BankError(_NOT_FINITE.format(name, dtype))
    return own


def _fitting(name: str, tensor: Tensor, like: Tensor, advice: str) -> Tensor:
    """A whole tensor in place of the base's."""
    if tensor.shape != like.shape:
        shapes_ = (tuple(tensor.shape), tuple(like.shape))
        raise PlanError(_OTHER_SHAPE.format(name, *shapes_) + advice)
    if (tensor.is_floating_point(), tensor.is_complex()) != (
        like.is_floating_point(),
        like.is_complex(),
    ):
        raise BankError(_OTHER_TYPE.format(name, tensor.dtype, like.dtype) + advice)
    value = tensor.to(like.dtype).clone()
    # A mask among the base's buffers may be infinite itself.
    if (~value.isfinite() & like.isfinite().to(value.device)).any():
        raise BankError(_NOT_FINITE.format(name, like.dtype) + advice)
    if isinstance(like, nn.Parameter) and value.is_floating_point():
        return nn.Parameter(value)
    return value


_CANNOT = "The adapter's layer '{}' cannot be adapted here: {}."

_OTHER_SHAPE = (
    "'{}' of the adapter has the shape {}, the base asks for {}. It belongs to another base."
)

_OTHER_TYPE = "'{}' of the adapter is of {}, expected {}. It is damaged: save the adapter again."

_NOT_FINITE = (
    "'{}' of the adapter holds numbers that are not finite as {}. Its training may have diverged: "
    "take an earlier state of it."
)
