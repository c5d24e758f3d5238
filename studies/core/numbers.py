"""Means, spreads and which run of a method is its own."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from studies.core.results import Results


def spread(values: Sequence[float]) -> str:
    """The mean and the sample's standard deviation.

    Args:
        values: At least one.

    Returns:
        Text; without a deviation for a single value.
    """
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def runs_where(results: Results, **wanted: Any) -> list[dict[str, Any]]:
    """Finished runs of which these fields have these values.

    Args:
        results: Where to look.
        wanted: Fields of `Run`.

    Returns:
        The records.
    """
    return [r for r in results.runs.values() if all(r["run"][n] == v for n, v in wanted.items())]


def best_rate(results: Results, method: str, *, seed: int, steps: int, rates: Iterable[float]) -> float | None:
    """The learning rate with the lowest last validation loss.

    Args:
        results: Where to look.
        method: Whose.
        seed: The one that all rates were tried with.
        steps: Of those runs.
        rates: Those that were to be tried.

    Returns:
        None while not all of them are finished.
    """
    found = {r["run"]["lr"]: r["loss"] for r in runs_where(results, method=method, seed=seed, steps=steps)}
    if not set(rates) <= found.keys():
        return None
    return min(rates, key=found.__getitem__)
