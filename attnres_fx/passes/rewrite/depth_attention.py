"""Put depth attention where residual streams are read.

Before:
    h1 = h0 + attn(norm_1(h0))
    h2 = h1 + mlp(norm_2(h1))
    y  = head(norm_3(h2))
After (variant "full"):
    v1 = attn(norm_1(h0))
    r1 = depth_attention([h0, v1], q1, k1, eps, 2)
    v2 = mlp(norm_2(r1))
    r2 = depth_attention([h0, v1, v2], q2, k2, eps, 3)
    y  = head(norm_3(r2))
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from attnres_fx.passes.graph.nodes import nodes_without_gradients
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.rewrite.insertion import ReadParameters, insert_read
from attnres_fx.passes.rewrite.orphans import remove_orphans
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan, ReadPlan
from attnres_fx.passes.rewrite.sources import Moved
from attnres_fx.passes.rewrite.stream_states import StreamStates
from attnres_fx.passes.streams.stream import StreamSet

#: Inserts, at the graph's insertion point, the nodes that hold a read's parameters; the node it is called with is the
#: one whose metadata and value they take after.
FetchParameters = Callable[[DepthReadPlan, Node], ReadParameters]


@dataclass(frozen=True)
class Replacement:
    """A planned read as it stands in a graph.

    Attributes:
        plan: What was planned.
        node: The depth-attention node.
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


def insert_depth_attention_pass(
    gm: GraphModule, *, streams: StreamSet, plan: ReadPlan, eps: float, fetch: FetchParameters
) -> PassResult:
    """Execute a read plan, in place.

    The additions that this leaves without users are removed; everything else stays.

    Args:
        gm: The graph.
        streams: The streams of this graph.
        plan: What becomes of them, planned on this graph.
        eps: Added to the mean square of a source.
        fetch: Inserts the parameters of a read.

    Returns:
        A `Replacement` for each read, and the names of the nodes that were removed.

    Raises:
        RewriteError: A read of the graph does not see the sources that were planned, or lacks its gate.
    """
    moved: Moved = {}
    frozen = nodes_without_gradients(gm.graph)
    every = [StreamStates(gm.graph, streams.sums, s, moved, frozen) for s in plan.streams]
    # Node by node through all streams at once: what one of them writes, another may be read from.
    owner = {node: states for states in every for node in states.nodes}
    nodes = sorted(owner)
    replacements: list[Replacement] = []
    for node in nodes:
        states = owner[node]
        states.evaluate(node)
        replacements += [_rewrite_read(read, node, states, eps, fetch) for read in states.reads_at(node)]
    removed = remove_orphans(gm.graph, streams.sums, [(n, owner[n].builder.tables[n]) for n in reversed(nodes)])
    gm.graph.lint()
    return PassResult(gm, bool(replacements), tuple(replacements), removed)


def _rewrite_read(
    read: DepthReadPlan, site: Node, states: StreamStates, eps: float, fetch: FetchParameters
) -> Replacement:
    consumed = states.consumed(read)
    states.builder.without_gradients = site in states.builder.frozen
    with states.graph.inserting_before(site.next):
        sources = states.sources(read, site)
        value, node = insert_read(read, site, sources, fetch(read, site), eps)
    replayed = [(user, seen, states.builder.replay_maps(value, site, seen)) for user, seen in consumed]
    for user, seen, replacement in replayed:
        user.replace_input_with(seen, replacement)
        states.builder.moved[user, seen] = replacement
    states.go_on_from(read, site, value)
    return Replacement(read, node.name, tuple(s.name for s in sources))


__all__ = ["FetchParameters", "Replacement", "insert_depth_attention_pass"]
