"""The command of a study: do what is not done yet, print the tables, draw nothing."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from studies.core.results import FOLDER, Results
from studies.core.runs import Look, Run, do_run
from studies.core.sizes import SIZES, Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the runs that answer it, and how their answer is shown.

    Args:
        name: Of the study's file and of its results.
        question: One line.
        plan: The runs in order; it may look at those that are finished, to choose the next ones.
        tables: The answer as text, of whatever is finished.
        draw: The answer as a figure, of whatever is finished.
        at_points: What to look at as each point of a curve is reached.
        at_end: What to look at in a trained model.
    """

    name: str
    question: str
    plan: Callable[[Size, Results], Iterator[Run]]
    tables: Callable[[Results], str]
    draw: Callable[[Results], "Figure"]
    at_points: Look | None = None
    at_end: Look | None = None


def do_study(study: Study, size: str, folder: Path) -> Results:
    """Do the runs of a study that are not finished.

    Args:
        study: Which.
        size: A name in the table of sizes.
        folder: Where its results are kept.

    Returns:
        All of its results.
    """
    results = Results(folder, study.name, size)
    for run in study.plan(SIZES[size], results):
        if run.key not in results.runs:
            results.add(run.key, do_run(run, SIZES[size], at_points=study.at_points, at_end=study.at_end))
    return results


def main(study: Study, argv: Sequence[str] | None = None) -> int:
    """The command line of a study.

    Args:
        study: Which.
        argv: Arguments; those of the program by default.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog=f"python -m studies.{study.name}", description=study.question)
    parser.add_argument("--size", default="cpu", choices=tuple(SIZES), help="default: cpu; gpu has never been run")
    parser.add_argument("--results", type=Path, default=FOLDER, help="where finished runs are kept")
    options = parser.parse_args(argv)
    print(study.tables(do_study(study, options.size, options.results)))
    return 0
