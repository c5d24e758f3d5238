"""Does the state stay bounded over depth, and are gradients even, over training?"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

import attnres_fx as ax
from attnres_fx.demo.small_gpt import next_byte_loss
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


def by_depth(model: nn.Module, text: Text) -> dict[str, Any]:
    """Magnitudes and gradients of one validation batch.

    Args:
        model: Trained so far.
        text: Whose first validation batch is looked at.

    Returns:
        Lists over depth: `writes` of the sublayers, `states` that the reads behind them get, `gradients` of what the
        sublayers write.
    """
    device = next(model.parameters()).device
    ids, targets = (t.to(device) for t in text.validation[0])
    stream = ax.profile_depth(model, (ids,), loss=lambda logits: next_byte_loss(logits, targets)).streams[0]
    reads = [stream.read_after(s.index) for s in stream.sublayers]
    return {
        "writes": [s.magnitude for s in stream.sublayers],
        "states": [None if r is None else r.magnitude for r in reads],
        "gradients": [s.gradient for s in stream.sublayers],
    }


def unevenness(values: list[float]) -> float:
    """The largest over the smallest: 1 where all are alike."""
    return max(values) / min(values)


def growth(states: list[float]) -> float:
    """The mean of the last quarter of the depth over that of the first: how far the state grows."""
    quarter = max(1, len(states) // 4)
    return sum(states[-quarter:]) / sum(states[:quarter])


def tables(results: Results) -> str:
    """A row a run: growth of the state and unevenness of gradients, in the middle and at the end of training."""
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
                    "state, last quarter / first": f"{growth(seen['states']):.2f}",
                    "state, largest / smallest": f"{unevenness(seen['states']):.2f}",
                    "gradient, largest / smallest": f"{unevenness(seen['gradients']):.2f}",
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


STUDY = Study(name="dynamics", question=__doc__, plan=plan, tables=tables, draw=draw, at_points=by_depth)

if __name__ == "__main__":
    sys.exit(main(STUDY))
