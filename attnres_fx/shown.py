"""How the library prints: no table wider than a screen, no `repr` longer than one."""

import re
import textwrap
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest

#: Columns of a screen.
WIDTH = 120
#: Characters that a `repr` has at most.
LENGTH = 5_000

_GAP = "  "
_NARROWEST = 8
_PLUS = " + "
_PATH = re.compile(r"/(?:[^/()\s]+/)+?(?=[^/()\s]+/[^/()\s]+:\d+)")


def table(
    rows: Sequence[Mapping[str, object]],
    *,
    wrapped: Collection[str] = (),
    right: Collection[str] = (),
    width: int = WIDTH,
) -> str:
    """Rows as a table that fits a screen: the widest columns give way first.

    Args:
        rows: By the headers of the columns, the same in each.
        wrapped: The columns whose cells go on in the next line. The cells of others lose their beginning: of a module
            path and of a file the end tells most, and of a sum of paths the end of each.
        right: The columns that stand at the right, beside those of numbers alone.
        width: Columns of the screen.

    Returns:
        The lines to print; nothing of no rows.
    """
    if not rows:
        return ""
    headers = list(rows[0])
    texts = [[str(r[h]) for h in headers] for r in rows]
    widest = [max(len(h), *(len(t[i]) for t in texts)) for i, h in enumerate(headers)]
    room = width - len(_GAP) * (len(headers) - 1)
    cap = max(widest)
    while cap > _NARROWEST and sum(_widths(headers, widest, cap)) > room:
        cap -= 1
    widths = _widths(headers, widest, cap)
    numbers = [h in right or all(isinstance(r[h], int | float) for r in rows) for h in headers]
    lines = [_row(headers, widths, numbers), _row(["-" * w for w in widths], widths, numbers)]
    for text in texts:
        cells = [_fitted(t, w, h in wrapped) for h, t, w in zip(headers, text, widths, strict=True)]
        lines += [_row(parts, widths, numbers) for parts in zip_longest(*cells, fillvalue="")]
    return "\n".join(lines)


def _widths(headers: Sequence[str], widest: Sequence[int], cap: int) -> list[int]:
    return [min(w, max(cap, len(h))) for h, w in zip(headers, widest, strict=True)]


def _fitted(cell: str, width: int, wraps: bool) -> list[str]:
    if len(cell) <= width:
        return [cell]
    return textwrap.wrap(cell, width) if wraps else [_cut(cell, width)]


def _cut(cell: str, width: int) -> str:
    """The end of a cell; of a sum of several parts the end of each, as far as there is room for all."""
    parts = cell.split(_PLUS)
    room = width - len(_PLUS) * (len(parts) - 1)
    for cap in range(width, _NARROWEST - 1, -1):
        if sum(min(len(p), cap) for p in parts) <= room:
            return _PLUS.join(p if len(p) <= cap else f"…{p[1 - cap :]}" for p in parts)
    return f"…{cell[1 - width :]}"


def _row(cells: Sequence[str], widths: Sequence[int], numbers: Sequence[bool]) -> str:
    aligned = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numbers, strict=True)]
    return _GAP.join(aligned).rstrip()


def brief(text: str, more: str = "print it to see all", length: int = LENGTH) -> str:
    """A text for a `repr`: the lines in its middle are left out where it is too long.

    Args:
        text: All of it.
        more: How to see what is left out.
        length: Characters that are shown at most.
    """
    if len(text) <= length:
        return text
    lines = [line if len(line) <= length // 4 else f"{line[: length // 4]} …" for line in text.split("\n")]
    room = length - len(more) - 40
    first, last = _that_fit(lines, room * 3 // 4), _that_fit(lines[::-1], room // 4)
    left_out = len(lines) - first - last
    if left_out <= 0:
        return "\n".join(lines)
    return "\n".join([*lines[:first], f"… {left_out} more lines; {more}", *lines[len(lines) - last :]])


def _that_fit(lines: Sequence[str], room: int) -> int:
    """How many lines, from the first one on, have room."""
    count = 0
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            break
        count += 1
    return count


def short_paths(text: str) -> str:
    """A text in which every place in a file has the last two parts of its path."""
    return _PATH.sub("", text)


def shortened(text: str, length: int) -> str:
    """A text of one line, cut between words where it is longer."""
    return text if len(text) <= length else f"{text[:length].rsplit(' ', 1)[0]} …"


def counted(number: int, noun: str) -> str:
    """A number and a noun: `1 read`, `2 reads`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def by_kind(notes: Sequence[str]) -> list[str]:
    """Notes, those that say the same of several places as one of the first.

    Args:
        notes: `place: what`, or without a place.
    """
    places: dict[str, list[str]] = defaultdict(list)
    for note in notes:
        place, colon, what = note.partition(": ")
        places[what if colon else note].append(place if colon else "")
    lines = []
    for what, found in places.items():
        more = f" and {counted(len(found) - 1, 'more place')}" if len(found) > 1 else ""
        lines.append(f"{found[0]}{more}: {what}" if found[0] else what)
    return lines
