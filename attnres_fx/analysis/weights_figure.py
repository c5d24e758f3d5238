"""Depth weights as a figure for a paper: a heat map a stream, and how far each read looks beside it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from attnres_fx.analysis.figures import (
    FONT,
    LINE,
    LINES,
    MARK,
    every,
    figure_of,
    label_axis,
    plain_axes,
    without_common_path,
)
from attnres_fx.analysis.read_weights import ReadWeights, column
from attnres_fx.analysis.weight_grid import WeightGrid, grids
from attnres_fx.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Scale = Literal["row", "log", "linear"]
#: Inches that a map is high at most, and what is around it.
_HIGHEST, _AROUND = 7.5, 0.75
#: From where on a logarithmic scale tells weights apart.
_LEAST = 1e-4


def draw_weights(reads: Sequence[ReadWeights], *, scale: Scale, width: float) -> "Figure":
    """A heat map for each stream, oldest source at the left, first read on top.

    Args:
        reads: In execution order.
        scale: What a colour is: `"row"`, the weight over the largest of the read; `"log"`, the weight on a
            logarithmic scale; `"linear"`, the weight itself, from 0 to 1.
        width: Inches.

    Returns:
        A figure. Lines are drawn between layers where they have room; a mark is on each long jump.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ArgumentError: There is no such scale.
    """
    if scale not in ("row", "log", "linear"):
        raise ArgumentError(f"scale must be 'row', 'log' or 'linear'; it is {scale!r}.")
    maps = grids(reads)
    heights = [min(LINE * max(len(g.reads), 8), _HIGHEST) for g in maps]
    figure = figure_of(width, sum(heights) + _AROUND * len(maps))
    rows = figure.subplots(len(maps), 2, squeeze=False, width_ratios=(4.2, 1), height_ratios=heights, sharey="row")
    for grid, height, (left, right) in zip(maps, heights, rows, strict=True):
        image = _draw_map(grid, left, scale, (0.6 * width, height))
        _draw_reach(grid, right)
        if len(maps) > 1:
            left.set_title(grid.stream, fontsize=FONT + 1, loc="left")
        bar = figure.colorbar(image, ax=[left, right], pad=0.01, fraction=0.04, aspect=max(8, height / 0.13))
        bar.set_label(_SAID[scale], fontsize=FONT)
        bar.ax.tick_params(labelsize=FONT, length=2)
        bar.outline.set_linewidth(0.5)  # type: ignore[operator]
    return figure


_SAID = {"row": "weight / largest of the read", "log": "weight", "linear": "weight"}


def _draw_map(grid: WeightGrid, axes: "Axes", scale: Scale, inches: tuple[float, float]) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    rows = grid.rows()
    values = [
        [math.nan if c is None else c.of_row if scale == "row" else max(c.weight, _LEAST) for c in r] for r in rows
    ]
    norm = LogNorm(_LEAST, 1.0) if scale == "log" else Normalize(0.0, 1.0)
    image = axes.imshow(values, norm=norm, cmap="Blues", aspect="auto", interpolation="nearest")
    axes.set_facecolor("#F2F2F2")
    _mark_jumps(grid, axes, inches)
    _name_rows(grid, axes, inches[1])
    longest = max(len(c) for c in grid.columns)
    label_axis(axes.xaxis, grid.columns, inches[0], size=0.62 * FONT / 72 * (longest + 1))
    axes.tick_params(length=2, width=0.5)
    axes.set_xlabel("source, oldest first", fontsize=FONT)
    for side in axes.spines.values():
        side.set_linewidth(0.5)
    return image


def _mark_jumps(grid: WeightGrid, axes: "Axes", inches: tuple[float, float]) -> None:
    """A mark on what a read weighs most, where that is further back than an even read looks."""
    places = [
        (grid.columns.index(column(r.sources[r.jump])), i) for i, r in enumerate(grid.reads) if r.jump is not None
    ]
    if not places:
        return
    cell = min(inches[0] / len(grid.columns), inches[1] / len(grid.reads)) * 72
    size = min(max(0.45 * cell, 2.0), 3.5)
    across, down = zip(*places, strict=True)
    axes.plot(across, down, "o", color=MARK, markersize=size, markeredgewidth=0, label="long jump")
    axes.legend(loc="upper right", fontsize=FONT, frameon=False, borderaxespad=0.3, handletextpad=0.1)


def _name_rows(grid: WeightGrid, axes: "Axes", inches: float) -> None:
    """The reads by name where there is room, else the layers they are in; lines between layers."""
    named = [run for run in grid.layers if run[0]]
    if every(len(grid.reads), inches) == 1 or not named:
        label_axis(axes.yaxis, without_common_path([r.name for r in grid.reads]), inches)
    else:
        shown = named[:: every(len(named), inches)]
        labels = without_common_path([layer for layer, _, _ in shown])
        axes.yaxis.set_ticks([start for _, start, _ in shown], labels, fontsize=FONT)
        axes.set_ylabel("layer", fontsize=FONT)
    if len(named) > 1 and inches * 72 / len(named) >= 12:  # points: closer they would hide the map
        for _, start, _ in grid.layers[1:]:
            axes.axhline(start - 0.5, color="white", linewidth=0.8)


def _draw_reach(grid: WeightGrid, axes: "Axes") -> None:
    rows = range(len(grid.reads))
    even = [r.even_reach for r in grid.reads]
    axes.plot([r.reach for r in grid.reads], rows, color=LINES[0], linewidth=1, label="reach")
    axes.plot(even, rows, color="#888888", linewidth=0.7, linestyle="dashed", label="if all were alike")
    axes.set_xlabel("sublayers back", fontsize=FONT)
    axes.set_xlim(left=0)
    axes.tick_params(axis="y", left=False, labelleft=False)
    plain_axes(axes)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=FONT, frameon=False, borderaxespad=0.2)
