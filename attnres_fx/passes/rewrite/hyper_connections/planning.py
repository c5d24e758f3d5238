"""What hyper-connections make of the streams of a graph, as data."""

from attnres_fx.passes.depth_source import Source
from attnres_fx.passes.graph.result import defects_named
from attnres_fx.passes.rewrite.hyper_connections.config import HyperConnectionsConfig
from attnres_fx.passes.rewrite.hyper_connections.connection import connection_shapes
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan, ReadPlan, StreamPlan, TermPlan
from attnres_fx.passes.schedule import DepthSchedule
from attnres_fx.passes.streams.formal_sum import FormalSums
from attnres_fx.passes.streams.stream import Read, Stream, StreamSet


def plan_hyper_connections(
    streams: StreamSet, selected: tuple[Stream, ...], config: HyperConnectionsConfig
) -> ReadPlan:
    """Decide what hyper-connections do to a graph.

    Args:
        streams: All streams of the graph.
        selected: Those to rewrite.
        config: The copies, and what their weights depend on.

    Returns:
        The plan that `insert_hyper_connections_pass` executes. The sources of a read are the copies, and every
        sublayer is a block of its own.

    Raises:
        RewriteError: Planning raised an error that is not one of the library's; it is the cause.
    """
    with defects_named("planning the hyper-connections"):
        return ReadPlan.of_streams(streams, tuple(_plan_stream(s, config, streams.sums) for s in selected))


def copy_sources(count: int) -> tuple[Source, ...]:
    """The copies of a stream as sources."""
    return tuple(Source("copy", start=i) for i in range(count))


def _plan_stream(stream: Stream, config: HyperConnectionsConfig, sums: FormalSums) -> StreamPlan:
    schedule = DepthSchedule("full", tuple(range(stream.num_sublayers)), stream.num_sublayers)
    nodes = {node.name: node for node in sums.nodes}
    first: dict[int, Read] = {}
    for read in stream.depth_reads:
        first.setdefault(read.position, read)
    reads = [
        _plan_read(stream, r, config, sums.features.dimension(nodes[r.site]), writes=first[r.position] is r)
        for r in stream.depth_reads
    ]
    return StreamPlan(stream, schedule, tuple(reads), TermPlan.of_stream(stream, schedule))


def _plan_read(
    stream: Stream, read: Read, config: HyperConnectionsConfig, dimension: int, *, writes: bool
) -> DepthReadPlan:
    # The copies add the sublayers up beside the norms: at the first norm they are what it sees anyway.
    gated = stream.post_norm and (bool(read.extras) or read.position > 1)
    writes = writes and read.position > 0
    return DepthReadPlan.of_read(
        stream,
        read,
        seen=copy_sources(config.copies),
        block=max(read.position - 1, 0),
        gain=1.0,
        gated=gated,
        shapes=connection_shapes(stream.width, config, place=read.position, writes=writes, gated=gated),
        dimension=dimension,
        writes=writes,
    )
