"""What was refused, as lines: one for every kind, however many places are of it."""

import re
from collections import defaultdict
from collections.abc import Sequence

from attnres_fx.passes.streams.refusals import Refusal
from attnres_fx.shown import counted, short_paths

_LINE = re.compile(r"\(([^()\s]+:\d+)\)$")
_LINES_SHOWN = 6


def remarks(refusals: Sequence[Refusal]) -> list[str]:
    """One line for every kind of refusal: how many there are, the first one, and on which other lines more stand.

    The same line of a loop over layers is named once, for all of them.

    Args:
        refusals: In graph order.
    """
    kinds: dict[str, list[Refusal]] = defaultdict(list)
    for refusal in refusals:
        kinds[refusal.kind].append(refusal)
    return [_remark(kind, found) for kind, found in kinds.items()]


def _remark(kind: str, found: Sequence[Refusal]) -> str:
    said = "interrupted" if kind == "interrupted" else f"refused ({kind})"
    first = short_paths(f"{found[0].place}: {found[0].reason}")
    if len(found) == 1:
        return f"{said}: {first}"
    lines = list(dict.fromkeys(m[1] for r in found if (m := _LINE.search(short_paths(r.place)))))
    more = lines[1 : _LINES_SHOWN + 1]
    if len(lines) > _LINES_SHOWN + 1:
        more.append("…")
    also = f"; also at {', '.join(more)}" if more else ""
    return f"{said}, {counted(len(found), 'place')}, the first {first}{also}"
