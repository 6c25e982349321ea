"""The rows of the page's tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .compare import Summary
from .numbers import bytes_text, count_text, metric_text, percent_text, spread_text
from .records import TaskReport

Row = dict[str, Any]


def task_rows(reports: Sequence[TaskReport], names: Sequence[str]) -> list[Row]:
    """One row per task: what is shown, and the values by which columns sort."""
    rows = []
    for r, name in zip(reports, names, strict=True):
        led = r.ledger
        opened, gates = led.open_gates
        others = [f"{n} {metric_text(n, v)}" for n, v in list(r.metrics.items())[1:]]
        rows.append(
            {
                "name": name,
                "method": r.method,
                "gates": f"{opened} of {gates}" if gates else "–",
                "gates_value": opened / gates if gates else -1,
                "parameters": count_text(led.own_parameters),
                "parameters_value": led.own_parameters,
                "fraction": percent_text(led.own_fraction),
                "fraction_value": led.own_fraction,
                "buffers": count_text(led.own_buffers),
                "buffers_value": led.own_buffers,
                "head": count_text(led.head_parameters),
                "head_value": led.head_parameters,
                "bytes": bytes_text(led.own_bytes),
                "bytes_value": led.own_bytes,
                "stored": bytes_text(led.own_bytes + led.head_bytes),
                "stored_value": led.own_bytes + led.head_bytes,
                "metric": r.primary[0] if r.primary else "",
                "score": metric_text(*r.primary) if r.primary else "–",
                "score_value": r.primary[1] if r.primary else "",
                "others": others,
            }
        )
    return rows


def totals_row(reports: Sequence[TaskReport]) -> Row:
    """The sums under the tasks' table."""
    ledgers = [r.ledger for r in reports]
    own = sum(led.own_bytes for led in ledgers)
    parameters = sum(led.own_parameters for led in ledgers)
    return {
        "parameters": count_text(parameters),
        "fraction": percent_text(parameters / max(sum(led.base_parameters for led in ledgers), 1)),
        "buffers": count_text(sum(led.own_buffers for led in ledgers)),
        "head": count_text(sum(led.head_parameters for led in ledgers)),
        "bytes": bytes_text(own),
        "stored": bytes_text(own + sum(led.head_bytes for led in ledgers)),
    }


def comparison_rows(summaries: Sequence[Summary], front: Sequence[Summary]) -> list[Row]:
    """One row per method, the best score first, those without a complete seed last."""
    placed = sorted(
        (s for s in summaries if s.runs),
        key=lambda s: -s.score if s.higher_is_better else s.score,
    )
    on_front = {s.method for s in front}
    rows: list[Row] = []
    for s in [*placed, *(s for s in summaries if not s.runs)]:
        rows.append(
            {
                "method": s.method,
                "score": metric_text(s.metric, s.score) if s.runs else "–",
                "spread": spread_text(s.metric, s.spread) if s.runs else "",
                "score_value": s.score if s.runs else "",
                "bytes": bytes_text(s.own_bytes) if s.runs else "–",
                "bytes_value": s.own_bytes if s.runs else "",
                "fraction": percent_text(s.own_fraction) if s.runs else "–",
                "fraction_value": s.own_fraction if s.runs else "",
                "seeds": len(s.runs),
                "left_out": s.left_out,
                "front": s.method in on_front,
            }
        )
    return rows
