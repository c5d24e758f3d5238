"""What the figures of depth share: sizes and labels for a page of a paper.

matplotlib (extra `plot`) is imported when something is drawn, never through pyplot: no window, no global state.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnres_fx.analysis.extras import needed
from attnres_fx.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Points of the smallest text, and inches from one line of it to the next.
FONT = 7.0
LINE = 1.25 * FONT / 72
#: Inches of the text of a page of two columns.
PAGE = 7.0
MARK = "#D55E00"
LINES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def figure_of(width: float, height: float) -> "Figure":
    """An empty figure of these inches. Raises MissingPackageError without matplotlib."""
    figure: Figure = needed("matplotlib.figure", "'attnres-fx[plot]'", "a picture").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure


def saved(figure: "Figure", path: str | Path | None) -> "Figure":
    """The figure, written to a file where there is a path. Raises ArgumentError where it cannot be."""
    if path is not None:
        try:
            figure.savefig(path, dpi=200)
        except (OSError, ValueError) as error:
            raise ArgumentError(f"the picture cannot be drawn to {str(path)!r}: {error}.") from error
    return figure


def every(count: int, inches: float, size: float = LINE) -> int:
    """The step at which labels of `size` inches have room on an axis of `count` places: 1, 2, 5, 10, 20, 50, …"""
    least = count * size / max(inches, size)
    steps = [base * int(10**power) for power in range(9) for base in (1, 2, 5)]
    return next(s for s in steps if s >= least)


def without_common_path(names: Sequence[str], length: int = 30) -> list[str]:
    """Module paths without the modules that all of them are in, cut at their end where they are long."""
    steps = [n.split(".") for n in names]
    shared = 0
    while len(names) > 1 and all(len(s) > shared + 1 and s[shared] == steps[0][shared] for s in steps):
        shared += 1
    short = [".".join(s[shared:]) for s in steps]
    return [s if len(s) <= length else f"{s[: length - 1]}…" for s in short]


def label_axis(axis: Any, labels: Sequence[str], inches: float, size: float = LINE) -> None:
    """Labels at the places of an axis: every one that has room."""
    step = every(len(labels), inches, size)
    places = range(0, len(labels), step)
    axis.set_ticks(list(places), [labels[i] for i in places], fontsize=FONT)


def plain_axes(axes: "Axes") -> None:
    """Without a frame above and on the right, with small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT, length=2, width=0.5)
    for side in axes.spines.values():
        side.set_linewidth(0.5)
