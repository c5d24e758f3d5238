"""A read plan executed on a graph, whatever takes the place of a read: state by state, in graph order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from attnres_fx.passes.graph.nodes import nodes_without_gradients
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.rewrite.orphans import remove_orphans
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan, ReadPlan, StreamPlan
from attnres_fx.passes.rewrite.sources import Moved
from attnres_fx.passes.rewrite.stream_states import StreamStates
from attnres_fx.passes.streams.formal_sum import FormalSums
from attnres_fx.passes.streams.stream import StreamSet


@dataclass(frozen=True)
class Replacement:
    """A planned read as it stands in a graph.

    Attributes:
        plan: What was planned.
        node: The node that reads, depth attention for one.
        source_nodes: The node of each of the plan's sources.
    """

    plan: DepthReadPlan
    node: str
    source_nodes: tuple[str, ...]

    @property
    def stream(self) -> str:
        """Name of the stream."""
        return self.plan.stream

    @property
    def read(self) -> str:
        """Name of the read."""
        return self.plan.read

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """Label and node name of each source."""
        return tuple(zip(self.plan.sources, self.source_nodes, strict=True))


#: Makes the states of one stream: of a graph, its sums, the plan of the stream, what was moved so far, and the nodes
#: that run with gradients off.
MakeStates = Callable[[Graph, FormalSums, StreamPlan, Moved, frozenset[Node]], StreamStates]
#: Inserts a read at the graph's insertion point, of a plan, its site and the nodes of its sources; returns the node
#: that takes the place of the site, and the node that reads.
PutRead = Callable[[DepthReadPlan, Node, list[Node]], tuple[Node, Node]]


def execute_plan(
    gm: GraphModule, streams: StreamSet, plan: ReadPlan, *, states: MakeStates = StreamStates, put: PutRead
) -> PassResult:
    """Put something in the place of every planned read, in place.

    The additions that this leaves without users are removed; everything else stays.

    Args:
        gm: The graph.
        streams: The streams of this graph.
        plan: What becomes of them, planned on this graph.
        states: Makes the states of a stream.
        put: Inserts a read.

    Returns:
        A `Replacement` for each read, and the names of the nodes that were removed.

    Raises:
        RewriteError: A read of the graph does not see the sources that were planned.
    """
    moved: Moved = {}
    frozen = nodes_without_gradients(gm.graph)
    every = [states(gm.graph, streams.sums, s, moved, frozen) for s in plan.streams]
    # Node by node through all streams at once: what one of them writes, another may be read from.
    owner = {node: states for states in every for node in states.nodes}
    nodes = sorted(owner)
    replacements: list[Replacement] = []
    for node in nodes:
        owner[node].evaluate(node)
        replacements += _rewrite_reads(node, owner[node], put)
    removed = remove_orphans(gm.graph, streams.sums, [(n, owner[n].builder.tables[n]) for n in reversed(nodes)])
    gm.graph.lint()
    return PassResult(gm, bool(replacements), tuple(replacements), removed)


def _rewrite_reads(site: Node, states: StreamStates, put: PutRead) -> Iterable[Replacement]:
    for read in states.reads_at(site):
        consumed = states.consumed(read)
        states.builder.without_gradients = site in states.builder.frozen
        with states.graph.inserting_before(states.behind(site)):
            sources = states.sources(read, site)
            value, node = put(read, site, sources)
        replayed = [(user, seen, states.builder.replay_maps(value, site, seen)) for user, seen in consumed]
        for user, seen, replacement in replayed:
            user.replace_input_with(seen, replacement)
            states.builder.moved[user, seen] = replacement
        states.go_on_from(read, site, value)
        yield Replacement(read, node.name, tuple(s.name for s in sources))
