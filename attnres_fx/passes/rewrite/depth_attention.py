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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch.fx import GraphModule, Node

from attnres_fx.errors import RewriteError
from attnres_fx.ops.operator import DEPTH_ATTENTION
from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import fake_like, insert_call, nodes_without_gradients, tensor_of
from attnres_fx.passes.graph.operations import asks_only_metadata, op_name
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan, ReadPlan, StreamPlan
from attnres_fx.passes.rewrite.sources import Entry, Moved, Replay, SourceBuilder, Table
from attnres_fx.passes.streams.finding import StreamSet
from attnres_fx.passes.streams.formal_sum import FormalSums, Mapped, Root


@dataclass(frozen=True)
class ReadParameters:
    """The nodes that hold a read's parameters: query and key_weight [D], gate [] on post-norm streams."""

    query: Node
    key_weight: Node
    gate: Node | None = None


#: Inserts, at the graph's insertion point, the nodes that hold a read's parameters; the node given is the one whose
#: metadata and value they take after.
FetchParameters = Callable[[DepthReadPlan, Node], ReadParameters]


@dataclass(frozen=True)
class Replacement:
    """A planned read as it stands in a graph.

    node: the depth-attention node. source_nodes: the node of each of the plan's sources.
    """

    plan: DepthReadPlan
    node: str
    source_nodes: tuple[str, ...]

    @property
    def stream(self) -> str:
        return self.plan.stream

    @property
    def read(self) -> str:
        return self.plan.read

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """Label and node name of each source."""
        return tuple(zip(self.plan.sources, self.source_nodes, strict=True))


def insert_depth_attention_pass(
    gm: GraphModule, *, streams: StreamSet, plan: ReadPlan, eps: float, fetch: FetchParameters
) -> PassResult:
    """Execute a read plan, in place, and return the replacements made.

    The additions that this leaves without users are removed; everything else stays.

    Args:
        streams: the streams of this graph.
        plan: what becomes of them, planned on this graph.
        eps: added to the mean square of a source.
        fetch: inserts the parameters of a read.

    Raises:
        RewriteError: A read of the graph does not see the sources that were planned, or lacks its gate.
    """
    moved: Moved = {}
    frozen = nodes_without_gradients(gm.graph)
    rewrites = [_StreamRewrite(gm, streams.sums, s, eps, fetch, moved, frozen) for s in plan.streams]
    # Node by node through all streams at once: what one of them writes, another may be read from.
    owner = {node: rewrite for rewrite in rewrites for node in rewrite.nodes}
    nodes = sorted(owner, key=streams.sums.order.__getitem__)
    replacements = [done for node in nodes for done in owner[node].visit(node)]
    removed = [node.name for node in reversed(nodes) if owner[node].remove_if_orphan(node)]
    gm.graph.lint()
    return PassResult(gm, bool(replacements), tuple(replacements), tuple(removed))


