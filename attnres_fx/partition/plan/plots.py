"""Pictures of a plan: its timeline, and which stage runs which sublayers of which block.

matplotlib (extra `plot`) is imported when something is drawn, never through pyplot: no window, no global state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnres_fx.errors import PlanError
from attnres_fx.partition.costs.cut_bytes import BlockLayouts
from attnres_fx.partition.costs.model_costs import StreamCost
from attnres_fx.partition.simulate.timeline import TimedAction, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, told apart by every kind of colour vision.
COLOURS = {"F": "#0072B2", "B": "#E69F00", "I": "#E69F00", "W": "#009E73"}
NAMES = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"}
HOP_COLOURS = {"F": "#003B5C", "B": "#8A3B00", "I": "#8A3B00"}
IDLE = "#EFEFEF"
#: Light, so that numbers stay readable on them; neighbours differ in lightness too.
BLOCK_COLOURS = ("#56B4E9", "#F0E442", "#CC79A7", "#B8E0D2")
NO_BLOCK = "#D9D9D9"
WIDTH_INCHES = 14.0
FONT, SMALL = 8.0, 7.0
#: Of the axes from left to right, about.
POINTS = 72 * WIDTH_INCHES * 0.92
BAR = 0.74


@dataclass(frozen=True)
class StageMap:
    """What `draw_map` draws: the chain, its blocks and its cuts.

    block_layouts: by stream name, None for the plain residual. starts: first sublayer of each virtual stage, stage c on
    rank c mod num_stages.
    """

    streams: Sequence[StreamCost]
    block_layouts: BlockLayouts | None
    starts: Sequence[int]
    num_stages: int

    @property
    def blocks(self) -> tuple[tuple[str, range], ...]:
        """Labels and sublayers of the chain's blocks; one without a label where a stream has none."""
        found: list[tuple[str, range]] = []
        for s in self.streams:
            layout = None if self.block_layouts is None else self.block_layouts[s.name]
            if layout is None or layout.variant == "full":
                found.append(("", range(s.first, s.first + s.count)))
                continue
            found += [(f"b_{n}", range(s.first + b.start, s.first + b.stop)) for n, b in enumerate(layout.blocks, 1)]
        return tuple(found)

    @property
    def stages(self) -> tuple[range, ...]:
        """The sublayers of each virtual stage."""
        stops = (*self.starts[1:], sum(s.count for s in self.streams))
        return tuple(range(a, b) for a, b in zip(self.starts, stops, strict=True))


def draw_timeline(timeline: Timeline, where: "Axes | str | Path") -> None:
    """Ranks by time: forward, backward, idle, microbatch numbers where they fit, and hops as thin lines.

    where: axes, or the path of a picture to write. Lighter bars are later virtual stages of the rank.
    Raises PlanError where matplotlib is not installed.
    """
    _draw(where, _timeline_height(timeline), lambda axes: _timeline(timeline, axes))


def draw_map(stage_map: StageMap, where: "Axes | str | Path") -> None:
    """Sublayers from left to right: blocks as coloured bands, virtual stages as boxes in the row of their rank.

    A block that spans stages has its colour in several boxes, and a dashed line where it is cut.
    """
    _draw(where, _map_height(stage_map), lambda axes: _map(stage_map, axes))


def draw_plan(timeline: Timeline, stage_map: StageMap, path: str | Path) -> None:
    """One picture of both, the map above the timeline."""
    heights = [_map_height(stage_map), _timeline_height(timeline)]
    figure = _figure(sum(heights))
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    _map(stage_map, upper)
    _timeline(timeline, lower)
    figure.savefig(path, dpi=150)


