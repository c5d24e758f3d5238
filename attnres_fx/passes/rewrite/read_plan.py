"""What a conversion puts in the place of the reads of a graph, as data: decided here, executed by the rewrite.

The rewrite, the new parameters, the keys of an attached model, the report, saved files and the partitioner all take it
from here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Node

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import ConfigError
from attnres_fx.passes.depth_source import ROOT, Source
from attnres_fx.passes.graph.result import defects_named
from attnres_fx.passes.schedule import DepthSchedule, plan_schedule
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums, Mapped, Merged
from attnres_fx.passes.streams.stream import Read, Stream, StreamSet
from attnres_fx.state_config import StreamBlocks

#: What a term is counted under while a graph is rewritten: a source, or the label of a term outside the chain.
Group = Source | str


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
        return tuple(map(_extra_label, self.extras))


@dataclass(frozen=True)
class TermPlan:
    """What a term of a stream counts as.

    Attributes:
        node: The node that writes it.
        source: The source that it is, or is summed into; None for a term outside the chain, a source of its own.
    """

    node: str
    source: Source | None

    @property
    def group(self) -> Group:
        """The source, or the label of a term outside the chain."""
        return _extra_label(self.node) if self.source is None else self.source


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

    @property
    def blocks(self) -> tuple[StreamBlocks, ...]:
        """The blocks of each stream, as a state names them."""
        return tuple(s.blocks for s in self.streams)


def plan_depth_reads(
    streams: StreamSet,
    selected: tuple[Stream, ...],
    config: AttnResConfig,
    *,
    block_layouts: Mapping[str, DepthSchedule] | None = None,
) -> ReadPlan:
    """Decide what the rewrite does to a graph.

    Args:
        streams: All streams of the graph.
        selected: Those to rewrite.
        config: Variant, blocks and output mode.
        block_layouts: Blocks to take instead of the config's, by stream name.

    Returns:
        The plan that `insert_depth_attention_pass` executes. It names nodes of this graph and of no other.

    Raises:
        ScheduleError: The blocks of the config do not fit a stream.
        RewriteError: Planning raised an error that is not one of the library's; it is the cause.
    """
    with defects_named("planning the depth reads"):
        return _plan(streams, selected, config, block_layouts or {})


def _plan(
    streams: StreamSet, selected: tuple[Stream, ...], config: AttnResConfig, block_layouts: Mapping[str, DepthSchedule]
) -> ReadPlan:
    plans = tuple(
        _plan_stream(s, block_layouts.get(s.name) or plan_schedule(s.num_sublayers, config), config, streams.sums)
        for s in selected
    )
    return in_execution_order(streams, selected, plans)


def in_execution_order(streams: StreamSet, selected: Sequence[Stream], plans: tuple[StreamPlan, ...]) -> ReadPlan:
    """The plan of a graph from those of its streams.

    Args:
        streams: All streams of the graph.
        selected: Those that are rewritten.
        plans: One for each of them, with a read for each of its depth reads.
    """
    order = {node.name: i for i, node in enumerate(streams.sums.nodes)}
    # By the site that analysis gives: a read at a block's end stands at its state, and counts where it stood before.
    sites = [(order[read.site], plan) for s, p in zip(selected, plans, strict=True) for read, plan in _paired(s, p)]
    return ReadPlan(plans, tuple(plan for _, plan in sorted(sites, key=lambda pair: pair[0])))


def _paired(stream: Stream, plan: StreamPlan) -> list[tuple[Read, DepthReadPlan]]:
    return list(zip(stream.depth_reads, plan.reads, strict=True))


def _plan_stream(stream: Stream, schedule: DepthSchedule, config: AttnResConfig, sums: FormalSums) -> StreamPlan:
    if stream.depth_reads and stream.width % config.heads:
        raise ConfigError(
            f"heads={config.heads} does not divide the width {stream.width} of the stream {stream.name!r}: choose a "
            f"number of heads that does."
        )
    reads = [_plan_read(stream, read, schedule, config) for read in stream.depth_reads]
    by_name = {node.name: node for node in sums.nodes}
    reads = [replace(r, dimension=sums.features.dimension(by_name[r.site])) for r in reads]
    makers = _summary_makers(stream, reads, sums)
    reads = [replace(read, makes_summary=i in makers) for i, read in enumerate(reads)]
    return StreamPlan(
        stream, schedule, tuple(reads), plan_terms(stream, schedule), _unread_ends(stream, schedule, reads)
    )


def _plan_read(stream: Stream, read: Read, schedule: DepthSchedule, config: AttnResConfig) -> DepthReadPlan:
    seen = schedule.sources(read.position)
    # A read that sees more than the chain goes on with cannot stand for the chain.
    summary = None if read.extras else schedule.summary_at(read.position)
    summed = config.output == "sum"
    num_sources = len(seen) + len(read.extras)
    even = 2.0 if config.weights == "sigmoid" else float(num_sources)  # one over a weight at the start
    gated = summed and stream.post_norm and (bool(read.extras) or not schedule.sees_whole_state(read.position))
    return DepthReadPlan(
        stream=stream.name,
        read=read.name,
        # At the end of a local block the state itself, since the chain goes on from it.
        site=read.state if summary is not None and not stream.post_norm else read.site,
        state=read.state,
        consumers=read.consumers,
        position=read.position,
        seen=seen,
        extras=read.extras,
        block=schedule.block_of_read(read.position),
        gain=even if summed and not gated else 1.0,
        gated=gated,
        width=stream.width,
        num_parameters=_num_parameters(stream.width, gated, num_sources, config),
        summary=summary,
    )


def _num_parameters(width: int, gated: bool, num_sources: int, config: AttnResConfig) -> int:
    """Elements of query, key gain, gate and bias."""
    query = width**2 if config.query == "input" else width
    return config.has_queries * (query + width) + gated + config.has_biases * num_sources


def _carried_on(stream: Stream, sums: FormalSums) -> set[str]:
    """The states that another term is added to, whatever is done to them before that."""
    by_name = {node.name: node for node in sums.nodes}
    roots = {sums.root[by_name[read.state]] for read in stream.reads}
    extended = [
        parent
        for node, state in sums.states.items()
        if sums.root[node] in roots and isinstance(state, Extended | Merged)
        for parent in sums.parents(node)
    ]
    return {node.name for node in sums.carried_on(extended)}


def _summary_makers(stream: Stream, reads: Sequence[DepthReadPlan], sums: FormalSums) -> set[int]:
    """Indices of the reads that the next block receives: the first at each state, and at whatever maps that state.

    What reads only the state times something makes none: the chain goes on from the state itself.
    """
    post_norm = stream.post_norm
    carried = set() if post_norm else _carried_on(stream, sums)
    by_name = {node.name: node for node in sums.nodes}
    ends = [i for i, read in enumerate(reads) if read.summary is not None and (post_norm or read.state in carried)]
    makers: set[int] = set()
    taken: set[Node] = set()
    for i in sorted(ends, key=lambda i: by_name[reads[i].site]):
        path = [by_name[reads[i].site]]
        while not post_norm and isinstance(step := sums.states[path[-1]], Mapped):
            path.append(step.state)
        if taken.isdisjoint(path):
            makers.add(i)
            taken.add(path[0])
    return makers


def plan_terms(stream: Stream, schedule: DepthSchedule) -> tuple[TermPlan, ...]:
    terms = [
        TermPlan(t.written_by, None if t.sublayer is None else schedule.group_of(t.sublayer)) for t in stream.terms
    ]
    return (TermPlan(stream.root.node, ROOT), *terms)


def _unread_ends(stream: Stream, schedule: DepthSchedule, reads: Sequence[DepthReadPlan]) -> tuple[BlockEnd, ...]:
    if stream.post_norm:
        return ()
    last_term = {t.sublayer: t.written_by for t in stream.terms}
    ended = {read.summary for read in reads if read.makes_summary}
    summaries = (schedule.summary_at(start) for start in schedule.starts)
    unread = (s for s in summaries if s is not None and s not in ended)
    return tuple(BlockEnd(last_term[schedule.maker_of(s)], s) for s in unread)


def _extra_label(written_by: str) -> str:
    """How a term outside the chain is named among sources, by the addition that writes it."""
    return f"+{written_by}"


__all__ = ["BlockEnd", "DepthReadPlan", "Group", "ReadPlan", "StreamPlan", "TermPlan", "plan_depth_reads"]