class _StreamRewrite:
    """One stream of a graph, rewritten state by state."""

    def __init__(
        self,
        gm: GraphModule,
        sums: FormalSums,
        plan: StreamPlan,
        eps: float,
        fetch: FetchParameters,
        moved: Moved,
        frozen: frozenset[Node],
    ) -> None:
        self.graph = gm.graph
        self.sums = sums
        self.plan = plan
        self.stream = plan.stream
        self.eps = eps
        self.fetch = fetch
        self.moved = moved
        self.by_name: dict[str, Node] = {n.name: n for n in self.graph.nodes}
        self.roots = self._roots()
        self.nodes = sorted((n for n, r in sums.root.items() if r in self.roots), key=sums.order.__getitem__)
        groups = {self.by_name[term.node]: term.group for term in plan.terms}
        extras = frozenset(term.group for term in plan.terms if term.source is None)
        self.builder = SourceBuilder(self.graph, sums, groups, moved, extras, frozen)
        self.unread_ends = {self.by_name[end.node]: end.summary for end in plan.unread_ends}
        self.at_site: dict[Node, list[DepthReadPlan]] = {}
        for read in plan.reads:
            self.at_site.setdefault(self.by_name[read.site], []).append(read)

    def _roots(self) -> dict[Node, Node | None]:
        """Root nodes of the stream's parts, each with the site of the norm read it continues."""
        roots: dict[Node, Node | None] = {self.by_name[self.stream.root.node]: None}
        if not self.stream.post_norm:
            return roots
        for read in self.stream.reads:
            roots.setdefault(self.sums.root[self.by_name[read.state]], None)
        sites = [self.by_name[r.site] for r in self.stream.reads]
        previous = dict(zip(list(roots)[1:], sites, strict=False))
        return {root: previous.get(root) for root in roots}

    def visit(self, node: Node) -> list[Replacement]:
        """Evaluate a state whose parents have been visited, and put in the reads that stand at it."""
        self._evaluate(node)
        if node in self.unread_ends:
            self.builder.close_block(node, self.unread_ends[node])
        return [self._rewrite_read(read, node) for read in self.at_site.get(node, ())]

    def _evaluate(self, node: Node) -> None:
        site = self.roots.get(node)
        if site is None or not isinstance(self.sums.states[node], Root):
            self.builder.evaluate(node)
            return
        carried = self.builder.tables[site]
        summary = next((r.summary for r in self.at_site.get(site, ()) if r.makes_summary), None)
        self.builder.tables[node] = carried if summary is None else Table({summary: Entry(node)})

    def _rewrite_read(self, read: DepthReadPlan, site: Node) -> Replacement:
        pairs = self._consumed(read)
        with self.graph.inserting_before(site.next):
            sources = self._sources(read, site)
            value, node = self._insert_read(read, site, sources)
        replayed = [(user, seen, self._replayed(value, site, seen)) for user, seen in pairs]
        for user, seen, replacement in replayed:
            user.replace_input_with(seen, replacement)
            self.moved[user, seen] = replacement
        if read.makes_summary and read.summary is not None and not self.stream.post_norm:
            self.builder.go_on_from(site, read.summary, value)
        return Replacement(read, node.name, tuple(s.name for s in sources))

    def _sources(self, read: DepthReadPlan, site: Node) -> list[Node]:
        """The nodes of the planned sources; of a whole block also where the chain goes on from its summary."""
        built = self.builder.nodes(self.builder.whole.get(site, self.builder.tables[site]))
        if set(built) != set(read.groups):
            there, planned = (" ".join(sorted(map(str, groups))) for groups in (built, read.groups))
            raise RewriteError(
                f"the read {read.read!r} of {read.stream!r} was planned with the sources {planned} and the graph has "
                f"{there} at {site.name!r}: plan the reads of the graph that is rewritten."
            )
        return [built[group] for group in read.groups]

    def _insert_read(self, read: DepthReadPlan, site: Node, sources: Sequence[Node]) -> tuple[Node, Node]:
        """The value consumers get, and the depth-attention node in it."""
        values = [v for v in map(tensor_of, sources) if v is not None]
        out = fake_like(values[0], reduce(torch.promote_types, (v.dtype for v in values)))
        weights = self.fetch(read, site)
        args = (list(sources), weights.query, weights.key_weight, self.eps, read.gain)
        node = insert_call(self.graph, DEPTH_ATTENTION, args, like=site, value=out)
        if not read.gated:
            return node, node
        if weights.gate is None:
            raise RewriteError(f"the read {read.read!r} is on a post-norm stream and needs a gate.")
        # r + g * (read - r): exactly r while the gate is zero.
        moved = emit(self.graph, "sub", (node, site), like=site, value=out)
        gated = emit(self.graph, "mul", (moved, weights.gate), like=site, value=out)
        return emit(self.graph, "add", (site, gated), like=site, value=out), node

    def _consumed(self, read: DepthReadPlan) -> list[tuple[Node, Node]]:
        """The consumers, each with what it takes of the state: the state itself, or a row map of it."""
        state = self.by_name[read.state]
        pairs = []
        for name in read.consumers:
            user = self.by_name[name]
            pairs += [(user, n) for n in user.all_input_nodes if n in self.sums.root and self._path(n)[0] is state]
        return pairs

    def _path(self, node: Node) -> list[Node]:
        path = [node]
        while isinstance(step := self.sums.states[path[-1]], Mapped) and step.kind != "factor":
            path.append(step.state)
        return path[::-1]

    def _replayed(self, value: Node, site: Node, seen: Node) -> Node:
        """The read as a consumer saw the state: through the row maps between the two."""
        path = self._path(seen)
        for node in path[path.index(site) + 1 :]:
            step = self.sums.states[node]
            assert isinstance(step, Mapped)
            # Beside the original: what else it takes (a shape, an index) may be computed just before it.
            with self.graph.inserting_after(node):
                value = self.builder.apply(Replay(node, step.state, step.kind), value)
        return value

    def remove_if_orphan(self, node: Node) -> bool:
        """Erase a state nobody needs any more; whatever only asked for its shape asks a source."""
        if isinstance(self.sums.states[node], Root):
            return False
        self._move_metadata_users(node)
        if node.users:
            return False
        self.graph.erase_node(node)
        return True

    def _move_metadata_users(self, node: Node) -> None:
        if not node.users or not all(asks_only_metadata(u, node) for u in node.users):
            return
        for user in list(node.users):
            if op_name(user) == "_assert_tensor_metadata" and not user.users:
                self.graph.erase_node(user)
        if not node.users:
            return
        entries = self.builder.tables[node].settled().values()
        whole = next(e for e in entries if isinstance(e.base, Node))
        # A builder of its own: what others have built may stand later in the graph than this node.
        with self.graph.inserting_before(node.next):
            stand_in = SourceBuilder(self.graph, self.sums, {}, {}).build(whole)
        node.replace_all_uses_with(stand_in)


__all__ = ["FetchParameters", "ReadParameters", "Replacement", "insert_depth_attention_pass"]
