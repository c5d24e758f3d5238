"""A trained residual model, converted and trained further: does anything help over training it on as it is?"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attnres_fx.shown import table
from studies.core.command import Study, main
from studies.core.drawing import COLOURS, GREY, panels
from studies.core.numbers import spread
from studies.core.results import Results
from studies.core.runs import Run
from studies.core.sizes import SIZES, Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is tried, by fields of a run; `more` is how long it is trained further, over the steps it has behind it.
ARMS: dict[str, dict[str, Any]] = {
    "as it is": {"method": "residual"},
    "block": {"method": "block"},
    "block, queries 10 times": {"method": "block", "query_rate": 10.0},
    "block, queries 100 times": {"method": "block", "query_rate": 100.0},
    "full, queries 10 times": {"method": "full", "query_rate": 10.0},
    "as it is, original beside": {"method": "residual", "objective": "loss and original"},
    "block, original beside": {"method": "block", "objective": "loss and original"},
    "as it is, twice as long": {"method": "residual", "more": 1.0},
    "block, twice as long": {"method": "block", "more": 1.0},
    "block, queries 10 times, twice as long": {"method": "block", "query_rate": 10.0, "more": 1.0},
}


def run_of(arm: str, seed: int, size: Size) -> Run:
    """The run of an arm: half the learning rate that the model was trained with, up and down again.

    Args:
        arm: A name of the table.
        seed: Of the trained model.
        size: Of the study.

    Returns:
        What `do_run` takes.
    """
    fields = dict(ARMS[arm])
    steps = round(fields.pop("more", 0.5) * size.steps)
    return Run(seed=seed, lr=size.rate / 2, steps=steps, start=size.steps, **fields)


def plan(size: Size, results: Results) -> Iterator[Run]:
    """All arms, seed by seed."""
    for seed in size.seeds:
        yield from (run_of(arm, seed, size) for arm in ARMS)


def found(results: Results, size: Size) -> dict[str, dict[int, float]]:
    """Last losses by arm and seed."""
    losses: dict[str, dict[int, float]] = {}
    for arm in ARMS:
        keys = {seed: run_of(arm, seed, size).key for seed in size.seeds}
        losses[arm] = {seed: results.runs[key]["loss"] for seed, key in keys.items() if key in results.runs}
    return {arm: values for arm, values in losses.items() if values}


def rival(arm: str) -> str:
    """The arm that trains the residual model as long, for the same thing."""
    wanted = {"method": "residual"} | {n: v for n, v in ARMS[arm].items() if n in ("objective", "more")}
    return next(name for name, fields in ARMS.items() if fields == wanted)


def tables(results: Results) -> str:
    """A row an arm; the gain is over the residual model, trained as long for the same thing, seed by seed."""
    losses = found(results, SIZES[results.size])
    rows = []
    for arm, values in losses.items():
        other = losses.get(rival(arm), {})
        both = sorted(values.keys() & other.keys())
        gain = spread([other[s] - values[s] for s in both]) if both and rival(arm) != arm else ""
        rows.append({"arm": arm, "seeds": len(values), "loss": spread(list(values.values())), "gain": gain})
    return table(rows)


def draw(results: Results) -> "Figure":
    """Last losses of all seeds, an arm a row."""
    losses = found(results, SIZES[results.size])
    figure, (axes,) = panels(["last validation loss"], height=3.4)
    for row, (arm, values) in enumerate(losses.items()):
        colour = COLOURS.get(ARMS[arm]["method"], GREY)
        axes.plot(list(values.values()), [-row] * len(values), "o", color=colour, ms=4)
    axes.set_yticks([-row for row in range(len(losses))], list(losses), fontsize=7)
    return figure


STUDY = Study(name="retrofit", question=__doc__, plan=plan, tables=tables, draw=draw)

if __name__ == "__main__":
    sys.exit(main(STUDY))
