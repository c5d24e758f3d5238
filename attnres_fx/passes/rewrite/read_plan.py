"""What a conversion puts in the place of the reads of a graph, as data: decided here, executed by the rewrite.

The rewrite, the new parameters, the keys of an attached model, the report, saved files and the partitioner all take it
from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from attnres_fx.config import AttnResConfig, Output
from attnres_fx.passes.schedule import DepthSchedule, Source, plan_schedule
from attnres_fx.passes.streams.finding import Read, Stream, StreamSet


@dataclass(frozen=True)
class DepthReadPlan:
    """What one read becomes.

    site: the node whose value it replaces. state: the node that holds the sum. consumers: the nodes that take it.
    position: sublayers written before it. seen: its sources, oldest first. extras: terms outside the chain that it
        sees as well, by the addition that writes each. block: the block it belongs to.
    gain: what the mixture is multiplied by. gated: whether it moves a post-norm state through a gate.
    width: D of its query and key gain.
    summary: where it ends a block of `local`, what the next block receives; of several such reads the first makes it.
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
    summary: Source | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """A label for each source, in the order of the operator's sources."""
        return tuple(str(group) for group in (*self.seen, *self.extra_groups))

    @property
    def groups(self) -> tuple[Source | str, ...]:
        """What each source is counted under while the graph is rewritten, in the same order."""
        return (*(source.group for source in self.seen), *self.extra_groups)

    @property
    def extra_groups(self) -> tuple[str, ...]:
        return tuple(map(extra_group, self.extras))

    @property
    def num_parameters(self) -> int:
        """Elements of query, key gain and gate."""
        return 2 * self.width + self.gated


@dataclass(frozen=True)
class StreamPlan:
    """What one stream becomes: its blocks and its reads, in execution order.

    unread_ends: summaries that are plain sums, since no read of the stream alone stands where the block before ends.
    """

    stream: Stream
    schedule: DepthSchedule
    reads: tuple[DepthReadPlan, ...]
    unread_ends: tuple[Source, ...] = ()

    @property
    def num_parameters(self) -> int:
        return sum(read.num_parameters for read in self.reads)


@dataclass(frozen=True)
class ReadPlan:
    """What the streams of one graph become. reads: those of all streams, in execution order."""

    streams: tuple[StreamPlan, ...]
    reads: tuple[DepthReadPlan, ...]


def plan_depth_reads(
    streams: StreamSet,
    selected: tuple[Stream, ...],
    config: AttnResConfig,
    *,
    schedules: Mapping[str, DepthSchedule] | None = None,
) -> ReadPlan:
    """What the rewrite will do to a graph.

    Args:
        streams: all streams of the graph.
        selected: those to rewrite.
        config: variant, blocks and output mode.
        schedules: blocks to take instead of the config's, by stream name.

    Returns:
        The plan that `insert_depth_attention_pass` executes. It names nodes of this graph and of no other.

    Raises:
        ScheduleError: The blocks of the config do not fit a stream.
    """
    schedules = schedules or {}
    plans = tuple(
        plan_stream(s, schedules.get(s.name) or plan_schedule(s.num_sublayers, config), config.output) for s in selected
    )
    order = {node.name: i for node, i in streams.sums.order.items()}
    sites = [(order[read.site], plan) for s, p in zip(selected, plans, strict=True) for read, plan in _paired(s, p)]
    return ReadPlan(plans, tuple(plan for _, plan in sorted(sites, key=lambda pair: pair[0])))


def _paired(stream: Stream, plan: StreamPlan) -> list[tuple[Read, DepthReadPlan]]:
    return list(zip(stream.depth_reads, plan.reads, strict=True))


def plan_stream(stream: Stream, schedule: DepthSchedule, output: Output) -> StreamPlan:
    """The reads of one stream under one schedule."""
    reads = tuple(_plan_read(stream, read, schedule, output) for read in stream.depth_reads)
    ends = (schedule.summary_at(start) for start in schedule.starts)
    ended = {read.summary for read in reads}
    unread = () if stream.post_norm else tuple(s for s in ends if s is not None and s not in ended)
    return StreamPlan(stream, schedule, reads, unread)


def _plan_read(stream: Stream, read: Read, schedule: DepthSchedule, output: Output) -> DepthReadPlan:
    seen = schedule.sources(read.position)
    # A read that sees more than the chain goes on with cannot stand for the chain.
    summary = None if read.extras else schedule.summary_at(read.position)
    summed = output == "sum"
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
        gain=float(len(seen) + len(read.extras)) if summed and not stream.post_norm else 1.0,
        gated=summed and stream.post_norm,
        width=stream.width,
        summary=summary,
    )


def extra_group(written_by: str) -> str:
    """How a term outside the chain is named among sources, by the addition that writes it."""
    return f"+{written_by}"


__all__ = ["DepthReadPlan", "ReadPlan", "StreamPlan", "plan_depth_reads", "plan_stream"]
