"""Where in a graph a depth profile looks: what each sublayer writes, and what each read sees."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from attnres_fx.analysis.graph_of_call import GraphOfCall
from attnres_fx.analysis.written_back import written_back
from attnres_fx.analysis.written_nodes import written_nodes
from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.report_text import root_of
from attnres_fx.passes import Stream, StreamSet, plan_depth_reads
from attnres_fx.passes.rewrite.execution import Replacement
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan
from attnres_fx.passes.rewrite.stream_states import StreamStates


@dataclass(frozen=True)
class WritePlace:
    """What one sublayer writes.

    Attributes:
        stream: Name of the stream.
        index: From 1; 0 for the root.
        name: Modules that make it.
        nodes: The terms that it is the sum of.
    """

    stream: str
    index: int
    name: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class ReadPlace:
    """What one read sees.

    Attributes:
        plan: What a conversion plans, or planned.
        node: The attention over depth; the state itself, in a plain sum.
        sources: The node of each of the plan's sources.
        back: How many sublayers were written after each.
        attends: Whether the node is attention over depth.
        summed: Whether what the read returns is the weighted sum of its sources.
    """

    plan: DepthReadPlan
    node: str
    sources: tuple[str, ...]
    back: tuple[float, ...]
    attends: bool
    summed: bool


@dataclass(frozen=True)
class Places:
    """Everything that is looked at in one graph.

    Attributes:
        streams: Names of the streams, in graph order.
        writes: Of all of them, the root of each first.
        reads: Of all of them, in execution order.
    """

    streams: tuple[str, ...]
    writes: tuple[WritePlace, ...]
    reads: tuple[ReadPlace, ...]

    def last_read(self, stream: str) -> ReadPlace | None:
        """The read of a stream that has most behind it, of those that see the stream alone."""
        own = [r for r in self.reads if r.plan.stream == stream and not r.plan.extras and r.summed]
        return max(own, key=lambda r: r.plan.position, default=None)


def places_of_sum(gm: GraphModule, found: StreamSet, selected: tuple[Stream, ...]) -> Places:
    """The places of an original, whose reads see plain sums.

    The graph gets nodes for what is not in it (a term times the factors behind it), which nothing that it returns
    depends on.

    Args:
        gm: Analysed.
        found: Its streams.
        selected: Those to look at.
    """
    plan = plan_depth_reads(found, selected, AttnResConfig(variant="full"))
    every = [StreamStates(gm.graph, found.sums, s, {}, frozenset()) for s in plan.streams]
    owner = {node: states for states in every for node in states.nodes}
    schedules = {s.stream.name: s.schedule for s in plan.streams}
    post_norm = {s.name for s in selected if s.post_norm}
    sources: dict[str, tuple[str, ...]] = {}
    for node in sorted(owner):
        owner[node].evaluate(node)
        for read in owner[node].reads_at(node):
            with gm.graph.inserting_before(node.next):
                sources[read.read] = tuple(n.name for n in owner[node].sources(read, node))
    gm.graph.lint()
    reads = tuple(
        ReadPlace(
            r,
            r.site,
            sources[r.read],
            written_back(r, schedules[r.stream]),
            attends=False,
            summed=r.stream not in post_norm,
        )
        for r in plan.reads
    )
    writes = tuple(w for s in selected for w in _writes(s, _terms(s)))
    return Places(tuple(s.name for s in selected), writes, reads)


def places_of_reads(call: GraphOfCall) -> Places:
    """The places of a converted model, whose reads are attention over depth."""
    plans = call.converted.report.streams
    schedules = {s.stream.name: s.schedule for s in plans}
    nodes = {n.name: n for n in call.gm.graph.nodes}
    ordered = sorted(call.program.replacements, key=lambda r: nodes[r.node])
    post_norm = {s.stream.name for s in plans if s.stream.post_norm}
    reads = tuple(
        ReadPlace(
            r.plan,
            r.node,
            r.source_nodes,
            written_back(r.plan, schedules[r.stream]),
            attends=True,
            summed=r.stream not in post_norm,
        )
        for r in ordered
    )
    writes = tuple(w for s in plans for w in _writes(s.stream, _written(s.stream, ordered, nodes)))
    return Places(tuple(s.stream.name for s in plans), writes, reads)


def _written(stream: Stream, reads: Sequence[Replacement], nodes: dict[str, Node]) -> list[tuple[str, ...]]:
    return written_nodes([r for r in reads if r.stream == stream.name], stream.num_sublayers, nodes)


def _terms(stream: Stream) -> list[tuple[str, ...]]:
    """The nodes of the root's value and of every sublayer's terms."""
    every = range(stream.num_sublayers)
    return [(stream.root.node,), *(tuple(t.node for t in stream.terms if t.sublayer == i) for i in every)]


def _writes(stream: Stream, nodes: Sequence[tuple[str, ...]]) -> list[WritePlace]:
    names = [root_of(stream)]
    for i in range(stream.num_sublayers):
        made = dict.fromkeys(t.made_by or t.module or t.node for t in stream.terms if t.sublayer == i)
        names.append(" + ".join(made))
    return [WritePlace(stream.name, i, n, ns) for i, (n, ns) in enumerate(zip(names, nodes, strict=True))]
