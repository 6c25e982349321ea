"""Several tasks made into one set of tensors: an ordinary base that serves all their heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import nn

from weft.core.model import MultiTaskModel
from weft.core.options import Options, is_number
from weft.errors import ConfigError

from .choosing import SCALES, try_scales, warnings
from .concrete import concrete
from .merged import Merged, merged_model
from .options import check_data, check_rereadable
from .rules import Rule, ties, total
from .source import Source, check_source, chosen_tasks, opened
from .vectors import Base, Vector, base_of, precise, refuse_complex, task_tensors, task_vectors

DENSITY = 0.2
"""Share of the entries of a task that ties keeps, if nothing is said."""


def merge(
    source: Source,
    tasks: Iterable[str] | str | None = None,
    *,
    base: nn.Module | None = None,
    how: Rule | Literal["concrete"] = "task_arithmetic",
    scale: float | Literal["choose"] | None = None,
    data: Mapping[str, Any] | None = None,
    scales: Sequence[float] | None = None,
    density: float | None = None,
    progress: bool = True,
) -> Merged:
    """Merge what tasks own into one base; without training, but for "concrete".

    With tau_t = theta_t - theta_0 the vector of task t, the merged base is theta_0 + scale * d with

    - average: d = mean_t tau_t, and scale 1;
    - task_arithmetic: d = sum_t tau_t (Ilharco et al., ICLR 2023);
    - ties: d of `ties` (Yadav et al., NeurIPS 2023);
    - concrete: `weft.merging.concrete` on ``data`` with its defaults.

    Running statistics are averaged, with scale 1, by every rule; whole numbers stay the base's.
    Vectors are read one at a time, but for "concrete": beyond the tasks themselves, memory does not
    grow with their number. One task merged by the first three rules is that task, bit for bit, at
    scale 1: with nothing to interfere, ties trims nothing.

    Args:
        source: holds the tasks: a model, which is not changed, or a bank, loaded as by
            ``bank.load(base, *tasks)``.
        tasks: which to merge, or the name of one; default all.
        base: of a bank, the module that its tasks were trained on.
        how: the rule.
        scale: of d; "choose" tries ``scales`` on ``data``. Default: 1 for "average" and a single
            task, else "choose" if there is data and 0.3 (task_arithmetic) or 1 (ties) if not.
        data: by task, batches; to choose a scale, of validation data, never of test data.
        scales: what "choose" tries, finite numbers; default `SCALES`. The first of the best mean
            score over tasks is taken, NaN being worst; where the tasks' first metrics differ, that
            of the least sum of losses, as in `fit`.
        density: share of entries that "ties" keeps of each of several tasks, in (0, 1]; default
            0.2.
        progress: whether "concrete" shows its progress, on standard error.

    Returns:
        The merged model, and for a chosen scale the scores of all candidates, with those of task
        arithmetic beside them.

    Raises:
        TaskError: an unknown task.
        BankError: the bank's tasks cannot be loaded onto the base.
        PlanError: a task has no plain form of the base's class.
        ConfigError: an option out of range, or one that "concrete" has no use for.
        DataError: a scale is to be chosen, or a mask learned, without data of every task; or no
            candidate has a score that is a number.
        TrainingError: as for `concrete`.
    """
    check_source("merge", source, base)
    names = chosen_tasks(source, tasks)
    given = Options("merge", ConfigError)
    given.word("how", how, ("average", "task_arithmetic", "ties", "concrete"))
    if how == "concrete":
        _refuse_for_concrete({"scale": scale, "scales": scales, "density": density})
        check_data("merge", data, names)
        assert data is not None
        return concrete(source, data, names, base=base, progress=progress)
    candidates = SCALES if scales is None else _numbers(scales)
    share = DENSITY if density is None else density
    given.number("density", share, "(0, 1]")
    wanted = _wanted(how, scale, data, len(names))
    if wanted is None:
        check_data("merge", data, names)
        assert data is not None
        check_rereadable(data, names)
    if density is not None and how != "ties":
        raise ConfigError(f"merge(density=...) is for how='ties'; {how!r} keeps every entry.")
    if scales is not None and wanted is not None and len(names) > 1:
        raise ConfigError(
            f"merge(scales=...) is what scale='choose' tries on data; here the scale is "
            f"{wanted:g}. Give scale='choose' and data={{task: batches, ...}}."
        )
    model = opened(source, names, base)
    start = base_of(model)
    if how == "ties":
        refuse_complex(start, how)
    merging = _Merging(model, names, start, how, share)
    if wanted is not None:
        return Merged(merging.at(wanted), how, wanted)
    assert data is not None
    validation = {task: data[task] for task in names}
    tried = try_scales(merging.at, candidates, validation)
    best = tried.best  # before the baseline, whose work is for nothing if there is none
    baseline = None
    if how != "task_arithmetic":
        plain = replace(merging, how="task_arithmetic")
        baseline = try_scales(plain.at, candidates, validation)
    merged = merging.at(best)
    return Merged(
        merged,
        how,
        best,
        scores=tried.scores,
        means=tried.means,
        baseline={} if baseline is None else baseline.scores,
        baseline_means={} if baseline is None else baseline.means,
        warnings=warnings(merged, tried, baseline),
    )


def _refuse_for_concrete(options: Mapping[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(
            f"merge(how='concrete') has no use for {', '.join(given)}: it learns a mask with the "
            "defaults of weft.merging.concrete. Leave it out, or call "
            "weft.merging.concrete(model, data, ...), which has options of its own."
        )


def _numbers(scales: object) -> tuple[float, ...]:
    """The candidates for the scale."""
    found = tuple(scales) if isinstance(scales, Iterable) and not isinstance(scales, str) else ()
    if not found or not all(map(is_number, found)):
        raise ConfigError(f"merge(scales=...) is a list of finite numbers, found {scales!r}.")
    return tuple(map(float, found))


def _wanted(how: str, scale: object, data: Mapping[str, Any] | None, count: int) -> float | None:
    """The scale, or None where it is to be chosen."""
    if scale is None:
        if how == "average" or count == 1:
            return 1.0
        return None if data is not None else 1.0 if how == "ties" else 0.3
    if isinstance(scale, str) and scale == "choose":
        return None
    Options("merge", ConfigError).number("scale", scale, also="or 'choose'")
    return float(scale)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Merging:
    """What is merged, by which rule, and the share of entries that ties keeps."""

    model: MultiTaskModel
    names: tuple[str, ...]
    base: Base
    how: str
    density: float

    @cached_property
    def direction(self) -> Vector:
        """What the rule adds to the base: of parameters its direction, of statistics their mean."""
        summed, count = total(self._vectors)
        found = {name: summed[name] / count for name in self.base.statistics}
        if self.how == "ties" and count > 1:  # one task alone has nothing to be trimmed for
            return found | ties(self._parameters, self.density)
        divide = count if self.how == "average" else 1
        return found | {name: summed[name] / divide for name in self.base.parameters}

    def at(self, scale: float) -> MultiTaskModel:
        """The model whose base went so far in the direction; its statistics go all the way."""
        if len(self.names) == 1 and scale == 1.0:
            # The task itself: theta_0 + (theta_t - theta_0) would round.
            return self._merged(task_tensors(self.model, self.names[0], self.base))
        steps = {name: scale * self.direction[name] for name in self.base.parameters}
        steps |= {name: self.direction[name] for name in self.base.statistics}
        start = {**self.base.parameters, **self.base.statistics}
        return self._merged({n: (precise(t) + steps[n]).to(t.dtype) for n, t in start.items()})

    def _merged(self, tensors: Vector) -> MultiTaskModel:
        return merged_model(self.model, self.names, tensors)

    def _vectors(self) -> Iterator[tuple[str, Vector]]:
        return task_vectors(self.model, self.names, self.base)

    def _parameters(self) -> Iterator[tuple[str, Vector]]:
        for task, vector in self._vectors():
            yield task, {name: vector[name] for name in self.base.parameters}
