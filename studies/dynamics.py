"""Does the state stay bounded over depth, and are gradients even, over training?"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from attnres_fx.demo.by_depth import by_depth, growth, unevenness
from attnres_fx.demo.text import Text
from attnres_fx.shown import table
from studies.core.command import Study, main
from studies.core.drawing import COLOURS, panels
from studies.core.results import Results
from studies.core.runs import Run
from studies.core.sizes import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("residual", "block", "full")


def plan(size: Size, results: Results) -> Iterator[Run]:
    """Each method with each seed, seed by seed, all at one learning rate."""
    for seed in size.seeds:
        yield from (Run(method=m, seed=seed, lr=size.rate, steps=size.steps) for m in METHODS)


def look(model: nn.Module, text: Text) -> dict[str, list[float]]:
    """Magnitudes and gradients over depth, four digits of them."""
    found = by_depth(model, text)
    lists = {"writes": found.writes, "states": found.states, "gradients": found.gradients}
    return {name: [float(f"{v:.4g}") for v in values] for name, values in lists.items()}


def tables(results: Results) -> str:
    """Two rows a run, in the middle and at the end: how much the last quarter of the depth has over the first."""
    rows = []
    for record in results.runs.values():
        points = record["points"]
        for point in (points[len(points) // 2], points[-1]):
            seen = point["seen"]
            rows.append(
                {
                    "method": record["run"]["method"],
                    "seed": record["run"]["seed"],
                    "step": point["step"],
                    "loss": f"{record['loss']:.4f}" if point is points[-1] else "",
                    "writes grow": f"{growth(seen['writes']):.2f}",
                    "state grows": f"{growth(seen['states']):.2f}",
                    "gradient grows": f"{growth(seen['gradients']):.2f}",
                    "gradient, largest / smallest": f"{unevenness(seen['gradients']):.1f}",
                }
            )
    return table(rows)


def draw(results: Results) -> "Figure":
    """Three panels over depth at the end of training, one line a run."""
    figure, axes = panels(["state that reads get", "what sublayers write", "gradient of what they write"])
    for record in results.runs.values():
        method, seen = record["run"]["method"], record["points"][-1]["seen"]
        label = method if record["run"]["seed"] == 0 else None
        for each, what in zip(axes, ("states", "writes", "gradients"), strict=True):
            each.plot(range(1, len(seen[what]) + 1), seen[what], color=COLOURS[method], lw=1, label=label)
            each.set_xlabel("sublayer", fontsize=8)
            each.set_yscale("log")
    axes[0].legend(fontsize=7, frameon=False)
    return figure


STUDY = Study(name="dynamics", question=__doc__, plan=plan, tables=tables, draw=draw, at_points=look)

if __name__ == "__main__":
    sys.exit(main(STUDY))
