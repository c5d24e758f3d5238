"""Is a model that reads its depth better than a residual one, at the learning rate that suits each?"""

import sys
from collections.abc import Iterator

from studies.core.command import Study, main
from studies.core.numbers import best_rate
from studies.core.results import Results
from studies.core.runs import Run
from studies.core.sizes import Size
from studies.gain_answer import draw, tables

METHODS = ("residual", "block", "local", "full", "static", "mhc")
#: How long the residual model is trained too, over the length of all methods.
LONGER = 1.5


def plan(size: Size, results: Results) -> Iterator[Run]:
    """For each method all learning rates with the first seed, then the best one with the others.

    The residual model is trained for longer too: from its losses is read how many steps it needs for what others reach.
    """
    for method in METHODS:
        first = size.seeds[0]
        yield from (Run(method=method, seed=first, lr=rate, steps=size.steps) for rate in size.rates)
        best = best_rate(results, method, seed=first, steps=size.steps, rates=size.rates)
        yield from (Run(method=method, seed=s, lr=best, steps=size.steps) for s in size.seeds[1:])
    best = best_rate(results, "residual", seed=size.seeds[0], steps=size.steps, rates=size.rates)
    yield from (Run(method="residual", seed=s, lr=best, steps=round(LONGER * size.steps)) for s in size.seeds)


STUDY = Study(name="gain", question=__doc__, plan=plan, tables=tables, draw=draw)

if __name__ == "__main__":
    sys.exit(main(STUDY))
