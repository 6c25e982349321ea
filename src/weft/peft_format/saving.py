"""Writing a task as an adapter folder of PEFT."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from weft.adapters.low_rank import is_turned
from weft.core.model import MultiTaskModel, check_model
from weft.core.patch import Patch, Replace
from weft.core.sites import canonical_names, named_tensors
from weft.errors import ExportError, PlanError, TaskError, close_matches
from weft.exporting.files import check_place, write_whole

from .document import CONFIG, TENSORS, Described, config_text
from .layers import PREFIX, to_peft
from .places import Place, exactly, pattern_of, places
from .rules import stored_by


def save_peft(
    model: MultiTaskModel,
    task: str,
    path: str | os.PathLike[str],
    *,
    prefix: str = "",
    base_name: str | None = None,
) -> Path:
    """Write what a task of `lora` owns as an adapter folder that PEFT loads.

    The head is no part of an adapter: ``weft.export(model, task, path)`` writes it.

    Args:
        model: the model.
        task: the name of a task whose own tensors are low rank, or whole modules.
        path: a folder, made if it is missing; files of that name in it are replaced.
        prefix: the name of the model's base inside of PEFT's base, "" if they are the same module.
        base_name: where PEFT's users find the base: a name on the hub or a folder.

    Returns:
        The folder.

    Raises:
        TaskError: no such task.
        PlanError: the task owns something that PEFT's LoRA has no form for, by name.
        ExportError: the folder cannot be written.
        ConfigError: this is no model.
    """
    check_model("save_peft", model)
    if not isinstance(path, (str, os.PathLike)):
        raise ExportError(f"path is a folder's name, found {path!r}.")
    if task not in model.task_names:
        hint = close_matches(str(task), model.task_names)
        raise TaskError(f"There is no task '{task}'. Tasks: {', '.join(model.task_names)}.{hint}")
    plan, state = model.plan(task), model.tasks[task]
    # Created tensors, such as BoRA's mean, are read by none of the patches that `places` takes.
    if plan.train_shared or any(one.trains_shared for one in plan.adapters.values()):
        raise PlanError(
            f"'{plan.method}' trains tensors that tasks share and run with, which an adapter of "
            "PEFT does not hold. Fold the task instead: model.fold(task)."
        )
    own = state.own.to_dict()
    found = list(places(model.base, plan.adapters, state.patches))
    if not found:
        raise PlanError(f"'{task}' owns no low rank ('{plan.method}'), so it is no LoRA of PEFT.")
    tensors: dict[str, Tensor] = {}
    for place in found:
        pair = to_peft(place.layer, *(own[key].detach() for key in place.keys))
        tensors |= dict(zip(place.tensors, pair, strict=True))
    whole = _whole_modules(model.base, state.patches)
    inside = f"{prefix}." if prefix else ""
    tensors |= _stored_alike(model.base, [f"{inside}{name}" for name in whole], inside, found)
    tensors |= {name: own[name].detach() for names in whole.values() for name in names}
    targets = exactly([place.site for place in found], model.base, inside)
    described = replace(_described(found, whole, inside), target_modules=targets)
    content = {f"{PREFIX}{inside}{n}": t.cpu().contiguous() for n, t in tensors.items()}
    folder = Path(path)
    check_place(folder / TENSORS)
    write_whole(folder / TENSORS, save(content, metadata={"format": "pt"}))
    text = config_text(described, base_name)
    write_whole(folder / CONFIG, text.encode())
    return folder


def _described(found: Sequence[Place], whole: Iterable[str], inside: str) -> Described:
    """The configuration of some places: what most have in common, and the others.

    Raises:
        PlanError: they differ in what PEFT has one value for.
    """
    for option in ("dropout", "rslora"):
        if len({getattr(place.here, option) for place in found}) > 1:
            raise PlanError(f"The task's layers differ in {option}, for which PEFT has one value.")
    ranks = {f"{inside}{place.site}": place.r for place in found}
    alphas = {f"{inside}{place.site}": place.alpha for place in found}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return Described(
        r=r,
        alpha=alpha,
        dropout=found[0].here.dropout,
        rslora=found[0].here.rslora,
        rank_pattern={pattern_of(n): v for n, v in ranks.items() if v != r},
        alpha_pattern={pattern_of(n): v for n, v in alphas.items() if v != alpha},
        modules_to_save=tuple(f"{inside}{name}" for name in whole),
        turned=any(is_turned(place.layer) for place in found),
    )


def _whole_modules(base: nn.Module, patches: Mapping[str, Patch]) -> dict[str, list[str]]:
    """By module, the tensors in it, of modules that the task owns as a whole.

    Raises:
        PlanError: it owns a part of a module, or what another layer uses too.
    """
    owned = {name for name, patch in patches.items() if isinstance(patch, Replace)}
    names = [name for name, _ in named_tensors(base)]
    twins = {first: name for name, first in canonical_names(base).items() if name != first}
    found: dict[str, list[str]] = {}
    for name in sorted(owned):
        module = name.rpartition(".")[0]
        inside = [other for other in names if other.startswith(f"{module}.") or not module]
        if not module or not owned.issuperset(inside):
            raise PlanError(
                f"The task owns '{name}' and not all of its module. PEFT stores whole modules only."
            )
        if name in twins:
            raise PlanError(
                f"The task owns '{name}', which is tied to '{twins[name]}'. PEFT would part them. "
                "Fold the task instead: model.fold(task)."
            )
        found[module] = inside
    return found


def _stored_alike(
    base: nn.Module, entries: Sequence[str], inside: str, found: Sequence[Place]
) -> dict[str, Tensor]:
    """The base's tensors in all modules that PEFT stores, since their names end as entries do.

    Raises:
        PlanError: one of them is adapted, or around what is.
    """
    for place in found:
        if entry := stored_by(f"{inside}{place.site}.", entries):
            raise PlanError(
                f"'{place.site}' is adapted, and '{entry}' is owned as a whole. PEFT stores all "
                "modules whose names end so and adapts none of them. Fold the task instead: "
                "model.fold(task)."
            )
    tensors, stored = dict(named_tensors(base)), base.state_dict()
    return {
        n: t.detach() for n, t in tensors.items() if n in stored and stored_by(inside + n, entries)
    }
