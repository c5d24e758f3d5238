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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from attnres_fx.config import Output
from attnres_fx.errors import RewriteError
from attnres_fx.ops.operator import DEPTH_ATTENTION
from attnres_fx.passes.graph.nodes import fake_like, insert_call, nodes_without_gradients, tensor_of
from attnres_fx.passes.graph.operations import asks_only_metadata, is_aten, op_name
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.rewrite.sources import Entry, Group, Moved, Replay, SourceBuilder, Table
from attnres_fx.passes.schedule import DepthSchedule, Source
from attnres_fx.passes.streams.finding import Read, Stream, StreamSet
from attnres_fx.passes.streams.formal_sum import FormalSums, Mapped, Root


@dataclass(frozen=True)
class ReadParameters:
    """The nodes that hold a read's parameters: query and key_weight [D], gate [] on post-norm streams."""

    query: Node
    key_weight: Node
    gate: Node | None = None


#: Inserts, at the graph's insertion point, the nodes that hold a read's parameters; `like` is the node
#: whose metadata and value they take after.
FetchParameters = Callable[[Stream, Read, Node], ReadParameters]


@dataclass(frozen=True)
class DepthReadPlan:
    """What one read becomes: its sources by name, oldest first, and the block it belongs to."""

    stream: str
    read: str
    sources: tuple[str, ...]
    block: int
    gain: float
    gated: bool


@dataclass(frozen=True)
class Replacement:
    """A read as it was put into the graph.

    node: the depth-attention node. sources: label and node name of each source.
    """

    stream: str
    read: str
    node: str
    sources: tuple[tuple[str, str], ...]
    block: int
    gain: float
    replaced: str


def plan_depth_reads(stream: Stream, schedule: DepthSchedule, output: Output) -> tuple[DepthReadPlan, ...]:
    """What the rewrite will do to a stream, as data."""
    plans = []
    for read in stream.depth_reads:
        labels = [str(s) for s in schedule.sources(read.position)] + [f"+{e}" for e in read.extras]
        gain = float(len(labels)) if output == "sum" and not stream.post_norm else 1.0
        gated = stream.post_norm and output == "sum"
        block = schedule.block_of_read(read.position)
        plans.append(DepthReadPlan(stream.name, read.name, tuple(labels), block, gain, gated))
    return tuple(plans)


def insert_depth_attention_pass(
    gm: GraphModule,
    *,
    streams: StreamSet,
    schedules: Mapping[str, DepthSchedule],
    output: Output,
    eps: float,
    fetch: FetchParameters,
) -> PassResult:
    """Rewrite the streams that have a schedule, in place, and return the replacements made.

    The additions that this leaves without users are removed; everything else stays.
    """
    moved: Moved = {}
    frozen = nodes_without_gradients(gm.graph)
    rewrites = [
        _StreamRewrite(gm, streams.sums, stream, schedules[stream.name], output, eps, fetch, moved, frozen)
        for stream in streams.streams
        if stream.name in schedules
    ]
    # Node by node through all streams at once: what one of them writes, another may be read from.
    owner = {node: rewrite for rewrite in rewrites for node in rewrite.nodes}
    nodes = sorted(owner, key=streams.sums.order.__getitem__)
    replacements = [done for node in nodes for done in owner[node].visit(node)]
    removed = [node.name for node in reversed(nodes) if owner[node].remove_if_orphan(node)]
    gm.graph.lint()
    return PassResult(gm, bool(replacements), tuple(replacements), tuple(removed))


