"""How a comparison was done, as a paragraph for a paper, and the works that it cites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weft.citations import Citation
from weft.comparing import Fleet
from weft.comparing.config import MethodChoice
from weft.registry import METHODS

Rows = Sequence[Mapping[str, Any]]


def cited(rows: Rows) -> list[Citation]:
    """The works behind the methods of a comparison, each once."""
    methods = dict.fromkeys(row["method"] for row in rows)
    works = [METHODS[m].citation for m in methods if m in METHODS]
    return list(dict.fromkeys(work for work in works if work is not None))


def bibtex(rows: Rows) -> str:
    """Their BibTeX entries."""
    return "\n\n".join(work.bibtex for work in cited(rows))


def paragraph(rows: Rows, tasks: Sequence[str], seeds: Sequence[int], fleet: Fleet | None) -> str:
    """What was compared and how, in sentences that state only what is known.

    Args:
        rows: of the comparison's table.
        tasks: names.
        seeds: of training.
        fleet: the comparison, if its folder is there.
    """
    methods = dict.fromkeys(row["method"] for row in rows)
    labels = dict.fromkeys(row["label"] for row in rows)
    named = [_named(method) for method in methods]
    versions = ", ".join(
        f"{name} {', '.join(sorted({str(row[name]) for row in rows if row.get(name)}))}"
        for name in ("weft", "torch")
    )
    sentences = [
        f"We compared {_listed(named)}, in {len(labels)} settings, on {_count(len(tasks), 'task')} "
        f"({', '.join(tasks)}) over one base network{_base(rows, fleet)}."
    ]
    if fleet is not None:
        sentences.append(_training(fleet))
    spread = (
        f"Scores are means over {len(seeds)} training seeds with their standard deviation"
        if len(seeds) > 1
        else "Each training was run with one seed"
    )
    sentences.append(
        f"{spread}. Epochs, methods and plans were selected on the validation split, and "
        f"{_reported(rows)}. Sizes count the tensors that a task owns, without heads."
    )
    sentences.append(f"All runs used {versions}.")
    return " ".join(sentences)


def _reported(rows: Rows) -> str:
    tested = [row["task"] for row in rows if row.get("test") is not None]
    if not tested:
        return "scores are reported on it as well, for there are no test data"
    untested = dict.fromkeys(row["task"] for row in rows if row["task"] not in tested)
    apart = f", but for {_listed([*untested])}, which have none" if untested else ""
    return f"scores are reported on the test split{apart}"


def _named(method: str) -> str:
    work = METHODS[method].citation if method in METHODS else None
    text = method.replace("_", " ")
    return f"{text} ({work.short})" if work is not None else text


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def _base(rows: Rows, fleet: Fleet | None) -> str:
    size = rows[0].get("base_parameters")
    name = "" if fleet is None else f", {fleet.comparison.base.name.split(':')[-1]}"
    return f"{name}, with {int(size):,} parameters" if size else name


def _training(fleet: Fleet) -> str:
    train, data = fleet.comparison.train, fleet.comparison.data
    text = f"Training took {_count(train.epochs, 'epoch')} with batches of {data.batch_size}"
    if train.lr is not None:
        text += f" at a learning rate of {train.lr:g}"
    differing: dict[str, list[str]] = {}
    for choice in fleet.comparison.methods:
        changed = choice.train.model_dump(exclude_unset=True)
        settings = ", ".join(f"{key} = {value}" for key, value in sorted(changed.items()))
        if settings:
            differing.setdefault(settings, []).append(choice.name.replace("_", " "))
    for settings, names in differing.items():
        text += f", with {settings} for {_listed(list(dict.fromkeys(names)))}"
    first = [_pretrained(choice) for choice in fleet.comparison.methods if choice.pretrain]
    split = f"Splits that the data did not have were drawn with seed {fleet.comparison.seed}"
    return " ".join([f"{text}.", *dict.fromkeys(first), f"{split}."])


def _pretrained(choice: MethodChoice) -> str:
    assert choice.pretrain is not None
    length = _count(choice.pretrain.epochs, "epoch")
    return (
        f"For {choice.name.replace('_', ' ')} the base was first trained on all of its tasks "
        f"together, for {length} at a learning rate of {choice.pretrain.lr:g}."
    )
