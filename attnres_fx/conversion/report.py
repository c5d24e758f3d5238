"""What was found and what was changed, as data and as tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from attnres_fx.config import AttnResConfig, RewriteConfig
from attnres_fx.conversion.report_text import (
    choice_lines,
    converted_rows,
    fed_by,
    left_lines,
    note_lines,
    reads_table,
    short_line,
    stream_rows,
)
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan, StreamPlan
from attnres_fx.passes.streams.refusals import Refusal
from attnres_fx.passes.streams.stream import Stream
from attnres_fx.report_page import ReportPage, Shown
from attnres_fx.shown import counted, short_paths


@dataclass(frozen=True, repr=False)
class StreamReport(Shown):
    """The residual streams of a model, as `inspect` sees them: print it, or ask for `.reads_table()`.

    Attributes:
        model: Name of the model's class.
        streams: The streams, in graph order.
        refusals: What looks like a stream and is none, with the reason.
        notes: What the capture has to say.
        config: What the model would be converted with.
        converted: Names of the streams that `convert` would rewrite.
        left: The streams that it would leave alone, with the reason.
        error: The error that `convert` would raise instead; empty where it would not.
    """

    model: str
    streams: tuple[Stream, ...]
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    config: RewriteConfig = field(default_factory=AttnResConfig)
    converted: tuple[str, ...] = ()
    left: tuple[tuple[Stream, str], ...] = ()
    error: str = ""

    def _page(self) -> ReportPage:
        reads = sum(len(s.depth_reads) for s in self.streams)
        head = f"{self.model}: {counted(len(self.streams), 'residual stream')}"
        if self.streams:
            head += f", {counted(reads, 'read')}"
        lines: list[str] = []
        if self.error:
            lines = ["", short_paths(f"convert raises {self.error}")]
        elif self.converted:
            lines = choice_lines(self.streams, self.converted, self.config.streams)
        lines += [*left_lines(self.left, self.refusals), *note_lines(self.notes)]
        return ReportPage((head,), stream_rows(self.streams, self.converted), lines)

    def reads_table(self) -> str:
        """One line a read: name, the sublayer it feeds, sublayers before it, line of the layer's code.

        Returns:
            A table to print. What sees the root alone is no read.
        """
        rows = [
            {
                "stream": s.name,
                "read": r.name,
                "feeds": feeds[r.name] or "-",
                "after": r.position,
                "line": short_line(r.line),
            }
            for s in self.streams
            for feeds in (fed_by(s),)
            for r in s.depth_reads
        ]
        return reads_table(rows, len(self.streams))


@dataclass(frozen=True, repr=False)
class ConversionReport(Shown):
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
    config: RewriteConfig
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
        """Elements of all parameters added."""
        return sum(s.num_parameters for s in self.streams)

    def add_mode(self, mode: str) -> None:
        """Say that a deferred mode has a graph now."""
        self._set("modes", tuple(sorted({*self.modes, mode})))
        self._set("deferred", tuple(m for m in self.deferred if m != mode))

    def fail_mode(self, mode: str, why: str) -> None:
        """Say that a mode has no graph."""
        self._set("deferred", tuple(m for m in self.deferred if m != mode))
        self.add_note(f"no {mode} graph: {shortened(why)}")

    def follow(self, config: RewriteConfig, streams: tuple[StreamPlan, ...]) -> None:
        """Say what a program was rewritten with, where that is another config than before."""
        if config != self.config:
            self._set("config", config)
            self._set("streams", streams)
            self._set("difference", None)  # that of the programs before

    def take(self, report: "ConversionReport") -> None:
        """Say what another report says."""
        for name in self.__dataclass_fields__:
            self._set(name, getattr(report, name))

    def add_note(self, note: str) -> None:
        """Say one more thing, once."""
        if note not in self.notes:
            self._set("notes", (*self.notes, note))

    def note_difference(self, difference: float) -> None:
        """Keep the largest difference of the modes that were compared."""
        self._set("difference", max(difference, self.difference or 0.0))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen for those who read it

    def _page(self) -> ReportPage:
        head = (
            f"{self.model}: {counted(len(self.streams), 'stream')} {self.config.does}, "
            f"{counted(self.num_reads, 'read')}, {self.num_parameters:,} parameters added"
        )
        options = f"{self.config.summary}, modes {'/'.join(self.modes)}"
        if self.deferred:
            options += f" ({'/'.join(self.deferred)} when first needed)"
        if self.difference is not None:
            options += f", outputs differ by {self.difference:.1e} {self.config.at_start}"
        lines = [*left_lines(self.left, self.refusals), *note_lines(self.notes)]
        return ReportPage((head, options), converted_rows(self.streams), lines)

    def reads_table(self) -> str:
        """One line a read: name, the sublayer it feeds, block, sources, parameters.

        Returns:
            A table to print.
        """
        rows = [
            {
                "stream": s.stream.name,
                "read": r.read,
                "feeds": feeds[r.read] or "-",
                "block": r.block + 1,
                "sources": len(r.sources),
                "which": _joined(r.sources),
                "parameters": r.num_parameters,
            }
            for s in self.streams
            for feeds in (fed_by(s.stream),)
            for r in s.reads
        ]
        return reads_table(rows, len(self.streams))


def _joined(labels: Sequence[str]) -> str:
    return " ".join(labels) if len(labels) <= 6 else " ".join((*labels[:2], "…", *labels[-3:]))


def shortened(text: str, length: int = 160) -> str:
    """A text cut at a word."""
    return text if len(text) <= length else f"{text[:length].rsplit(' ', 1)[0]} …"
