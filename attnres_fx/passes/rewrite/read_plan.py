"""What a conversion puts in the place of the reads of a graph, as data: decided here, executed by the rewrite.

The rewrite, the new parameters, the keys of an attached model, the report, saved files and the partitioner all take it
from here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from attnres_fx.passes.depth_source import ROOT, Source
from attnres_fx.passes.schedule import DepthSchedule
from attnres_fx.passes.streams.stream import Read, Stream, StreamSet
from attnres_fx.state_config import StreamBlocks

#: What a term is counted under while a graph is rewritten: a source, or the label of a term outside the chain.
Group = Source | str


def extra_label(written_by: str) -> str:
    """How a term outside the chain is named among sources, by the addition that writes it."""
    return f"+{written_by}"


@dataclass(frozen=True)
class DepthReadPlan:
    """What one read becomes: a call of the depth-attention operator at one node, and what it is given.

    Attributes:
        stream: Name of the stream.
        read: Name of the read, which its parameters go by.
        site: The node whose value it replaces.
        state: The node that holds the sum.
        consumers: The nodes that take the sum, or a row map of it.
        position: Sublayers written before it.
        seen: Its sources in the chain, oldest first.
        extras: Terms outside the chain that it sees as well, by the addition that writes each.
        block: Index of the block it belongs to.
        gain: What the mixture is multiplied by. For output `"sum"` S, and 2 where a source's weight is a sigmoid, which
            starts at a half; 1 for `"mean"` (arXiv 2603.15031, section 3).
        gated: Whether it moves a post-norm state through a gate. Where its sources add up to the state it needs none:
            there neither gate nor query would get a gradient from a fresh start.
        width: D, the size of the dimension that holds the features.
        num_parameters: Elements of all that is added for it.
        summary: What the next block receives, where the read stands at the end of a block of `local`.
        makes_summary: Whether the next block receives this read; of several at one end, only the first makes it.
        dimension: Which dimension of the site holds the features; -1 for the last.
        writes: Whether what is added for it also writes the output of the sublayer before it, as the first read behind
            each sublayer does with hyper-connections.
    """

    stream: str
    read: str
    site: str
    state: str
    consumers: tuple[str, ...]
    position: int
    seen: tuple[Source, ...]
    extras: tuple[str, ...]
    block: int
    gain: float
    gated: bool
    width: int
    num_parameters: int
    summary: Source | None = None
    makes_summary: bool = False
    dimension: int = -1
    writes: bool = False

    @classmethod
    def of_read(
        cls, stream: Stream, read: Read, *, shapes: Mapping[str, tuple[int, ...]], **decided: Any
    ) -> "DepthReadPlan":
        """The plan of a read as it was found.

        Args:
            stream: The stream.
            read: One of its reads.
            shapes: Of the parameters that are added for it, by name.
            **decided: What the stream and the read do not say; the site where it is another.
        """
        found: dict[str, Any] = {n: getattr(read, n) for n in ("site", "state", "consumers", "position", "extras")}
        elements = sum(map(math.prod, shapes.values()))
        of_stream = {"stream": stream.name, "width": stream.width, "num_parameters": elements}
        return cls(read=read.name, **{**found, **of_stream, **decided})

    @property
    def num_sources(self) -> int:
        """S."""
        return len(self.seen) + len(self.extras)

    @property
    def sources(self) -> tuple[str, ...]:
        """A label for each source, in the order of the operator's sources."""
        return tuple(str(group) for group in (*self.seen, *self.extra_groups))

    @property
    def groups(self) -> tuple[Group, ...]:
        """What each source is counted under while the graph is rewritten, in the same order."""
        return (*(source.group for source in self.seen), *self.extra_groups)

    @property
    def extra_groups(self) -> tuple[str, ...]:
        """The labels of the sources outside the chain."""
        return tuple(map(extra_label, self.extras))


@dataclass(frozen=True)
class TermPlan:
    """What a term of a stream counts as.

    Attributes:
        node: The node that writes it.
        source: The source that it is, or is summed into; None for a term outside the chain, a source of its own.
    """

    node: str
    source: Source | None

    @staticmethod
    def of_stream(stream: Stream, schedule: DepthSchedule) -> tuple["TermPlan", ...]:
        """The root and the terms of a stream under a schedule."""
        terms = [
            TermPlan(t.written_by, None if t.sublayer is None else schedule.group_of(t.sublayer)) for t in stream.terms
        ]
        return (TermPlan(stream.root.node, ROOT), *terms)

    @property
    def group(self) -> Group:
        """The source, or the label of a term outside the chain."""
        return extra_label(self.node) if self.source is None else self.source


@dataclass(frozen=True)
class BlockEnd:
    """The end of a block of `local` where no read of the stream alone stands.

    Attributes:
        node: The node that writes the block's last term.
        summary: What the next block receives: the plain sum of the block's sources.
    """

    node: str
    summary: Source


@dataclass(frozen=True)
class StreamPlan:
    """What one stream becomes: its blocks, its terms and its reads.

    Attributes:
        stream: The stream, as it was found.
        schedule: Its blocks.
        reads: Its reads that get an operator, in execution order.
        terms: Its root and its terms, with the source that each counts as.
        unread_ends: The ends of blocks that hand on a plain sum.
    """

    stream: Stream
    schedule: DepthSchedule
    reads: tuple[DepthReadPlan, ...] = field(repr=False)
    terms: tuple[TermPlan, ...] = field(default=(), repr=False)
    unread_ends: tuple[BlockEnd, ...] = field(default=(), repr=False)

    @property
    def blocks(self) -> StreamBlocks:
        """Its blocks, as a state names them."""
        return StreamBlocks(self.stream.name, self.schedule.starts, self.schedule.num_sublayers)

    @property
    def num_parameters(self) -> int:
        """Elements of all that is added for the stream."""
        return sum(read.num_parameters for read in self.reads)


@dataclass(frozen=True)
class ReadPlan:
    """What the streams of one graph become.

    Attributes:
        streams: One plan for each stream that is rewritten.
        reads: The reads of all of them, in execution order.
    """

    streams: tuple[StreamPlan, ...]
    reads: tuple[DepthReadPlan, ...] = field(repr=False)

    @staticmethod
    def of_streams(streams: StreamSet, plans: tuple[StreamPlan, ...]) -> "ReadPlan":
        """The plan of a graph.

        Args:
            streams: All streams of the graph.
            plans: Of those that are rewritten, with a read for each depth read of the stream.
        """
        order = {node.name: i for i, node in enumerate(streams.sums.nodes)}
        # By the site that analysis gives: a read at a block's end stands at its state, and counts where it stood
        # before.
        pairs = [pair for p in plans for pair in zip(p.stream.depth_reads, p.reads, strict=True)]
        return ReadPlan(plans, tuple(plan for _, plan in sorted(pairs, key=lambda pair: order[pair[0].site])))

    @property
    def blocks(self) -> tuple[StreamBlocks, ...]:
        """The blocks of each stream, as a state names them."""
        return tuple(s.blocks for s in self.streams)
