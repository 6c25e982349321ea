"""Training curves of a comparison: validation scores by epoch, a line for each method."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from .axes import Frame, Scale, nice_step, padded, tick_text
from .drawing import XY, Drawing
from .labels import Item, place_labels
from .numbers import is_share, shorten
from .style import SERIES

LEFT, RIGHT, TOP, BOTTOM = 46.0, 168.0, 34.0, 38.0


def draw_epochs(
    task: str,
    metric: str,
    curves: Mapping[str, Sequence[float]],
    front: Collection[str],
    *,
    width: float = 500.0,
    height: float = 270.0,
) -> Drawing:
    """Validation score against epoch of one task.

    Args:
        task: its name.
        metric: name of the score.
        curves: by method, the mean over seeds after each epoch.
        front: methods on the Pareto front; only these have colours and names.
        width: of the drawing.
        height: of the drawing.
    """
    drawing = Drawing(width, height, f"Validation {metric} of {task} by epoch.")
    values = [value for curve in curves.values() for value in curve]
    share = is_share(metric)
    longest = max(len(curve) for curve in curves.values())
    frame = Frame(
        Scale(1, max(longest, 2), LEFT, width - RIGHT),
        Scale(*padded(values, limits=(0.0, 1.0) if share else None), height - BOTTOM, TOP),
    )
    step = nice_step((frame.y.high - frame.y.low) / 5)
    across = nice_step(max((longest - 1) / 6, 1))
    ticks = [1.0, *(i * across for i in range(1, int(longest / across) + 1) if i * across > 1)]

    def y_text(value: float) -> str:
        return tick_text(value * 100, step * 100) if share else tick_text(value, step)

    frame.grid(drawing, ticks, frame.y.ticks(5), lambda v: f"{v:.0f}", y_text)
    drawing.text(
        8, 16, f"{shorten(task, 24)}: validation {metric}{' (%)' if share else ''}", "title"
    )
    drawing.text((LEFT + width - RIGHT) / 2, height - 5, "epoch", "tick", "middle")
    named = [label for label in curves if label in front]
    for label in [name for name in curves if name not in front] + named:
        points: list[XY] = [(frame.x(i + 1), frame.y(v)) for i, v in enumerate(curves[label])]
        place = named.index(label) if label in named else -1
        style = "axis" if place < 0 else f"{'ld'[place // SERIES % 2]}{place % SERIES}"
        if len(points) > 1:
            drawing.line(points, style)
        else:
            drawing.marker("circle", points[0], 3, "dot" if place < 0 else f"m{place % SERIES}")
    # Short enough to fit beside the plot where neighbours push them to the right.
    ends = [Item(shorten(n, 19), (frame.x(len(curves[n])), frame.y(curves[n][-1]))) for n in named]
    area = (LEFT, TOP, width - 2, height - BOTTOM + 10)
    across_plot = (LEFT, TOP, width - RIGHT + 4, height - BOTTOM)
    place_labels(drawing, sorted(ends, key=lambda item: item.at[1]), [across_plot], area, 11.0)
    return drawing
