"""A depth profile as tables, in text and in HTML."""

import textwrap
from collections.abc import Sequence

from attnres_fx.analysis.profile_data import ReadProfile, StreamProfile, SublayerProfile
from attnres_fx.html_parts import html_table, page, paragraph
from attnres_fx.shown import WIDTH, table

_NUMBERS = ("#", "writes", "state", "adds", "share", "gradient", "entropy", "reach")
_SAID = (
    "writes, state: root mean square of what the sublayer writes, and of the state behind it; adds: the first over the "
    "second; share: of the last state; entropy, reach: of what the read behind it is made of, reach in sublayers back"
)


def profile_text(head: str, streams: Sequence[StreamProfile]) -> str:
    """A verdict and a table for each stream."""
    parts = [f"{textwrap.fill(s.verdict(), WIDTH)}\n\n{table(_rows(s), right=_NUMBERS)}" for s in streams]
    return "\n\n".join((head, *parts, textwrap.fill(_SAID, WIDTH)))


def reads_table(streams: Sequence[StreamProfile]) -> str:
    """One row a read: its name, the sublayers before it, its state, and what that is mostly made of."""
    rows = [
        {
            "stream": stream.name,
            "read": read.name,
            "after": read.position,
            "state": _number(read.magnitude),
            "entropy": "" if read.entropy is None else f"{read.entropy:.2f}",
            "reach": "" if read.reach is None else f"{read.reach:.1f}",
            "if even": f"{read.even_reach:.1f}",
            "mostly": _mostly(read),
        }
        for stream in streams
        for read in stream.reads
    ]
    if len(streams) == 1:
        rows = [{h: text for h, text in row.items() if h != "stream"} for row in rows]
    return table(rows, right=("state", "entropy", "reach", "if even"))


def _mostly(read: ReadProfile, count: int = 3) -> str:
    most = sorted(zip(read.mixture, read.sources, strict=False), reverse=True)[:count]
    return ", ".join(f"{source} {share:.0%}" for share, source in most)


def profile_html(head: str, streams: Sequence[StreamProfile]) -> str:
    """The same as HTML that needs nothing else, with a bar for the share of each sublayer."""
    parts = [paragraph(head)]
    for stream in streams:
        bars = _bars(stream)
        rows = [_with_bar(row, bar) for row, bar in zip(_rows(stream), bars, strict=True)]
        parts += [paragraph(stream.verdict()), html_table(rows, numbers=_NUMBERS, raw=("",))]
    return page(*parts, paragraph(_SAID))


def _rows(stream: StreamProfile) -> list[dict[str, str]]:
    return [_row(stream, s) for s in (stream.root, *stream.sublayers)]


def _row(stream: StreamProfile, sublayer: SublayerProfile) -> dict[str, str]:
    read = stream.read_after(sublayer.index)
    state = read.magnitude if read is not None else sublayer.magnitude if sublayer.index == 0 else None
    adds = sublayer.magnitude / state if sublayer.index and sublayer.magnitude is not None and state else None
    return {
        "#": str(sublayer.index),
        "sublayer": sublayer.name,
        "writes": _number(sublayer.magnitude),
        "state": _number(state),
        "adds": "" if adds is None else f"{adds:.2f}",
        "share": "" if sublayer.share is None else f"{sublayer.share:.1%}",
        "gradient": _number(sublayer.gradient),
        "entropy": "" if read is None or read.entropy is None else f"{read.entropy:.2f}",
        "reach": "" if read is None or read.reach is None else f"{read.reach:.1f}",
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _bars(stream: StreamProfile) -> list[str]:
    """For the sublayers; the root, which often has more than all of them, has its number alone."""
    shares = [s.share for s in stream.sublayers]
    most = max((abs(s) for s in shares if s is not None), default=0.0) or 1.0
    return ["", *(_bar(s, most) for s in shares)]


def _with_bar(row: dict[str, str], bar: str) -> dict[str, str]:
    """A row with the bar of its share behind the number."""
    cells: dict[str, str] = {}
    for name, text in row.items():
        cells[name] = text
        if name == "share":
            cells[""] = bar
    return cells


def _bar(share: float | None, most: float) -> str:
    """A length for a share; another colour for what is taken away."""
    if share is None:
        return ""
    colour = "#2171b5" if share >= 0 else "#d55e00"
    return f'<i style="width:{90 * abs(share) / most:.0f}px;background:{colour}" title="share {share:.2%}"></i>'
