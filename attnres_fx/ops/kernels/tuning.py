"""Launches: what may be tuned without changing a bit of any result, and the table it is kept in."""

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from attnres_fx.ops.kernels.layout import Direction


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Args:
        num_stages: stages of the compiler's software pipeline.
        programs_per_sm: programs a multiprocessor runs, which share the rows. In backward they are part of the order
            of a sum, so they are always `DEFAULT`'s.
    """

    num_stages: int = 2
    programs_per_sm: int = 2


DEFAULT = Launch()
_forced: list[Launch] = []


def table_path() -> Path:
    """Where the launches that `benchmarks/tune.py` found are kept: JSON, a list of records."""
    return Path(__file__).with_name("launches.json")


def candidates(direction: Direction, sources: int, width: int, dtype: torch.dtype) -> list[Launch]:
    """Launches worth timing for a read of `sources` sources of `width` numbers."""
    programs = (1, 2, 3, 4, 6, 8) if direction == "forward" else (DEFAULT.programs_per_sm,)
    return [Launch(stages, count) for stages in (1, 2, 3) for count in programs]


def launch_for(direction: Direction, device: str, sources: int, width: int, dtype: torch.dtype) -> Launch:
    """The table's launch for a device (by name), number of sources, width and dtype, or the default."""
    if _forced:
        return _forced[-1]
    return _table().get((direction, device, sources, width, str(dtype).removeprefix("torch.")), DEFAULT)


@contextlib.contextmanager
def launch_with(launch: Launch) -> Iterator[None]:
    """Use one launch for every kernel inside this context."""
    _forced.append(launch)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def _table() -> dict[tuple[str, str, int, int, str], Launch]:
    if not table_path().exists():
        return {}
    return {
        (r["direction"], r["device"], r["sources"], r["width"], r["dtype"]): Launch(
            r["num_stages"], r["programs_per_sm"]
        )
        for r in json.loads(table_path().read_text())
    }
