"""Put hyper-connections where a residual stream is written and read.

Before:
    h1 = h0 + attn(norm_1(h0))
    h2 = h1 + mlp(norm_2(h1))
    y  = head(norm_3(h2))
After, with two copies:
    v1 = attn(norm_1(h0))
    a1, b1 = hyper_write([h0, h0], v1, …)
    r1 = hyper_read([a1, b1], …)
    v2 = mlp(norm_2(r1))
    a2, b2 = hyper_write([a1, b1], v2, …)
    r2 = hyper_read([a2, b2], …)
    y  = head(norm_3(r2))
"""

import operator
from functools import reduce
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from attnres_fx.errors import RewriteError
from attnres_fx.passes.graph.nodes import fake_like, insert_call, tensor_of
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.rewrite.execution import execute_plan
from attnres_fx.passes.rewrite.hyper_connections.config import HyperConnectionsConfig
from attnres_fx.passes.rewrite.hyper_connections.operators import HYPER_READ, HYPER_WRITE
from attnres_fx.passes.rewrite.hyper_connections.planning import copy_sources
from attnres_fx.passes.rewrite.insertion import moved_by_gate
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan, ReadPlan, StreamPlan
from attnres_fx.passes.rewrite.sources import Entry, Moved, Table, insert_add
from attnres_fx.passes.rewrite.steps import RowsLast, turn_rows
from attnres_fx.passes.rewrite.stream_states import StreamStates
from attnres_fx.passes.rewrite.topology import FetchParameter
from attnres_fx.passes.streams.feature_dimensions import LAST
from attnres_fx.passes.streams.formal_sum import FormalSums, Root
from attnres_fx.passes.streams.stream import StreamSet


def insert_hyper_connections_pass(
    gm: GraphModule, *, streams: StreamSet, plan: ReadPlan, config: HyperConnectionsConfig, fetch: FetchParameter
) -> PassResult:
    """Execute a plan of hyper-connections, in place.

    The additions that this leaves without users are removed; everything else stays.

    Args:
        gm: The graph.
        streams: The streams of this graph.
        plan: What becomes of them, planned on this graph.
        config: The copies, and what their weights depend on.
        fetch: Inserts a parameter of a connection, by a name of `HyperConnection.tensor_names`.

    Returns:
        A `Replacement` for each read, and the names of the nodes that were removed.

    Raises:
        RewriteError: A read of the graph does not see what was planned, or lacks a parameter.
    """

    def states(
        graph: Graph, sums: FormalSums, of_stream: StreamPlan, moved: Moved, frozen: frozenset[Node]
    ) -> StreamStates:
        return _CopiedStates(graph, sums, of_stream, moved, frozen, config, fetch)

    def put(read: DepthReadPlan, site: Node, sources: list[Node]) -> tuple[Node, Node]:
        return _insert_read(read, site, sources, config, fetch)

    return execute_plan(gm, streams, plan, states=states, put=put)


