"""Depth weights as HTML: a row a read, a coloured cell a source, its numbers where the mouse is."""

from collections.abc import Sequence
from html import escape

from attnres_fx.analysis.read_weights import ReadWeights
from attnres_fx.analysis.weight_grid import Cell, WeightGrid, grids, per_cell
from attnres_fx.html_parts import html_table, page, paragraph, shade

#: Cells of a row.
_ROOM = 80


def weights_html(reads: Sequence[ReadWeights]) -> str:
    """A table for each stream.

    Args:
        reads: In execution order.

    Returns:
        HTML that needs nothing else: no script, no other file.
    """
    parts: list[str] = []
    for grid in grids(reads):
        each = per_cell(len(grid.columns), _ROOM)
        folded = f"a cell is the largest of {each} sources" if each > 1 else "a cell is a source"
        about = (
            f"{grid.stream}: attention over depth of {len(grid.reads)} reads. From {grid.columns[0]} on the left to "
            f"{grid.columns[-1]} on the right, {folded}; a row's largest weight is the darkest. Framed: a long "
            f"jump, where most weight is on what is further back than an even read looks."
        )
        parts += [paragraph(about), _table(grid, each)]
    return page(*parts)


def _table(grid: WeightGrid, each: int) -> str:
    rows, wide = [], min(28, max(7, 560 * each // len(grid.columns)))
    for read, cells in zip(grid.reads, grid.rows(each), strict=True):
        jump = read.sources[read.jump] if read.jump is not None else ""
        rows.append(
            {
                "read": read.name,
                "sources": "".join(_cell(c, jump) for c in cells),
                "newest": f"{read.newest:.3f}",
                "reach": f"{read.reach:.1f}",
                "entropy": f"{read.entropy:.2f}",
            }
        )
    table = html_table(rows, numbers=("newest", "reach", "entropy"), raw=("sources",))
    return f'<div style="--cell:{wide}px">{table}</div>'


def _cell(cell: Cell | None, jump: str) -> str:
    if cell is None:
        return "<i></i>"
    framed = " j" if cell.source == jump else ""
    return f'<i class="s{shade(cell.of_row)}{framed}" title="{escape(cell.source)} {cell.weight:.3f}"></i>'
