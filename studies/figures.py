"""Draw every figure again from the results that are kept: `python -m studies.figures`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from studies.core.command import Study
from studies.core.results import FOLDER, Results

STUDIES = ("gain", "shapes", "dynamics", "routing", "blocks", "retrofit")
FIGURES = FOLDER.parents[1] / "docs" / "figures"


def study_named(name: str) -> Study:
    """The study of a file."""
    study: Study = importlib.import_module(f"studies.{name}").STUDY
    return study


def main(argv: Sequence[str] | None = None) -> int:
    """Draw a PNG for each file of results, and print its tables.

    Args:
        argv: Arguments; those of the program by default.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m studies.figures", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER, help="where finished runs are kept")
    parser.add_argument("--output", type=Path, default=FIGURES, help="where figures go (default: docs/figures)")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    for path in sorted(options.results.glob("*.json")):
        name, _, size = path.stem.rpartition("-")
        study, results = study_named(name), Results(options.results, name, size)
        figure = options.output / f"{path.stem}.png"
        study.draw(results).savefig(figure, dpi=150, metadata={"Software": None})
        print(f"{study.question}\n\n{study.tables(results)}\n\n{figure}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
