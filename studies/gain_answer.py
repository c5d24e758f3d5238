"""What the runs of `gain` say: losses with their spread, gains, and how many steps more the residual model needs."""

import random
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attnres_fx.demo.lengths import steps_for_loss
from attnres_fx.shown import table
from studies.core.drawing import COLOURS, panels
from studies.core.numbers import best_rate, runs_where, spread
from studies.core.results import Results
from studies.core.sizes import SIZES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Losses by seed.
Losses = dict[int, float]
#: How often seeds are drawn again for an interval.
DRAWS = 2000


def chosen(results: Results) -> dict[str, tuple[float, Losses]]:
    """Learning rate and last losses of each method whose rates are all tried.

    Args:
        results: Of the study.

    Returns:
        By method.
    """
    size = SIZES[results.size]
    found = {}
    for method in dict.fromkeys(r["run"]["method"] for r in results.runs.values()):
        rate = best_rate(results, method, seed=size.seeds[0], steps=size.steps, rates=size.rates)
        if rate is not None:
            runs = runs_where(results, method=method, lr=rate, steps=size.steps)
            found[method] = (rate, {r["run"]["seed"]: r["loss"] for r in runs})
    return found


def residual_lengths(results: Results) -> dict[int, Losses]:
    """Last losses of the residual model at its own learning rate, by the steps of the training.

    Args:
        results: Of the study.

    Returns:
        By steps, the shortest first.
    """
    rate = chosen(results)["residual"][0]
    found: dict[int, Losses] = {}
    for record in runs_where(results, method="residual", lr=rate):
        found.setdefault(record["run"]["steps"], {})[record["run"]["seed"]] = record["loss"]
    return dict(sorted(found.items()))


def multiplier(lengths: Mapping[int, Losses], losses: Losses, steps: int) -> tuple[float, float, float] | None:
    """How many times the steps of a method the residual model needs for the method's mean loss.

    Args:
        lengths: Losses of the residual model by steps.
        losses: Those of the method.
        steps: That the method was trained for.

    Returns:
        The value for the means over all seeds, and the bounds of the middle 90 % where seeds are drawn again with
        replacement; None with a single length.
    """
    seeds = sorted(set(losses).intersection(*lengths.values())) if lengths else []
    if len(lengths) < 2 or not seeds:
        return None

    def of(drawn: list[int]) -> float:
        means = {n: statistics.fmean(found[s] for s in drawn) for n, found in lengths.items()}
        return steps_for_loss(means, statistics.fmean(losses[s] for s in drawn)) / steps

    chance = random.Random(0)
    values = sorted(of(chance.choices(seeds, k=len(seeds))) for _ in range(DRAWS))
    return of(seeds), values[DRAWS // 20], values[-DRAWS // 20]


def tables(results: Results) -> str:
    """A row a method, a row a length of residual training, and every learning rate that was tried."""
    size, found = SIZES[results.size], chosen(results)
    if "residual" not in found:
        return "The residual model's learning rates are not all tried yet."
    base, lengths = found["residual"][1], residual_lengths(results)
    rows = []
    for method, (rate, losses) in found.items():
        both = sorted(base.keys() & losses.keys())
        times = multiplier(lengths, losses, size.steps) if method != "residual" else None
        runs = runs_where(results, method=method, lr=rate, steps=size.steps)
        rows.append(
            {
                "method": method,
                "lr": f"{rate:g}",
                "seeds": len(losses),
                "loss": spread(list(losses.values())),
                "gain": "" if method == "residual" else spread([base[s] - losses[s] for s in both]),
                "steps of residual": "" if times is None else f"{times[0]:.2f} ({times[1]:.2f} to {times[2]:.2f})",
                "CPU ms a step": f"{1000 * min(r['cpu_seconds'] for r in runs) / size.steps:.0f}",
            }
        )
    by_length = [{"steps": n, "loss": spread(list(v.values())), "seeds": len(v)} for n, v in lengths.items()]
    tried = [
        {"method": r["run"]["method"], "lr": f"{r['run']['lr']:g}", "loss": f"{r['loss']:.4f}"}
        for r in runs_where(results, seed=size.seeds[0], steps=size.steps)
    ]
    return (
        f"After {size.steps} steps, nats a byte, mean and deviation over seeds; the gain is taken seed by seed:\n\n"
        f"{table(rows)}\n\nThe residual model, trained for other lengths:\n\n{table(by_length)}\n\n"
        f"Learning rates, seed {size.seeds[0]}:\n\n{table(tried)}"
    )


def draw(results: Results) -> "Figure":
    """Curves of every method at its own learning rate, and last losses of all seeds."""
    figure, (curves, last, lengths) = panels(["validation loss", "last loss, each seed", "residual, by length"])
    size, found = SIZES[results.size], chosen(results)
    for place, (method, (rate, losses)) in enumerate(found.items()):
        colour = COLOURS[method]
        for i, record in enumerate(runs_where(results, method=method, lr=rate, steps=size.steps)):
            points = [row for row in record["curve"] if row[0] >= size.steps / 4]
            label = method if i == 0 else None
            curves.plot([p[0] for p in points], [p[2] for p in points], color=colour, lw=1, label=label)
        last.plot([place] * len(losses), list(losses.values()), "o", color=colour, ms=4)
        mean = statistics.fmean(losses.values())
        lengths.axhline(mean, color=colour, lw=0.8)
    curves.set_xlabel("step", fontsize=8)
    curves.legend(fontsize=7, frameon=False)
    last.set_xticks(range(len(found)), list(found), fontsize=7)
    last.margins(x=0.2)
    by_length = residual_lengths(results)
    for steps, losses in by_length.items():
        lengths.plot([steps] * len(losses), list(losses.values()), "o", color=COLOURS["residual"], ms=4)
    lengths.set_xscale("log", base=2)
    lengths.set_xticks(list(by_length), list(map(str, by_length)), fontsize=7)
    lengths.set_xlabel("steps; lines: other methods' means", fontsize=8)
    return figure
