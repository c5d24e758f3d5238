"""How large should a block be, from one sublayer to all of them, and what of a read does it take?"""

import statistics
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from attnres_fx.shown import table
from studies.core.command import Study, main
from studies.core.drawing import COLOURS, panels
from studies.core.methods import ABLATIONS, BLOCKS, RESIDUAL
from studies.core.numbers import runs_where, spread
from studies.core.results import Results
from studies.core.runs import Run
from studies.core.sizes import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sizes_of_blocks() -> dict[str, int]:
    """How many sublayers the blocks of each of these methods have."""
    return {name: c.block_size for name, c in BLOCKS.items() if c.block_size is not None}


def plan(size: Size, results: Results) -> Iterator[Run]:
    """The residual model, every size of blocks that the depth has room for, and the ablations, at one learning rate."""
    sublayers = 2 * size.model.layers
    methods = [RESIDUAL, *(name for name, block in sizes_of_blocks().items() if block <= sublayers), *ABLATIONS]
    for seed in size.seeds:
        yield from (Run(method=m, seed=seed, lr=size.rate, steps=size.steps) for m in methods)


def losses(results: Results) -> dict[str, list[float]]:
    """Last losses of all seeds by method."""
    methods = dict.fromkeys(r["run"]["method"] for r in results.runs.values())
    return {m: [r["loss"] for r in runs_where(results, method=m)] for m in methods}


def tables(results: Results) -> str:
    """A row a method."""
    rows = [{"method": m, "seeds": len(v), "loss": spread(v)} for m, v in losses(results).items()]
    return table(rows)


def draw(results: Results) -> "Figure":
    """The last loss by the size of blocks, beside that of the residual model; and of each ablation."""
    figure, (axes, others) = panels(["last validation loss", "blocks of 4, otherwise"])
    ablations = [m for m in losses(results) if m in ABLATIONS]
    for method, found in losses(results).items():
        if method == RESIDUAL:
            axes.axhline(statistics.fmean(found), color=COLOURS[RESIDUAL], lw=1, label=RESIDUAL)
        elif method in ABLATIONS:
            others.plot([ablations.index(method)] * len(found), found, "o", color=COLOURS["block"], ms=4)
        else:
            axes.plot([sizes_of_blocks()[method]] * len(found), found, "o", color=COLOURS["block"], ms=4)
    if whole := losses(results).get("block of 4"):
        others.axhline(statistics.fmean(whole), color=COLOURS["block"], lw=1, label="block of 4")
        others.legend(fontsize=7, frameon=False)
    others.set_xticks(range(len(ablations)), ablations, fontsize=7, rotation=45, ha="right")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("sublayers of a block", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    return figure


STUDY = Study(name="blocks", question=__doc__, plan=plan, tables=tables, draw=draw)

if __name__ == "__main__":
    sys.exit(main(STUDY))
