"""Depth weights as text: numbers where there is room, shades scaled by row where there is not."""

from collections.abc import Sequence

from attnres_fx.analysis.read_weights import ReadWeights
from attnres_fx.analysis.weight_grid import Cell, WeightGrid, grids, per_cell
from attnres_fx.shown import WIDTH, counted, table

_SHADES = " ░▒▓█"
#: How wide the map may be where a cell is one shade and no number, beside the names of the reads.
_STRIP = 64
#: Columns between the marks above such a map.
_MARKS = 8


def text_map(reads: Sequence[ReadWeights]) -> str:
    """A row a read and a column a source, for each stream.

    Args:
        reads: In execution order.

    Returns:
        Lines no wider than a screen. Shades are scaled by row: the largest weight of a read is the darkest.
    """
    maps = grids(reads)
    return "\n\n".join((f"{g.stream}\n" if len(maps) > 1 else "") + _map(g) for g in maps)


def _map(grid: WeightGrid) -> str:
    name = max(len(r.name) for r in grid.reads)
    if name + 9 * len(grid.columns) <= WIDTH:
        pairs = zip(grid.reads, grid.rows(), strict=True)
        return table([{"read": r.name, **_numbers(grid, row)} for r, row in pairs])
    each = per_cell(len(grid.columns), _STRIP)
    header = _ruler(grid.columns, each)
    rows = [
        {
            "read": read.name,
            header: "".join(map(_shade, row)).ljust(len(header)),
            "most on": _most(read),
            "newest": f"{read.newest:.2f}",
            "reach": f"{read.reach:.1f}",
        }
        for read, row in zip(grid.reads, grid.rows(each), strict=True)
    ]
    folded = f"one shade for {each} sources (the largest of them)" if each > 1 else "one shade a source"
    said = f"{counted(len(grid.columns), 'source')}, {folded}; a row's largest weight is the darkest, a dot is not seen"
    return f"{said}\n\n{table(rows, right=('newest', 'reach'))}"


def _numbers(grid: WeightGrid, row: Sequence[Cell | None]) -> dict[str, str]:
    cells = zip(grid.columns, row, strict=True)
    return {c: "" if cell is None else f"{_shade(cell) * 2} {cell.weight:.2f}" for c, cell in cells}


def _ruler(columns: Sequence[str], each: int) -> str:
    """The names of sources above the cells that they begin."""
    cells = columns[::each]
    marks = [cells[i].ljust(_MARKS) for i in range(0, len(cells), _MARKS)]
    return "".join(m if len(m) == _MARKS else m[: _MARKS - 1] + " " for m in marks).rstrip().ljust(len(cells))


def _most(read: ReadWeights) -> str:
    weights = read.mean()
    most = max(range(len(weights)), key=weights.__getitem__)
    if max(weights) - min(weights) <= 1e-3 * max(weights):
        return "all alike"
    return f"{read.sources[most]} {weights[most]:.2f}"


def _shade(cell: Cell | None) -> str:
    if cell is None:
        return "."
    return _SHADES[min(int(cell.of_row * len(_SHADES)), len(_SHADES) - 1)]
