"""A depth profile as a figure for a paper: four small plots by depth for each stream."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnres_fx.analysis.figures import FONT, LINES, MARK, figure_of, plain_axes
from attnres_fx.analysis.profile_data import StreamProfile, SublayerProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Inches that a row of plots is high.
_ROW = 1.9


def draw_profile(streams: Sequence[StreamProfile], width: float) -> "Figure":
    """Magnitudes, shares, gradients and reach, from the first sublayer at the left to the last.

    Raises MissingPackageError without matplotlib.
    """
    figure = figure_of(width, _ROW * len(streams))
    rows = figure.subplots(len(streams), 4, squeeze=False)
    for stream, (first, second, third, fourth) in zip(streams, rows, strict=True):
        _draw_magnitudes(stream, first)
        _draw_shares(stream, second)
        _draw_gradients(stream, third)
        _draw_reach(stream, fourth)
        if len(streams) > 1:
            first.set_ylabel(stream.name, fontsize=FONT)
        for axes in (first, second, third, fourth):
            axes.set_xlabel("sublayers", fontsize=FONT)
            plain_axes(axes)
    return figure


def _draw_magnitudes(stream: StreamProfile, axes: "Axes") -> None:
    axes.plot([r.position for r in stream.reads], [r.magnitude for r in stream.reads], color=LINES[0], linewidth=1)
    known = _known(stream, "magnitude")
    axes.plot(*known, ".", color=LINES[1], markersize=3)
    _scale(axes, [*known[1], *(r.magnitude for r in stream.reads)])
    _title(axes, "root mean square", ("state", LINES[0]), ("written", LINES[1]))


def _draw_shares(stream: StreamProfile, axes: "Axes") -> None:
    places, shares = _known(stream, "share")
    colours = [LINES[0] if s >= 0 else MARK for s in shares]
    axes.bar(places, [100 * s for s in shares], width=1.0, color=colours)
    axes.axhline(0, color="#888888", linewidth=0.5)
    if not shares:
        _say(axes, "not known for this stream")
    _title(axes, "share of the last state, %")


def _draw_gradients(stream: StreamProfile, axes: "Axes") -> None:
    places, norms = _known(stream, "gradient")
    if any(norms):
        axes.plot(places, norms, ".-", color=LINES[2], linewidth=0.7, markersize=3)
        _scale(axes, norms)
    else:
        _say(axes, "no loss was given" if not norms else "all zero")
    _title(axes, "gradient norm")


def _draw_reach(stream: StreamProfile, axes: "Axes") -> None:
    known = [(r.position, r.even_reach, r.reach) for r in stream.reads if r.reach is not None]
    places = [position for position, _, _ in known]
    axes.plot(places, [even for _, even, _ in known], color="#888888", linewidth=0.7, linestyle="dashed")
    axes.plot(places, [reach for _, _, reach in known], color=LINES[0], linewidth=1)
    if not known:
        _say(axes, "not known for this stream")
    _title(axes, "sublayers back", ("reach", LINES[0]), ("even", "#888888"))


def _known(stream: StreamProfile, what: str) -> tuple[list[int], list[float]]:
    every: tuple[SublayerProfile, ...] = (stream.root, *stream.sublayers)
    known = [(s.index, getattr(s, what)) for s in every if getattr(s, what) is not None]
    return [i for i, _ in known], [v for _, v in known]


def _scale(axes: "Axes", values: Sequence[float]) -> None:
    """Logarithmic where the values are more than a factor of ten apart."""
    from matplotlib.ticker import NullFormatter

    if 0 < 10 * min(values) < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _title(axes: "Axes", text: str, *lines: tuple[str, str]) -> None:
    """What is drawn, and under it the names of the lines in their colours."""
    axes.set_title(text + ("\n" if lines else "\n "), fontsize=FONT, loc="left")
    for i, (name, colour) in enumerate(lines):
        axes.text(0.45 * i, 1.03, name, color=colour, fontsize=FONT, transform=axes.transAxes)


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=FONT, color="#888888", transform=axes.transAxes)
