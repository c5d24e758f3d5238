"""Which stage runs which sublayers of which block, as a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnres_fx.partition.costs.cut_bytes import BlockLayouts
from attnres_fx.partition.costs.model_costs import StreamCost
from attnres_fx.partition.plan.plot_style import BAR, BLOCK_COLOURS, FONT, NO_BLOCK, POINTS, counted, legend_below

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class StageMap:
    """What `draw_stage_map` draws: the chain, its blocks and its cuts.

    Args:
        streams: Runs of the chain.
        block_layouts: By stream name, None for the plain residual.
        starts: First sublayer of each virtual stage; stage c is on rank c mod `num_stages`.
        num_stages: Ranks P.
    """

    streams: Sequence[StreamCost]
    block_layouts: BlockLayouts | None
    starts: Sequence[int]
    num_stages: int

    @property
    def blocks(self) -> tuple[tuple[str, range], ...]:
        """Labels and sublayers of the chain's blocks; one without a label where a stream has none."""
        blocks: list[tuple[str, range]] = []
        for s in self.streams:
            layout = None if self.block_layouts is None else self.block_layouts[s.name]
            if layout is None or layout.variant == "full":
                blocks.append(("", range(s.first, s.first + s.count)))
                continue
            blocks += [(f"b_{n}", range(s.first + b.start, s.first + b.stop)) for n, b in enumerate(layout.blocks, 1)]
        return tuple(blocks)

    @property
    def stages(self) -> tuple[range, ...]:
        """The sublayers of each virtual stage."""
        stops = (*self.starts[1:], sum(s.count for s in self.streams))
        return tuple(range(a, b) for a, b in zip(self.starts, stops, strict=True))

    @property
    def has_blocks(self) -> bool:
        return any(label for label, _ in self.blocks)

    @property
    def spanning_blocks(self) -> int:
        """How many blocks have sublayers in more than one virtual stage."""
        return sum(
            sum(bool(_common(block, stage)) for stage in self.stages) > 1 for label, block in self.blocks if label
        )


def stage_map_height(stage_map: StageMap) -> float:
    """Inches."""
    return 1.4 + 0.28 * (stage_map.num_stages + 1)


def draw_stage_map(stage_map: StageMap, axes: "Axes") -> None:
    """Sublayers from left to right: blocks as coloured bands, virtual stages as boxes in the row of their rank.

    A block that spans stages has its colour in several boxes, and a dashed line where it is cut.

    Args:
        stage_map: What is drawn.
        axes: Where.
    """
    stages, ranks = stage_map.stages, stage_map.num_stages
    count = stages[-1].stop
    axes.set_xlim(0, count)
    axes.set_ylim(ranks - 0.4, -1.6)
    _draw_blocks(stage_map, axes)
    _draw_stages(stage_map, axes)
    top = "blocks" if stage_map.has_blocks else "chain"
    axes.set_yticks([-1, *range(ranks)], [top, *(f"rank {r}" for r in range(ranks))])
    axes.tick_params(axis="y", length=0, labelsize=FONT)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("sublayer", fontsize=FONT, loc="left")
    spanning = stage_map.spanning_blocks
    about = (
        f"{counted(len(stage_map.blocks), 'block')}, {spanning or 'none'} of them across stages"
        if stage_map.has_blocks
        else "no blocks"
    )
    axes.set_title(
        f"{counted(count, 'sublayer')} in {counted(len(stages), 'virtual stage')} (numbered); {about}",
        fontsize=FONT + 3,
        loc="left",
    )
    if spanning:
        _draw_legend(axes)


def _draw_blocks(stage_map: StageMap, axes: "Axes") -> None:
    """Every block as a band of the top row, and in the rows of the ranks that have a part of it."""
    for n, (label, block) in enumerate(stage_map.blocks):
        colour = BLOCK_COLOURS[n % len(BLOCK_COLOURS)] if label else NO_BLOCK
        _draw_band(block, -1, colour, axes)
        _write(label, block, -1, stage_map, axes)
        for c, stage in enumerate(stage_map.stages):
            if part := _common(block, stage):
                _draw_band(part, c % stage_map.num_stages, colour, axes)


def _draw_stages(stage_map: StageMap, axes: "Axes") -> None:
    """Every virtual stage as a box with its number, and a line where it begins: dashed inside a block."""
    from matplotlib.patches import Rectangle

    begins = {block.start for _, block in stage_map.blocks}
    for c, stage in enumerate(stage_map.stages):
        row = c % stage_map.num_stages
        corner = (stage.start, row - BAR / 2)
        axes.add_patch(Rectangle(corner, len(stage), BAR, fill=False, edgecolor="black", linewidth=0.8, zorder=3))
        _write(str(c), stage, row, stage_map, axes)
        style = "dashed" if stage_map.has_blocks and stage.start not in begins else "solid"
        if c:
            axes.axvline(stage.start, color="#555555", linewidth=0.6, linestyle=style, zorder=0)


def _draw_band(sublayers: range, row: float, colour: str, axes: "Axes") -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((sublayers.start, row - BAR / 2), len(sublayers), BAR, facecolor=colour, linewidth=0))


def _write(text: str, sublayers: range, row: int, stage_map: StageMap, axes: "Axes") -> None:
    """A text in the middle of its sublayers, or, where it is wider than they are, beside a stage's box."""
    points_per_sublayer = POINTS / stage_map.stages[-1].stop
    wide = 0.64 * FONT * len(text) / points_per_sublayer
    gap = 3 / points_per_sublayer
    if len(sublayers) >= wide:
        middle = (sublayers.start + sublayers.stop) / 2
        axes.text(middle, row, text, ha="center", va="center", fontsize=FONT, zorder=4)
    elif row >= 0:
        before, after = _free_beside(sublayers, row, stage_map)
        if before >= wide + gap:
            axes.text(sublayers.start - gap, row, text, ha="right", **_BESIDE)
        elif after >= 2 * (wide + gap):  # as much again for the number of the next box
            axes.text(sublayers.stop + gap, row, text, ha="left", **_BESIDE)


#: Of a number beside its box, where a line may pass.
_BESIDE: dict[str, Any] = {
    "va": "center",
    "fontsize": FONT,
    "zorder": 4,
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.4},
}


def _free_beside(stage: range, row: int, stage_map: StageMap) -> tuple[int, int]:
    """How many sublayers are free in the row of a rank, from the box of a stage to the next one or the end."""
    own = stage_map.stages[row :: stage_map.num_stages]
    before = max((s.stop for s in own if s.stop <= stage.start), default=0)
    after = min((s.start for s in own if s.start >= stage.stop), default=stage_map.stages[-1].stop)
    return stage.start - before, after - stage.stop


def _draw_legend(axes: "Axes") -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    inside = Line2D([], [], color="#555555", linewidth=0.8, linestyle="dashed", label="a stage begins inside a block")
    at_end = Line2D([], [], color="#555555", linewidth=0.8, label="a stage begins where a block does")
    box = Patch(facecolor="none", edgecolor="black", label="virtual stage, in the row of its rank")
    legend_below([box, at_end, inside], axes)


def _common(one: range, other: range) -> range:
    """The sublayers of both."""
    return range(max(one.start, other.start), min(one.stop, other.stop))
