"""Tasks in an experiment's file: every kind, with errors that name the key."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from weft.assembly import make_task
from weft.config import TaskSection, check
from weft.data import TaskData
from weft.errors import ConfigError
from weft.tasks import KINDS


def content(**task: Any) -> dict[str, Any]:
    """A file with one task."""
    return {"base": {"name": "x"}, "method": "taps", "tasks": {"a": {"data": "x", **task}}}


def test_the_file_knows_every_kind() -> None:
    assert get_args(TaskSection.model_fields["kind"].annotation) == tuple(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_makes_a_task_of_its_kind(kind: str) -> None:
    counted = {} if kind in ("depth", "surface_normals") else {"classes": 3}
    section = check(content(kind=kind, **counted)).tasks["a"]
    spec = make_task("a", section, TaskData(train=None)).spec
    assert spec is not None
    assert spec["kind"] == kind
    numbers = [v for k, v in spec.items() if k in ("classes", "labels", "targets", "channels")]
    assert numbers == list(counted.values())


def test_options_reach_the_task() -> None:
    section = check(content(kind="depth", options={"minimum": 0.1, "head": "aspp"})).tasks["a"]
    spec = make_task("a", section, TaskData(train=None)).spec
    assert spec is not None
    assert (spec["minimum"], spec["head"]) == (0.1, "aspp")


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        (
            {"options": {"smothing": 0.1}},
            r"tasks\.a\.options: .*no option 'smothing'\. Close matches: smoothing\.$",
        ),
        ({"kind": "depth", "options": {"size": 3}}, "'size'. Options: minimum, variant, head"),
        ({"kind": "dept"}, r"tasks\.a\.kind: found 'dept', expected .*'depth'"),
    ],
)
def test_misspelt_options_and_kinds_are_named_before_any_work(
    task: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check(content(**task))


def test_a_count_for_a_kind_without_one_is_refused() -> None:
    section = check(content(kind="depth", classes=3)).tasks["a"]
    with pytest.raises(ConfigError, match=r"tasks\.a\.classes: 'depth' has none"):
        make_task("a", section, TaskData(train=None))
