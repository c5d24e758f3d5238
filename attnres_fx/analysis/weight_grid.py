"""The weights of the reads of one stream as a grid: a row a read, a column a source."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from attnres_fx.analysis.read_weights import ReadWeights, column, layer_of


@dataclass(frozen=True)
class Cell:
    """One or several neighbouring sources of a read.

    Attributes:
        weight: The largest of their weights.
        source: The source that has it.
        of_row: The weight over the largest of the row.
    """

    weight: float
    source: str
    of_row: float


@dataclass(frozen=True)
class WeightGrid:
    """What every picture of depth weights shows.

    Attributes:
        stream: Name of the stream.
        reads: The rows, in execution order.
    """

    stream: str
    reads: tuple[ReadWeights, ...]

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The sources, in the order in which they are first seen."""
        return tuple(dict.fromkeys(column(s) for r in self.reads for s in r.sources))

    @cached_property
    def layers(self) -> list[tuple[str, int, int]]:
        """Runs of rows in one layer: its name, its first row, the row after its last."""
        runs, row = [], 0
        for layer, reads in groupby(self.reads, key=lambda r: layer_of(r.name)):
            count = len(list(reads))
            runs.append((layer, row, row + count))
            row += count
        return runs

    def rows(self, each: int = 1) -> list[list[Cell | None]]:
        """The cells of every row, `each` columns to a cell; None where the read sees none of them."""
        return [self._row(read, each) for read in self.reads]

    def _row(self, read: ReadWeights, each: int) -> list[Cell | None]:
        weights = read.mean()
        found = dict(zip(map(column, read.sources), zip(weights, read.sources, strict=True), strict=True))
        largest = max(weights) or 1.0
        cells: list[Cell | None] = []
        for i in range(0, len(self.columns), each):
            seen = [found[c] for c in self.columns[i : i + each] if c in found]
            weight, source = max(seen, default=(0.0, ""))
            cells.append(Cell(weight, source, weight / largest) if seen else None)
        return cells


def grids(reads: Sequence[ReadWeights]) -> list[WeightGrid]:
    """A grid for each stream: `v_1` of one is not that of another."""
    streams = dict.fromkeys(r.stream for r in reads)
    return [WeightGrid(stream, tuple(r for r in reads if r.stream == stream)) for stream in streams]


def per_cell(columns: int, room: int) -> int:
    """How many columns share a cell, so that there is room for all of them."""
    return max(1, -(-columns // room))
