"""What the runs of `gain` say."""

from typing import TYPE_CHECKING

from studies.core.numbers import runs_where, spread
from studies.core.results import Results
from studies.core.sizes import SIZES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tables(results: Results) -> str:
    """Last validation losses by method, learning rate and steps."""
    size = SIZES[results.size]
    keys = dict.fromkeys((r["run"]["method"], r["run"]["lr"], r["run"]["steps"]) for r in results.runs.values())
    lines = [
        f"{method}, lr {lr:g}, {steps} steps: "
        + spread([r["loss"] for r in runs_where(results, method=method, lr=lr, steps=steps)])
        for method, lr, steps in keys
    ]
    return "\n".join([f"{size.model}", *lines])


def draw(results: Results) -> "Figure":
    """Loss curves."""
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    for key, record in results.runs.items():
        axes.plot([row[0] for row in record["curve"]], [row[2] for row in record["curve"]], label=key)
    return figure
