"""What the head of a comparison's page says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from .compared import Answer
from .numbers import bytes_text, metric_text, spread_text
from .plan_figure import Choice

OPEN_OWNERS = 20
"""A plan of more tasks is told by method first, and task by task in a folded table."""


def answer_texts(answer: Answer) -> dict[str, Any]:
    """The plan in words and numbers, for the template."""
    plan, single = answer.at.plan, answer.at.single
    return {
        "budget": bytes_text(answer.budget),
        "takes": bytes_text(plan.bytes),
        "chosen_by": answer.chosen_by,
        "plan": _said(answer, plan),
        "plan_val": metric_text(answer.metric, plan.val),
        "single": None if single is None else single.said,
        "single_score": None if single is None else _said(answer, single),
        "single_bytes": None if single is None else bytes_text(single.bytes),
        "whole": None if answer.whole is None else answer.whole.said,
        "whole_score": None if answer.whole is None else _said(answer, answer.whole),
        "whole_bytes": None if answer.whole is None else bytes_text(answer.whole.bytes),
        "same": single is not None and {o.label for o in answer.owners} == {single.said},
        "by_method": _by_method(answer) if len(answer.owners) > OPEN_OWNERS else "",
        "verdict": verdict(answer),
        "metric": answer.metric,
        "split": answer.split,
        "of": answer.of,
        "shared": bytes_text(answer.shared_bytes) if answer.shared_bytes else "",
        "owners": [
            {
                "task": o.task,
                "label": o.label,
                "together": _others(o.together),
                "bytes": bytes_text(o.own_bytes),
                "bytes_value": o.own_bytes,
                "metric": o.metric,
                "val": metric_text(o.metric, o.val),
                "val_value": o.val,
                "test": "–" if o.test is None else metric_text(o.metric, o.test),
                "test_value": "" if o.test is None else o.test,
                "spread": spread_text(o.metric, o.spread),
            }
            for o in answer.owners
        ],
    }


def _by_method(answer: Answer) -> str:
    counts = Counter(owner.label for owner in answer.owners).most_common()
    return ", ".join(f"{label} for {n} task{'s' if n > 1 else ''}" for label, n in counts)


def _others(tasks: Sequence[str]) -> str:
    return ", ".join(tasks) if len(tasks) < 3 else f"{len(tasks)} other tasks"


def _said(answer: Answer, choice: Choice) -> str:
    text = metric_text(answer.metric, choice.test)
    return text + spread_text(answer.metric, choice.spread)


def verdict(answer: Answer) -> str:
    """Whether plans beat the best single method on test, over the budgets of the curve.

    A difference counts as one if it is larger than the standard deviation over seeds of either.
    """
    pairs = [(b.plan, b.single) for b in answer.budgets if b.single is not None]
    if not pairs:
        return "No single method covers all tasks, so there is nothing to compare the plan with."
    sign = 1.0 if answer.higher_is_better else -1.0
    gains = [
        (sign * (plan.test - single.test), max(plan.spread or 0.0, single.spread or 0.0))
        for plan, single in pairs
    ]
    better = sum(gain > spread for gain, spread in gains)
    worse = sum(gain < -spread for gain, spread in gains)
    same = len(gains) - better - worse
    gain = sum(gain for gain, _ in gains) / len(gains)
    points = f"{100 * gain:+.1f} points" if "accuracy" in answer.metric else f"{gain:+.3g}"
    count = f"{len(gains)} budgets" if len(gains) > 1 else "the one budget"
    return (
        f"Over {count}, a method for each task scores better on {answer.split} than the best "
        f"single method that fits at {better}, the same within the spread at {same}, and worse "
        f"at {worse}; {points} on average."
    )
