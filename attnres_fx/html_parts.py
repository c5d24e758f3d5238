"""Small pieces of HTML: tables and cells that look the same in a notebook, light or dark, and in a file."""

from collections.abc import Collection, Mapping, Sequence
from html import escape

#: From next to nothing to the most: readable in grey too, and never the white of what is not there.
RAMP = ("#f1f5fa", "#e3eef9", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")

_STYLE = (
    ".attnres{background:#fff;color:#111;font:12px/1.35 system-ui,sans-serif;padding:8px;overflow-x:auto}"
    ".attnres table{border-collapse:collapse;color:#111;font:inherit}"
    ".attnres th,.attnres td{padding:1px 6px;text-align:left;white-space:nowrap;border:0;background:none}"
    ".attnres th{font-weight:600;border-bottom:1px solid #999}"
    ".attnres td.n,.attnres th.n{text-align:right;font-variant-numeric:tabular-nums}"
    ".attnres td.m{padding:0;font-size:0}"
    ".attnres i{display:inline-block;width:var(--cell,7px);height:12px}"
    ".attnres i.j{box-shadow:inset 0 0 0 2px #e8710a}"
    ".attnres p{margin:4px 0}" + "".join(f".attnres .s{i}{{background:{c}}}" for i, c in enumerate(RAMP))
)


def page(*parts: str) -> str:
    """Parts in one box with the style that they need."""
    return f'<div class="attnres"><style>{_STYLE}</style>{"".join(parts)}</div>'


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def shade(share: float) -> int:
    """The index in `RAMP` of a share of the most."""
    return max(0, min(round(share * (len(RAMP) - 1)), len(RAMP) - 1))


def html_table(rows: Sequence[Mapping[str, str]], *, numbers: Collection[str] = (), raw: Collection[str] = ()) -> str:
    """Rows as a table.

    Args:
        rows: By the headers of the columns, the same in each.
        numbers: The columns that stand at the right.
        raw: The columns that are HTML already.
    """
    if not rows:
        return ""
    kinds = {h: ' class="m"' if h in raw else ' class="n"' if h in numbers else "" for h in rows[0]}
    head = "".join(f"<th{kind if h in numbers else ''}>{escape(h)}</th>" for h, kind in kinds.items())
    lines = [
        "".join(f"<td{kinds[h]}>{text if h in raw else escape(text)}</td>" for h, text in row.items()) for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
