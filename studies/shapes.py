"""Is it better at every shape, and does the best shape move deeper, at equal parameters and equal tokens?"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attnres_fx.demo.small_gpt import GPTConfig
from attnres_fx.shown import table
from studies.core.command import Study, main
from studies.core.drawing import panels
from studies.core.results import Results
from studies.core.runs import Run
from studies.core.sizes import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("residual", "block")
#: By layers and width.
Cells = dict[tuple[int, int], float]


def hidden(model: GPTConfig, layers: int, width: int) -> int:
    """The width of the MLP that gives a shape as many parameters as the size's model, but for biases and norms.

    Args:
        model: The size's.
        layers: Of the shape.
        width: Of the shape.

    Returns:
        The nearest whole number; depths and widths of a size leave room for at least one.
    """
    rows = model.vocabulary + model.context
    budget = 12 * model.layers * model.width**2 + rows * model.width
    return max(1, round(((budget - rows * width) / layers - 4 * width**2) / (2 * width)))


def plan(size: Size, results: Results) -> Iterator[Run]:
    """All cells, each with both methods, with the first seed and at one learning rate."""
    for layers in size.depths:
        for width in size.widths:
            shape = {"layers": layers, "width": width, "hidden": hidden(size.model, layers, width)}
            for method in METHODS:
                yield Run(method=method, seed=size.seeds[0], lr=size.rate, steps=size.steps, **shape)


def cells(results: Results, method: str) -> Cells:
    """Last losses of a method by layers and width."""
    runs = [r for r in results.runs.values() if r["run"]["method"] == method]
    return {(r["run"]["layers"], r["run"]["width"]): r["loss"] for r in runs}


def tables(results: Results) -> str:
    """The map of differences, and where each method has its optimum."""
    residual, block = cells(results, "residual"), cells(results, "block")
    both = sorted(residual.keys() & block.keys())
    widths = sorted({width for _, width in both})
    rows = [
        {"layers": layers}
        | {
            f"width {w}": f"{residual[layers, w] - block[layers, w]:+.4f}" if (layers, w) in both else ""
            for w in widths
        }
        for layers in sorted({layers for layers, _ in both})
    ]
    best = "\n".join(
        f"{name}: best at {min(found, key=found.__getitem__)} (layers, width), {min(found.values()):.4f}"
        for name, found in (("residual", residual), ("block", block))
        if found
    )
    return f"Loss of residual minus loss of block:\n\n{table(rows)}\n\n{best}"


def draw(results: Results) -> "Figure":
    """Three maps: each method, and the difference."""
    residual, block = cells(results, "residual"), cells(results, "block")
    both = sorted(residual.keys() & block.keys())
    figure, axes = panels(["residual", "block", "residual − block"])
    differences = {cell: residual[cell] - block[cell] for cell in both}
    layers, widths = sorted({c[0] for c in both}), sorted({c[1] for c in both})
    for each, found in zip(axes, (residual, block, differences), strict=True):
        grid = [[found.get((depth, width), float("nan")) for width in widths] for depth in layers]
        each.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                each.text(j, i, f"{value:.3f}", ha="center", va="center", fontsize=6, color="white")
        each.set_xticks(range(len(widths)), widths)
        each.set_yticks(range(len(layers)), layers)
        each.set_xlabel("width", fontsize=8)
    axes[0].set_ylabel("layers", fontsize=8)
    return figure


STUDY = Study(name="shapes", question=__doc__, plan=plan, tables=tables, draw=draw)

if __name__ == "__main__":
    sys.exit(main(STUDY))
