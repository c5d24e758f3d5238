"""The lines of a report: one row a stream or a read, one line for every kind of remark."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from attnres_fx.passes.rewrite.read_plan import StreamPlan
from attnres_fx.passes.streams.refusals import Refusal
from attnres_fx.passes.streams.remarks import remarks
from attnres_fx.passes.streams.stream import Read, Stream
from attnres_fx.shown import by_kind, counted, table

_NAMES_SHOWN = 8


def stream_rows(streams: Sequence[Stream], converted: Sequence[str]) -> list[dict[str, object]]:
    """One row a stream: what it begins with, what is written and read, and whether a conversion reads it."""
    return [
        {
            "stream": s.name,
            "root": root_of(s),
            "sublayers": s.num_sublayers,
            "reads": len(s.depth_reads),
            "width": _width(s),
            "norm": "post" if s.post_norm else "pre",
            "converted": "yes" if s.name in converted else "no",
            "first line": short_line(s.terms[0].line) if s.terms else "",
        }
        for s in streams
    ]


def converted_rows(streams: Sequence[StreamPlan]) -> list[dict[str, object]]:
    """One row a converted stream, with its blocks and parameters."""
    return [_converted_row(s) for s in streams]


def _converted_row(converted: StreamPlan) -> dict[str, object]:
    stream, schedule = converted.stream, converted.schedule
    sizes = [len(b) for b in schedule.blocks]
    return {
        "stream": stream.name,
        "root": root_of(stream),
        "sublayers": stream.num_sublayers,
        "reads": len(converted.reads),
        "width": _width(stream),
        "norm": "post" if stream.post_norm else "pre",
        "blocks": "-" if schedule.variant == "full" else _runs(sizes),
        "most sources": max((len(r.sources) for r in converted.reads), default=0),
        "parameters": converted.num_parameters,
    }


def root_of(stream: Stream) -> str:
    """What a stream begins with, as its user would say."""
    return stream.made_by or stream.root.module or stream.root.node


def fed_by(stream: Stream) -> dict[str, str]:
    """The sublayers that the reads of a stream feed.

    Args:
        stream: With its reads.

    Returns:
        By read, the modules of the sublayer behind it; nothing for what comes after the last one.
    """
    written: dict[int, list[str]] = defaultdict(list)
    for term in stream.terms:
        if term.sublayer is not None:
            written[term.sublayer].append(term.made_by or term.module)
    holders = Counter(p for paths in written.values() for p in {p for m in paths for p in _parts(m)})
    return {r.name: _fed(r, written.get(r.position, []), holders) for r in stream.depth_reads}


def _fed(read: Read, modules: Sequence[str], holders: Counter[str]) -> str:
    """The largest parts that the modules are in, and neither what reads nor another sublayer is.

    Their paths begin where that of the reading module goes another way.
    """
    around = set(_parts(read.module))
    own = [[p for p in _parts(m) if p not in around or p == m] for m in modules]
    names = [next((p for p in parts if holders[p] == 1), parts[0]) for parts in own if parts]
    return " + ".join(dict.fromkeys(_beside(n, around) for n in names))


def _beside(name: str, around: set[str]) -> str:
    """A module path without the part that is around what reads, but with the name of a list of modules."""
    steps = name.split(".")
    shared = sum(p in around for p in _parts(name)[:-1])
    if steps[shared].isdigit():
        shared -= 1
    return ".".join(steps[max(shared, 0) :])


def _parts(module: str) -> list[str]:
    """The path of a module and of those around it, the outermost first."""
    steps = module.split(".") if module else []
    return [".".join(steps[: i + 1]) for i in range(len(steps))]


def _width(stream: Stream) -> int | str:
    """The width of a stream, and where it is if that is not the last dimension."""
    return stream.width if stream.dimension == -1 else f"{stream.width} in dimension {stream.dimension}"


def _runs(sizes: Sequence[int]) -> str:
    """Block sizes in short: `8 of 6`, or `3 of 6 + 1 of 4`."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    return " + ".join(f"{count} of {size}" for count, size in runs)


def left_lines(left: Sequence[tuple[Stream, str]], refusals: Sequence[Refusal]) -> list[str]:
    """What was left alone, one line for every reason, and what was refused, one line for every kind."""
    reasons: dict[str, list[Stream]] = defaultdict(list)
    for stream, why in left:
        reasons[why].append(stream)
    lines = [f"left alone: {_named(streams)}: {why}" for why, streams in reasons.items()]
    lines += remarks(refusals)
    return ["", *lines] if lines else []


def _named(streams: Sequence[Stream]) -> str:
    names = [f"{s.name} ({counted(s.num_sublayers, 'sublayer')})" for s in streams[:_NAMES_SHOWN]]
    more = [f"{len(streams) - _NAMES_SHOWN} more"] if len(streams) > _NAMES_SHOWN else []
    return ", ".join([*names, *more])


def note_lines(notes: Sequence[str]) -> list[str]:
    """What the capture has to say, one line for all places of which it says the same."""
    return ["", *(f"note: {n}" for n in by_kind(notes))] if notes else []


def choice_lines(streams: Sequence[Stream], converted: Sequence[str], selection: str | Sequence[str]) -> list[str]:
    """What a conversion would read, and which other choices there are.

    Args:
        streams: All streams.
        converted: Names of those that the config asks for.
        selection: What it says.
    """
    reads = sum(len(s.depth_reads) for s in streams if s.name in converted)
    names = ", ".join(repr(n) for n in converted[:_NAMES_SHOWN]) + (", …" if len(converted) > _NAMES_SHOWN else "")
    lines = [f"convert reads {names} by attention over depth, {counted(reads, 'read')} (streams={selection!r})"]
    if len(streams) > 1:
        known = ", ".join(repr(s.name) for s in streams[:_NAMES_SHOWN]) + (", …" if len(streams) > _NAMES_SHOWN else "")
        lines.append(f"to choose: AttnResConfig(streams=...) takes 'main', 'all', or names: {known}")
    return ["", *lines]


def reads_table(rows: Sequence[Mapping[str, object]], streams: int) -> str:
    """Rows of reads as a table, without the stream where there is one alone."""
    hidden = {"stream"} if streams == 1 else set()
    return table([{h: cell for h, cell in row.items() if h not in hidden} for row in rows])


def short_line(line: str) -> str:
    """The last two parts of a path, and the line number."""
    return "/".join(line.split("/")[-2:])