class _StreamRewrite:
    def __init__(
        self,
        gm: GraphModule,
        sums: FormalSums,
        stream: Stream,
        schedule: DepthSchedule,
        output: Output,
        eps: float,
        fetch: FetchParameters,
        moved: Moved,
        frozen: frozenset[Node],
    ) -> None:
        self.graph = gm.graph
        self.sums = sums
        self.stream = stream
        self.schedule = schedule
        self.output = output
        self.eps = eps
        self.fetch = fetch
        self.moved = moved
        self.by_name: dict[str, Node] = {n.name: n for n in self.graph.nodes}
        self.roots = self._roots()
        self.nodes = sorted((n for n, r in sums.root.items() if r in self.roots), key=sums.order.__getitem__)
        extras = frozenset(f"+{t.node}" for t in stream.terms if t.sublayer is None)
        self.builder = SourceBuilder(self.graph, sums, self._groups(), moved, extras, frozen)
        self.unread_ends = self._unread_ends()
        self.at_site: dict[Node, list[Read]] = {}
        for read in stream.depth_reads:
            self.at_site.setdefault(self._site(read), []).append(read)

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

    def _groups(self) -> dict[Node, Group]:
        groups: dict[Node, Group] = {self.by_name[self.stream.root.node]: Source("root")}
        for term in self.stream.terms:
            node = self.by_name[term.written_by]
            if term.sublayer is None:
                groups[node] = f"+{term.node}"
                continue
            block = self.schedule.block_of(term.sublayer)
            whole = self.schedule.variant == "block"
            groups[node] = ("block", block) if whole else Source("sublayer", block, term.sublayer, term.sublayer + 1)
        return groups

    def _unread_ends(self) -> dict[Node, Source]:
        """States at which a local block ends without a read of the stream alone, each with its summary."""
        read = {r.position for r in self.stream.depth_reads if self._ends_local_block(r)}
        if self.schedule.variant != "local" or self.stream.post_norm:
            return {}
        ends = {start - 1: block for block, start in enumerate(self.schedule.starts) if start and start not in read}
        last = {t.sublayer: self.by_name[t.written_by] for t in self.stream.terms if t.sublayer in ends}
        return {node: Source("summary", ends[sublayer]) for sublayer, node in last.items() if sublayer is not None}

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
        if self._summarises(self.sums.order[site], site):
            carried = Table({self._summary(site): Entry(node)})
        self.builder.tables[node] = carried

    def _site(self, read: Read) -> Node:
        """Where a read is put; at the end of a local block the state itself, since the chain goes on from it."""
        state = self.by_name[read.state]
        at_state = self._ends_local_block(read) and not self.stream.post_norm
        return state if at_state else self.by_name[read.site]

    def _ends_local_block(self, read: Read) -> bool:
        return (
            self.schedule.variant == "local"
            and not read.extras
            and 0 < read.position < self.schedule.num_sublayers
            and read.position in self.schedule.starts
        )

    def _summarises(self, _: int, site: Node) -> bool:
        return any(self.by_name[r.site] is site and self._ends_local_block(r) for r in self.stream.depth_reads)

    def _summary(self, site: Node) -> Source:
        read = next(r for r in self.stream.depth_reads if self.by_name[r.site] is site)
        return Source("summary", self.schedule.block_of(read.position))

    def _rewrite_read(self, read: Read, site: Node) -> Replacement:
        state = self.by_name[read.state]
        pairs = self._consumed(read, state)
        with self.graph.inserting_before(site.next):
            sources = self.builder.nodes(self._table_of(read, site))
            value, node = self._insert_read(read, site, sources)
        replayed = [(user, seen, self._replayed(value, site, seen)) for user, seen in pairs]
        for user, seen, replacement in replayed:
            user.replace_input_with(seen, replacement)
            self.moved[user, seen] = replacement
        labels = self._labels(read, sources)
        gain = node.args[4]
        assert isinstance(gain, float)
        if self._ends_local_block(read) and not self.stream.post_norm and site not in self.builder.whole:
            summary = Source("summary", self.schedule.block_of(read.position))
            self.builder.go_on_from(site, summary, value)
        return Replacement(
            stream=self.stream.name,
            read=read.name,
            node=node.name,
            sources=tuple((label, s.name) for label, s in zip(labels, sources.values(), strict=True)),
            block=self.schedule.block_of_read(read.position),
            gain=gain,
            replaced=site.name,
        )

    def _table_of(self, read: Read, site: Node) -> Table:
        """All of a block's sources for every read at its end, also where the chain goes on from a summary."""
        at_end = self._ends_local_block(read) and site in self.builder.whole
        return self.builder.whole[site] if at_end else self.builder.tables[site]

    def _insert_read(self, read: Read, site: Node, sources: dict[Group, Node]) -> tuple[Node, Node]:
        """The value consumers get, and the depth-attention node in it."""
        found = [tensor_of(s) for s in sources.values()]
        values = [v for v in found if v is not None]
        dtype = values[0].dtype
        for value in values[1:]:
            dtype = torch.promote_types(dtype, value.dtype)
        out = fake_like(values[0], dtype)
        weights = self.fetch(self.stream, read, site)
        summing = self.output == "sum"
        gain = float(len(sources)) if summing and not self.stream.post_norm else 1.0
        args = (list(sources.values()), weights.query, weights.key_weight, self.eps, gain)
        node = insert_call(self.graph, DEPTH_ATTENTION, args, like=site, value=out)
        if not (self.stream.post_norm and summing):
            return node, node
        if weights.gate is None:
            raise RewriteError(f"the read {read.name!r} is on a post-norm stream and needs a gate.")
        # r + g * (read - r): exactly r while the gate is zero.
        aten = torch.ops.aten
        spelled = (aten.sub.Tensor, aten.mul.Tensor, aten.add.Tensor) if is_aten(site) else _TORCH_ARITHMETIC
        moved = insert_call(self.graph, spelled[0], (node, site), like=site, value=out)
        gated = insert_call(self.graph, spelled[1], (moved, weights.gate), like=site, value=out)
        return insert_call(self.graph, spelled[2], (site, gated), like=site, value=out), node

    def _consumed(self, read: Read, state: Node) -> list[tuple[Node, Node]]:
        pairs = []
        for name in read.consumers:
            user = self.by_name[name]
            pairs += [(user, n) for n in user.all_input_nodes if n in self.roots_of and self._core(n) is state]
        return pairs

    @property
    def roots_of(self) -> dict[Node, Node]:
        return self.sums.root

    def _core(self, node: Node) -> Node:
        return self._path(node)[0]

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

    def _labels(self, read: Read, sources: Mapping[Group, Node]) -> Sequence[str]:
        partial = {("block", s.block): str(s) for s in self.schedule.sources(read.position) if s.kind != "root"}
        return [partial.get(g, str(g)) if isinstance(g, tuple) else str(g) for g in sources]

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


_TORCH_ARITHMETIC = (torch.sub, torch.mul, torch.add)

__all__ = [
    "DepthReadPlan",
    "FetchParameters",
    "ReadParameters",
    "Replacement",
    "insert_depth_attention_pass",
    "plan_depth_reads",
]
