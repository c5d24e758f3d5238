"""Draw what each read over depth sees, in the three variants, as an SVG of a few kilobytes.

python examples/draw_reads.py docs/reads.svg
"""

import sys
from pathlib import Path

from attnres_fx import AttnResConfig
from attnres_fx.passes.schedule import DepthSchedule, plan_schedule

SUBLAYERS, BLOCKS, CELL = 12, 4, 16
COLOURS = {"root": "#8c8c8c", "sublayer": "#6baed6", "partial": "#fdae6b", "block": "#2171b5", "summary": "#756bb1"}
TITLES = {
    "full": "full: every sublayer output",
    "block": "block: sums of blocks, and the current partial sum",
    "local": "local: one summary, and the outputs of this block",
}


def panel(schedule: DepthSchedule, left: int) -> list[str]:
    """One row a read, the first on top; one column a term, the root first; a bar for each source."""
    shapes = [f'<text x="{left}" y="14">{TITLES[schedule.variant]}</text>']
    for position in range(1, SUBLAYERS + 1):
        y = 24 + (position - 1) * CELL
        for source in schedule.sources(position):
            start, stop = source.start + 1, source.stop + 1
            if source.kind == "root":
                start, stop = 0, 1
            elif source.kind == "summary":
                start, stop = 0, schedule.starts[source.block] + 1
            bar = f'x="{left + start * CELL + 1}" y="{y}" width="{(stop - start) * CELL - 2}" height="{CELL - 4}"'
            shapes.append(f'<rect {bar} rx="3" fill="{COLOURS[source.kind]}"/>')
    return shapes


def drawing() -> str:
    """The three panels side by side."""
    width, height = (SUBLAYERS + 1) * CELL + 120, 24 + SUBLAYERS * CELL + 24
    shapes = []
    for i, variant in enumerate(TITLES):
        config = AttnResConfig(variant=variant, num_blocks=None if variant == "full" else BLOCKS)
        shapes += panel(plan_schedule(SUBLAYERS, config), 8 + i * width)
    foot = "a row is a read, the first on top; a column is a term: the embedding, then each sublayer; a bar is a source"
    shapes.append(f'<text x="8" y="{height - 6}" fill="#555">{foot}</text>')
    size = f'viewBox="0 0 {3 * width} {height}" font-family="sans-serif" font-size="12" fill="#111"'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', background, *shapes, "</svg>", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(drawing(), encoding="utf-8")
