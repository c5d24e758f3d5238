"""What attention over depth makes of the streams of a graph: which read sees what, and what it hands on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch.fx import Node

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import ConfigError
from attnres_fx.passes.graph.result import defects_named
from attnres_fx.passes.rewrite.read_plan import BlockEnd, DepthReadPlan, ReadPlan, StreamPlan, TermPlan
from attnres_fx.passes.schedule import DepthSchedule, plan_schedule
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums, Mapped, Merged
from attnres_fx.passes.streams.stream import Read, Stream, StreamSet
from attnres_fx.stream_reads import depth_read_shapes


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
    return ReadPlan.of_streams(streams, plans)


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
        stream, schedule, tuple(reads), TermPlan.of_stream(stream, schedule), _unread_ends(stream, schedule, reads)
    )


def _plan_read(stream: Stream, read: Read, schedule: DepthSchedule, config: AttnResConfig) -> DepthReadPlan:
    seen = schedule.sources(read.position)
    # A read that sees more than the chain goes on with cannot stand for the chain.
    summary = None if read.extras else schedule.summary_at(read.position)
    summed = config.output == "sum"
    num_sources = len(seen) + len(read.extras)
    even = 2.0 if config.weights == "sigmoid" else float(num_sources)  # one over a weight at the start
    gated = summed and stream.post_norm and (bool(read.extras) or not schedule.sees_whole_state(read.position))
    shapes = depth_read_shapes(stream.width, config, gated=gated, num_sources=num_sources)
    return DepthReadPlan.of_read(
        stream,
        read,
        # At the end of a local block the state itself, since the chain goes on from it.
        site=read.state if summary is not None and not stream.post_norm else read.site,
        seen=seen,
        block=schedule.block_of_read(read.position),
        gain=even if summed and not gated else 1.0,
        gated=gated,
        shapes=shapes,
        summary=summary,
    )


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


def _unread_ends(stream: Stream, schedule: DepthSchedule, reads: Sequence[DepthReadPlan]) -> tuple[BlockEnd, ...]:
    if stream.post_norm:
        return ()
    last_term = {t.sublayer: t.written_by for t in stream.terms}
    ended = {read.summary for read in reads if read.makes_summary}
    summaries = (schedule.summary_at(start) for start in schedule.starts)
    unread = (s for s in summaries if s is not None and s not in ended)
    return tuple(BlockEnd(last_term[schedule.maker_of(s)], s) for s in unread)
