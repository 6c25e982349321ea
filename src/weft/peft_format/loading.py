"""Reading an adapter folder of PEFT as a task."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from weft.adapters.low_rank import LowRank
from weft.core.checks import check_plan
from weft.core.model import MultiTaskModel
from weft.core.patch import Replace
from weft.core.sharing import Sharing
from weft.core.sites import named_tensors
from weft.core.state import TaskState
from weft.core.task import Task, check_task, check_task_name
from weft.errors import BankError, PlanError, close_matches
from weft.methods.lora import lora

from .document import TENSORS, Described, read_config
from .layers import EMBEDDING, LINEAR, PREFIX, from_peft, refusal, shapes
from .places import Place, exactly, pattern_of, places

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
        BankError: a file is missing or damaged.
        PlanError: the adapter does not fit the base, or holds something that has no form here
            (DoRA, trained biases, starts that change the base), by name.
        TaskError: the name is taken or cannot be one.
    """
    check_task_name(name, model.tasks)
    check_task(task)
    folder = Path(path)
    described = read_config(folder)
    tensors = _named(_tensors(folder / TENSORS), prefix, _left(described, leave, folder))
    layers = _layers(model.base, described, tensors, folder, prefix)
    whole = [name for name, _ in named_tensors(model.base) if name in tensors]
    plan = _known(model, layers, whole) or _plan(model, described, layers, whole)
    own = _own(model.base, plan, tensors, folder)
    model.install(name, TaskState(task, plan, plan.patches, own))


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BankError(
            f"{path} cannot be read: {error.strerror or error}. PEFT writes it with "
            "save_pretrained(..., safe_serialization=True); pickled files are not loaded."
        ) from error
    try:
        found: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise BankError(f"{path} is damaged: {error}. Save the adapter again.") from error
    return found


def _left(described: Described, leave: Sequence[str], folder: Path) -> tuple[str, ...]:
    for module in leave:
        if module not in described.modules_to_save:
            raise PlanError(
                f"leave: '{module}' is not among modules_to_save of {folder}, which are "
                f"{list(described.modules_to_save)}."
                + close_matches(module, described.modules_to_save)
            )
    return tuple(leave)


def _named(tensors: Mapping[str, Tensor], prefix: str, left: Iterable[str]) -> dict[str, Tensor]:
    """The tensors by their names inside of the model's base.

    Raises:
        PlanError: a tensor is outside of it.
    """
    start = f"{prefix}." if prefix else ""
    found = {}
    for name, tensor in tensors.items():
        inside = name.removeprefix(PREFIX)
        if any(re.fullmatch(rf"(.*\.)?{re.escape(module)}\..*", inside) for module in left):
            continue
        if not inside.startswith(start):
            raise PlanError(
                f"The adapter holds '{inside}', which is not inside of '{prefix}'. A head that was "
                "saved with the adapter can be left out: leave=[...]."
            )
        found[inside.removeprefix(start)] = tensor
    return found


def _layers(
    base: nn.Module, described: Described, tensors: Mapping[str, Tensor], folder: Path, prefix: str
) -> dict[str, LowRank]:
    """By name, the layers that the adapter changes, and how.

    Raises:
        PlanError: one is not in the base, or PEFT computes it otherwise.
        BankError: the configuration and the tensors do not fit.
    """
    ranks = {
        name.removesuffix(f".{ending}"): tensor.shape[0]
        for name, tensor in tensors.items()
        for ending in (LINEAR[0], EMBEDDING[0])
        if name.endswith(f".{ending}")
    }
    if not ranks:
        raise PlanError(f"{folder / TENSORS} holds no low rank factors.")
    modules = dict(base.named_modules())
    start = f"{prefix}." if prefix else ""
    found = {}
    for site, r in sorted(ranks.items()):
        if site not in modules:
            raise PlanError(
                f"The adapter is for '{site}', which is no module of the base. If the base was a "
                "part of PEFT's, say under which name: prefix='name'."
                + close_matches(site, modules)
            )
        if reason := refusal(modules[site]):
            raise PlanError(_CANNOT.format(site, reason))
        asked = _by_pattern(described.rank_pattern, start + site, described.r)
        if asked != r:
            raise BankError(f"'{site}' of {folder} has rank {r}, its configuration says {asked}.")
        alpha = _by_pattern(described.alpha_pattern, start + site, described.alpha)
        found[site] = LowRank(r, alpha, described.dropout, described.rslora)
    return found


def _known(
    model: MultiTaskModel, layers: Mapping[str, LowRank], whole: Sequence[str]
) -> Sharing | None:
    """A plan of the model by which a task owns just this, if there is one."""
    patches = dict.fromkeys(whole, Replace())
    for plan in dict.fromkeys([model.sharing, *map(model.plan, model.task_names)]):
        if plan.only_owns and dict(plan.adapters) == layers and dict(plan.patches) == patches:
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


def _own(
    base: nn.Module, plan: Sharing, tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """The own tensors of the plan, from a file's."""
    left = dict(tensors)
    of_base = dict(named_tensors(base))
    own: dict[str, Tensor] = {}
    for name in (n for n, patch in plan.patches.items() if isinstance(patch, Replace)):
        own[name] = _fitting(name, left.pop(name), of_base[name])
    for place in places(base, plan.adapters, plan.patches):
        pair = []
        for tensor_name in place.tensors:
            if tensor_name not in left:
                raise BankError(f"{folder / TENSORS} lacks '{tensor_name}'. Save it again.")
            pair.append(left.pop(tensor_name))
        own |= dict(zip(place.keys, _factors(place, pair), strict=True))
    if left:
        raise PlanError(
            f"The adapter holds '{next(iter(left))}', which has no form here and is no tensor of "
            "the base. What was saved whole, outside of the base, can be left out: leave=[...]."
        )
    return own


def _factors(place: Place, pair: Sequence[Tensor]) -> list[Tensor]:
    """The factors of a place as own tensors."""
    expected = shapes(place.layer, place.r)
    for name, tensor, shape in zip(place.tensors, pair, expected, strict=True):
        if tuple(tensor.shape) != shape:
            raise PlanError(_OTHER_SHAPE.format(name, tuple(tensor.shape), shape))
    try:
        a, b = from_peft(place.layer, *pair)
    except PlanError as error:
        raise PlanError(_CANNOT.format(place.site, error)) from error
    dtype = next(place.layer.parameters()).dtype
    return [nn.Parameter(tensor.to(dtype).clone()) for tensor in (a, b)]


def _fitting(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in place of the base's."""
    if tensor.shape != like.shape:
        raise PlanError(_OTHER_SHAPE.format(name, tuple(tensor.shape), tuple(like.shape)))
    value = tensor.to(like.dtype).clone()
    if isinstance(like, nn.Parameter) and value.is_floating_point():
        return nn.Parameter(value)
    return value


_CANNOT = "The adapter's layer '{}' cannot be adapted here: {}."

_OTHER_SHAPE = (
    "'{}' of the adapter has the shape {}, the base asks for {}. It belongs to another base; what "
    "was saved whole can be left out: leave=[...]."
)