class _CopiedStates(StreamStates):
    """The states of one stream as copies: each sublayer's output is written to all of them, once it is complete."""

    def __init__(
        self,
        graph: Graph,
        sums: FormalSums,
        plan: StreamPlan,
        moved: Moved,
        frozen: frozenset[Node],
        config: HyperConnectionsConfig,
        fetch: FetchParameter,
    ) -> None:
        super().__init__(graph, sums, plan, moved, frozen)
        self._config, self._fetch, self._features = config, fetch, sums.features
        self._copies = copy_sources(config.copies)
        self._writers = {read.position - 1: read for read in plan.reads if read.writes}
        nodes = {node.name: node for node in graph.nodes}
        terms = sorted(((nodes[t.written_by], t.sublayer) for t in plan.stream.terms), key=lambda pair: pair[0])
        last = {sublayer: node for node, sublayer in terms if sublayer is not None}
        #: By the node that completes what a sublayer writes, the sublayer.
        self._complete = {node: sublayer for sublayer, node in last.items()}
        self._schedule = plan.schedule
        self._written: dict[Node, Node] = {}

    def evaluate(self, node: Node) -> None:
        """Find the copies of a state whose parents have been evaluated, and write to them what it completes."""
        if self._roots.get(node, node) is None and isinstance(self._sums.states[node], Root):
            self.builder.tables[node] = Table(dict.fromkeys(self._copies, Entry(node)))
        else:
            super().evaluate(node)
        if node in self._complete:
            self._write(node, self._complete[node])

    def behind(self, site: Node) -> Node:
        """The node before which what is read at a state is inserted: behind the copies that are written there."""
        return self._written.get(site, site).next

    def _write(self, node: Node, sublayer: int) -> None:
        entries = self.builder.tables[node].resolved()
        group = self._schedule.group_of(sublayer)
        missing = [str(g) for g in (*self._copies, group) if g not in entries]
        read = self._writers.get(sublayer)
        if missing or read is None:
            raise RewriteError(
                f"what sublayer {sublayer} writes into a stream at {node.name!r} cannot be carried by "
                f"hyper-connections: the state there has no {', '.join(missing)}, or nobody reads it. Leave this "
                f"stream out (streams=…)."
            )
        self.builder.without_gradients = node in self.builder.frozen
        behind = node.next
        with self.graph.inserting_before(behind):
            dimension = self._features.dimension(node)
            copies, branch = ([self.builder.build(entries[g]) for g in gs] for gs in (self._copies, (group,)))
            written = self._insert_write(read, node, [*copies, *branch], dimension)
        self._written[node] = behind.prev
        kept = {g: e for g, e in entries.items() if g != group}
        kept |= {g: Entry(new) for g, new in zip(self._copies, written, strict=True)}
        self.builder.tables[node] = Table(kept)

    def _insert_write(self, read: DepthReadPlan, node: Node, values: list[Node], dimension: int) -> list[Node]:
        if dimension != LAST:
            values = [self.builder.apply(RowsLast(dimension, node), v) for v in values]
        fetch, config = self._fetch, self._config
        tensors = [
            fetch(read, node, f"{kind}{part}") for kind in ("post", "carry") for part in ("", "_weight", "_scale")
        ]
        if tensors[0] is None:
            raise RewriteError(f"the connection {read.read!r} of {read.stream!r} has no weights to write with.")
        *copies, branch = values
        made = [v for v in map(tensor_of, values) if v is not None]
        value = fake_like(made[0], _promoted(made))
        args = (copies, branch, *tensors, config.constrained, config.sinkhorn_steps, config.eps)
        every = insert_call(self.graph, HYPER_WRITE, args, like=node, value=[value] * len(copies))
        written = [
            insert_call(self.graph, operator.getitem, (every, i), like=node, value=value) for i in range(len(copies))
        ]
        if dimension != LAST:
            written = [turn_rows(self.graph, w, -1, dimension, like=node) for w in written]
        return written


def _insert_read(
    read: DepthReadPlan, site: Node, sources: list[Node], config: HyperConnectionsConfig, fetch: FetchParameter
) -> tuple[Node, Node]:
    """The node that takes the place of the site, and the one that reads the copies."""
    copies, extras = sources[: config.copies], sources[config.copies :]
    pre, *dynamic = (fetch(read, site, name) for name in ("pre", "pre_weight", "pre_scale"))
    if pre is None:
        raise RewriteError(f"the connection {read.read!r} of {read.stream!r} has no weights to read with.")
    values = [v for v in map(tensor_of, copies) if v is not None]
    args: tuple[Any, ...] = (copies, pre, *dynamic, config.constrained, config.eps)
    node = insert_call(site.graph, HYPER_READ, args, like=site, value=fake_like(values[0], _promoted(values)))
    mixed = node
    for extra in extras:  # what the stream does not go on with is seen as it is
        mixed = insert_add(site.graph, mixed, extra, like=site)
    if read.dimension != LAST:
        mixed = turn_rows(site.graph, mixed, -1, read.dimension, like=site)
    return moved_by_gate(read, site, mixed, fetch(read, site, "gate")), node


def _promoted(values: list[torch.Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (v.dtype for v in values))
