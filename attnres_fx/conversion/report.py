"""What was found and what was changed, as data and as tables."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

from attnres_fx.config import AttnResConfig
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan, StreamPlan
from attnres_fx.passes.streams.refusals import Refusal
from attnres_fx.passes.streams.stream import Stream

_STYLE = "simple"
_SHOWN_OF_A_KIND = 4


@dataclass(frozen=True)
class StreamReport:
    """The residual streams of a model, as `inspect` sees them: print it, or ask for `.reads_table()`.

    Attributes:
        model: Name of the model's class.
        streams: The streams, in graph order.
        refusals: What looks like a stream and is none, with the reason.
        notes: What the capture has to say.
    """

    model: str
    streams: tuple[Stream, ...]
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.model}: {_count(len(self.streams), 'residual stream')}"]
        if self.streams:
            rows = [_stream_row(s) for s in self.streams]
            lines += ["", tabulate(rows, headers="keys", tablefmt=_STYLE)]
        return "\n".join([*lines, *_left_lines((), self.refusals), *_note_lines(self.notes)])

    def reads_table(self) -> str:
        """One line a read: name, sublayers before it, line of the user's source.

        Returns:
            A table to print.
        """
        rows = [
            {"stream": s.name, "read": r.name, "after": r.position, "line": _short(r.line)}
            for s in self.streams
            for r in s.reads
        ]
        return tabulate(rows, headers="keys", tablefmt=_STYLE)


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` changed and what it left alone: print it, or ask for `.reads_table()`.

    Attributes:
        model: Name of the model's class.
        config: The config of the conversion.
        streams: The plans of the streams that were rewritten.
        left: The streams left alone, with the reason.
        refusals: What looks like a stream and is none, with the reason.
        modes: The modes that have a graph.
        deferred: The modes that are captured when they are first needed.
        difference: Largest difference of outputs at zero queries, over the largest output; None unchecked.
        notes: What the capture has to say.
    """

    model: str
    config: AttnResConfig
    streams: tuple[StreamPlan, ...]
    left: tuple[tuple[Stream, str], ...] = ()
    refusals: tuple[Refusal, ...] = ()
    modes: tuple[str, ...] = ()
    deferred: tuple[str, ...] = ()
    difference: float | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def reads(self) -> tuple[DepthReadPlan, ...]:
        """Every read that got an operator, in execution order within its stream."""
        return tuple(r for s in self.streams for r in s.reads)

    @property
    def num_reads(self) -> int:
        """Reads that got an operator."""
        return len(self.reads)

    @property
    def num_parameters(self) -> int:
        """Parameters added: queries, key gains and gates."""
        return sum(s.num_parameters for s in self.streams)

    def add_mode(self, mode: str) -> None:
        """Say that a deferred mode has a graph now."""
        self._set("modes", tuple(sorted({*self.modes, mode})))
        self._set("deferred", tuple(m for m in self.deferred if m != mode))

    def fail_mode(self, mode: str, why: str) -> None:
        """Say that a mode has no graph."""
        self._set("deferred", tuple(m for m in self.deferred if m != mode))
        self.add_note(f"no {mode} graph: {shortened(why)}")

    def add_note(self, note: str) -> None:
        """Say one more thing, once."""
        if note not in self.notes:
            self._set("notes", (*self.notes, note))

    def note_difference(self, difference: float) -> None:
        """Keep the largest difference of the modes that were compared."""
        self._set("difference", max(difference, self.difference or 0.0))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen for those who read it

    def __str__(self) -> str:
        head = (
            f"{self.model}: {_count(len(self.streams), 'stream')} read by attention over depth, "
            f"{_count(self.num_reads, 'read')}, {self.num_parameters:,} parameters added"
        )
        options = f"variant {self.config.variant}, output {self.config.output}, modes {'/'.join(self.modes)}"
        if self.deferred:
            options += f" ({'/'.join(self.deferred)} when first needed)"
        if self.difference is not None:
            options += f", outputs differ by {self.difference:.1e} at zero queries"
        rows = [_converted_row(s) for s in self.streams]
        table = tabulate(rows, headers="keys", tablefmt=_STYLE)
        return "\n".join([head, options, "", table, *_left_lines(self.left, self.refusals), *_note_lines(self.notes)])

    def reads_table(self) -> str:
        """One line a read: name, block, sources, parameters.

        Returns:
            A table to print.
        """
        rows = [
            {
                "stream": s.stream.name,
                "read": r.read,
                "block": r.block + 1,
                "sources": len(r.sources),
                "which": _joined(r.sources),
                "parameters": r.num_parameters,
            }
            for s in self.streams
            for r in s.reads
        ]
        return tabulate(rows, headers="keys", tablefmt=_STYLE)


def _stream_row(stream: Stream) -> dict[str, object]:
    return {
        "stream": stream.name,
        "root": stream.root.module or stream.root.node,
        "sublayers": stream.num_sublayers,
        "reads": len(stream.depth_reads),
        "width": _width(stream),
        "norm": "post" if stream.post_norm else "pre",
        "nested in": stream.nested_in or "",
        "first line": _short(stream.terms[0].line) if stream.terms else "",
    }


def _converted_row(converted: StreamPlan) -> dict[str, object]:
    stream, schedule = converted.stream, converted.schedule
    sizes = [len(b) for b in schedule.blocks]
    return {
        "stream": stream.name,
        "sublayers": stream.num_sublayers,
        "reads": len(converted.reads),
        "width": _width(stream),
        "norm": "post" if stream.post_norm else "pre",
        "blocks": "-" if schedule.variant == "full" else _runs(sizes),
        "most sources": max((len(r.sources) for r in converted.reads), default=0),
        "parameters": converted.num_parameters,
    }


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


def _left_lines(left: Sequence[tuple[Stream, str]], refusals: Sequence[Refusal]) -> list[str]:
    lines = [
        f"left alone: {s.name} ({_count(s.num_sublayers, 'sublayer')}): {why}"
        for s, why in left[: 2 * _SHOWN_OF_A_KIND]
    ]
    if len(left) > 2 * _SHOWN_OF_A_KIND:
        lines.append(f"left alone: … and {len(left) - 2 * _SHOWN_OF_A_KIND} more streams; see .left")
    shown: Counter[str] = Counter()
    for refusal in refusals:
        shown[refusal.kind] += 1
        if shown[refusal.kind] <= _SHOWN_OF_A_KIND:
            kind = "interrupted" if refusal.kind == "interrupted" else f"refused ({refusal.kind})"
            lines.append(f"{kind}: {refusal.place}: {refusal.reason}")
    lines += [f"… and {n - _SHOWN_OF_A_KIND} more ({k})" for k, n in shown.items() if n > _SHOWN_OF_A_KIND]
    return ["", *lines] if lines else []


def _note_lines(notes: Sequence[str]) -> list[str]:
    return ["", *(f"note: {n}" for n in notes)] if notes else []


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _joined(labels: Sequence[str]) -> str:
    return " ".join(labels) if len(labels) <= 6 else " ".join((*labels[:2], "…", *labels[-3:]))


def shortened(text: str, length: int = 160) -> str:
    """A text cut at a word."""
    return text if len(text) <= length else f"{text[:length].rsplit(' ', 1)[0]} …"


def _short(line: str) -> str:
    """The last two parts of a path, and the line number."""
    return "/".join(line.split("/")[-2:])