def _figure(height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlanError(
            "a picture needs matplotlib, which is not installed: pip install 'attnres-fx[plot]', or leave the plot out."
        ) from error
    return Figure(figsize=(WIDTH_INCHES, height), layout="constrained")


def _draw(where: "Axes | str | Path", height: float, draw: "Callable[[Axes], None]") -> None:
    if not isinstance(where, str | Path):
        draw(where)
        return
    figure = _figure(height)
    draw(figure.subplots())
    figure.savefig(where, dpi=150)


def _timeline_height(timeline: Timeline) -> float:
    return 1.5 + 0.42 * timeline.num_stages


def _map_height(stage_map: StageMap) -> float:
    return 1.4 + 0.28 * (stage_map.num_stages + 1)


def _timeline(timeline: Timeline, axes: "Axes") -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    scale, unit = _unit(timeline.step_seconds)
    whole = timeline.step_seconds * scale
    axes.set_xlim(0, whole)
    axes.set_ylim(timeline.num_stages - 0.5, -0.5)
    kinds = [k for k in "FBIW" if any(t.action.kind == k for t in timeline.ranks[0])]
    for rank, actions in enumerate(timeline.ranks):
        axes.broken_barh([(0, whole)], (rank - BAR / 2, BAR), facecolor=IDLE, zorder=1)
        for bars in _alike(actions):
            stage, kind, _ = bars[0].action
            # Points that a number has; all bars of one stage and kind are as long as each other.
            room = (bars[0].end - bars[0].start) * scale * POINTS / whole
            axes.broken_barh(
                [(t.start * scale, (t.end - t.start) * scale) for t in bars],
                (rank - BAR / 2, BAR),
                facecolor=_shade(kind, stage // timeline.num_stages, timeline),
                edgecolor="white",
                linewidth=min(0.3, 0.06 * room),
                zorder=2,
            )
            if room >= 0.64 * SMALL * len(str(timeline.num_microbatches - 1)) + 2:
                _number(bars, rank, scale, axes)
    lines = [_hop_line(h.start * scale, h.end * scale, h.source_rank, h.target_rank) for h in timeline.hops]
    crowded = len(lines) > 600
    axes.add_collection(
        LineCollection(
            lines,
            colors=[HOP_COLOURS[h.action.kind] for h in timeline.hops],
            linewidths=0.35 if crowded else 0.7,
            alpha=0.5 if crowded else 0.8,
            zorder=1.5,  # from the last rank to the first they pass behind the bars
        )
    )
    idle = [f"{seconds / timeline.step_seconds:.0%}" if timeline.step_seconds else "" for seconds in timeline.idle]
    axes.set_yticks(range(timeline.num_stages), [f"rank {r}" for r in range(timeline.num_stages)], fontsize=FONT)
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(timeline.num_stages), [f"{share} idle" for share in idle], fontsize=FONT)
    for side in (axes, beside):
        side.tick_params(axis="y", length=0)
        side.spines[:].set_visible(False)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.set_xlabel({"s": "seconds", "ms": "milliseconds", "µs": "microseconds"}[unit], fontsize=FONT, loc="left")
    axes.set_title(
        f"{timeline.schedule}, {timeline.num_stages} ranks of {_counted(timeline.virtual_stages, 'stage')}, "
        f"{_counted(timeline.num_microbatches, 'microbatch', 'es')}: "
        f"step {whole:.3g} {unit}, bubble {timeline.bubble:.1%}",
        fontsize=FONT + 3,
        loc="left",
    )
    handles: list[Any] = [Patch(facecolor=COLOURS[k], label=NAMES[k]) for k in kinds]
    handles.append(Patch(facecolor=IDLE, label="idle"))
    if timeline.virtual_stages > 1:
        handles.append(Patch(facecolor="none", label="lighter: a later stage of the rank"))
    if lines:
        handles.append(Line2D([], [], color=HOP_COLOURS["F"], linewidth=1, label="output on its way"))
        handles.append(Line2D([], [], color=HOP_COLOURS["B"], linewidth=1, label="gradient on its way"))
    _legend_below(handles, axes)


def _alike(actions: Sequence[TimedAction]) -> list[list[TimedAction]]:
    """A rank's computations by kind and stage."""
    found: dict[tuple[str, int], list[TimedAction]] = {}
    for timed in actions:
        found.setdefault((timed.action.kind, timed.action.stage), []).append(timed)
    return list(found.values())


def _hop_line(start: float, end: float, source: int, target: int) -> list[tuple[float, float]]:
    down = 1 if target > source else -1
    return [(start, source + down * BAR / 2), (end, target - down * BAR / 2)]


def _number(bars: Sequence[TimedAction], rank: int, scale: float, axes: "Axes") -> None:
    for timed in bars:
        colour = "white" if timed.action.kind == "F" and timed.action.stage == rank else "black"
        middle = (timed.start + timed.end) / 2 * scale
        text = str(timed.action.microbatch)
        axes.text(middle, rank, text, ha="center", va="center", fontsize=SMALL, color=colour, zorder=4)


def _shade(kind: str, virtual: int, timeline: Timeline) -> tuple[float, float, float]:
    """The kind's colour, the lighter the later the stage is among the rank's own."""
    from matplotlib.colors import to_rgb

    white = 0.45 * virtual / max(timeline.virtual_stages - 1, 1)
    red, green, blue = (c + (1 - c) * white for c in to_rgb(COLOURS[kind]))
    return red, green, blue


def _map(stage_map: StageMap, axes: "Axes") -> None:
    from matplotlib.patches import Patch, Rectangle

    blocks, stages, ranks = stage_map.blocks, stage_map.stages, stage_map.num_stages
    count = stages[-1].stop
    points_per_sublayer = POINTS / count
    axes.set_xlim(0, count)
    axes.set_ylim(ranks - 0.4, -1.6)
    named = any(label for label, _ in blocks)

    def band(sublayers: range, row: float, colour: str) -> None:
        axes.add_patch(Rectangle((sublayers.start, row - BAR / 2), len(sublayers), BAR, facecolor=colour, linewidth=0))

    def write(sublayers: range, row: float, text: str) -> None:
        if len(sublayers) * points_per_sublayer >= 0.64 * FONT * len(text):
            middle = (sublayers.start + sublayers.stop) / 2
            axes.text(middle, row, text, ha="center", va="center", fontsize=FONT, zorder=4)
        elif row >= 0 and ranks > 1:  # the rank's stage before ends far to the left
            beside = sublayers.start - 3 / points_per_sublayer
            axes.text(beside, row, text, ha="right", va="center", fontsize=FONT, zorder=4)

    for n, (label, block) in enumerate(blocks):
        colour = BLOCK_COLOURS[n % len(BLOCK_COLOURS)] if label else NO_BLOCK
        band(block, -1, colour)
        write(block, -1, label)
        for c, stage in enumerate(stages):
            both = range(max(stage.start, block.start), min(stage.stop, block.stop))
            if both:
                band(both, c % ranks, colour)
    for c, stage in enumerate(stages):
        corner = (stage.start, c % ranks - BAR / 2)
        axes.add_patch(Rectangle(corner, len(stage), BAR, fill=False, edgecolor="black", linewidth=0.8, zorder=3))
        write(stage, c % ranks, str(c))
        cuts_block = named and not any(stage.start == block.start for _, block in blocks)
        style = "dashed" if cuts_block else "solid"
        if c:
            axes.axvline(stage.start, color="#555555", linewidth=0.6, linestyle=style, zorder=0)
    axes.set_yticks([-1, *range(ranks)], ["blocks" if named else "chain", *(f"rank {r}" for r in range(ranks))])
    axes.tick_params(axis="y", length=0, labelsize=FONT)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("sublayer", fontsize=FONT, loc="left")
    spanning = sum(
        sum(bool(range(max(b.start, s.start), min(b.stop, s.stop))) for s in stages) > 1 for label, b in blocks if label
    )
    about = f"{_counted(len(blocks), 'block')}, {spanning or 'none'} of them across stages" if named else "no blocks"
    axes.set_title(
        f"{_counted(count, 'sublayer')} in {_counted(len(stages), 'virtual stage')} (numbered); {about}",
        fontsize=FONT + 3,
        loc="left",
    )
    if named and spanning:
        from matplotlib.lines import Line2D

        inside = Line2D(
            [], [], color="#555555", linewidth=0.8, linestyle="dashed", label="a stage begins inside a block"
        )
        at_end = Line2D([], [], color="#555555", linewidth=0.8, label="a stage begins where a block does")
        box = Patch(facecolor="none", edgecolor="black", label="virtual stage, in the row of its rank")
        _legend_below([box, at_end, inside], axes)


def _legend_below(handles: Sequence[Any], axes: "Axes") -> None:
    axes.legend(
        handles=list(handles),
        ncols=len(handles),
        loc="upper right",
        bbox_to_anchor=(1, 0),
        borderaxespad=2.2,
        fontsize=FONT,
        frameon=False,
    )


def _unit(seconds: float) -> tuple[float, str]:
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return scale, unit
    return 1e6, "µs"


def _counted(number: int, thing: str, plural: str = "s") -> str:
    return f"{number} {thing}{plural if number != 1 else ''}"
