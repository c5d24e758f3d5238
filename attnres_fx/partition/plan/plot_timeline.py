"""One training step as a plot: ranks by time."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from attnres_fx.partition.plan.plot_style import (
    BAR,
    COLOURS,
    FONT,
    HOP_COLOURS,
    IDLE,
    NAMES,
    POINTS,
    SMALL,
    counted,
    legend_below,
)
from attnres_fx.partition.simulate.timeline import TimedAction, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def timeline_height(timeline: Timeline) -> float:
    """Inches."""
    return 1.5 + 0.42 * timeline.num_stages


def draw_timeline(timeline: Timeline, axes: "Axes") -> None:
    """Ranks by time: forward, backward, idle, microbatch numbers where they fit, and hops as thin lines.

    Args:
        timeline: What is drawn.
        axes: Where. Lighter bars are later virtual stages of the rank.
    """
    scale, unit = _unit(timeline.step_seconds)
    whole = timeline.step_seconds * scale
    axes.set_xlim(0, whole)
    axes.set_ylim(timeline.num_stages - 0.5, -0.5)
    for rank in range(timeline.num_stages):
        _draw_rank(timeline, rank, scale, axes)
    _draw_hops(timeline, scale, axes)
    _name_ranks(timeline, axes)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.set_xlabel({"s": "seconds", "ms": "milliseconds", "µs": "microseconds"}[unit], fontsize=FONT, loc="left")
    axes.set_title(
        f"{timeline.schedule}, {timeline.num_stages} ranks of {counted(timeline.virtual_stages, 'stage')}, "
        f"{counted(timeline.num_microbatches, 'microbatch', 'es')}: "
        f"step {whole:.3g} {unit}, bubble {timeline.bubble:.1%}",
        fontsize=FONT + 3,
        loc="left",
    )
    legend_below(list(_legend(timeline)), axes)


def _draw_rank(timeline: Timeline, rank: int, scale: float, axes: "Axes") -> None:
    """A rank's computations as bars on its idle time."""
    whole = timeline.step_seconds * scale
    axes.broken_barh([(0, whole)], (rank - BAR / 2, BAR), facecolor=IDLE, zorder=1)
    for bars in _alike(timeline.ranks[rank]):
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


def _alike(actions: Sequence[TimedAction]) -> list[list[TimedAction]]:
    """A rank's computations by kind and stage."""
    groups: dict[tuple[str, int], list[TimedAction]] = {}
    for timed in actions:
        groups.setdefault((timed.action.kind, timed.action.stage), []).append(timed)
    return list(groups.values())


def _draw_hops(timeline: Timeline, scale: float, axes: "Axes") -> None:
    from matplotlib.collections import LineCollection

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


def _hop_line(start: float, end: float, source: int, target: int) -> list[tuple[float, float]]:
    down = 1 if target > source else -1
    return [(start, source + down * BAR / 2), (end, target - down * BAR / 2)]


def _name_ranks(timeline: Timeline, axes: "Axes") -> None:
    """Ranks on the left, and on the right how long each is idle."""
    idle = [f"{seconds / timeline.step_seconds:.0%}" if timeline.step_seconds else "" for seconds in timeline.idle]
    axes.set_yticks(range(timeline.num_stages), [f"rank {r}" for r in range(timeline.num_stages)], fontsize=FONT)
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(timeline.num_stages), [f"{share} idle" for share in idle], fontsize=FONT)
    for side in (axes, beside):
        side.tick_params(axis="y", length=0)
        side.spines[:].set_visible(False)


def _legend(timeline: Timeline) -> Iterator[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for kind in "FBIW":
        if any(t.action.kind == kind for t in timeline.ranks[0]):
            yield Patch(facecolor=COLOURS[kind], label=NAMES[kind])
    yield Patch(facecolor=IDLE, label="idle")
    if timeline.virtual_stages > 1:
        yield Patch(facecolor="none", label="lighter: a later stage of the rank")
    if timeline.hops:
        yield Line2D([], [], color=HOP_COLOURS["F"], linewidth=1, label="output on its way")
        yield Line2D([], [], color=HOP_COLOURS["B"], linewidth=1, label="gradient on its way")


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


def _unit(seconds: float) -> tuple[float, str]:
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return scale, unit
    return 1e6, "µs"
