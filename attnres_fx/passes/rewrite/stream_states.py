"""The states of one stream while its graph is rewritten, as sums of the sources that were planned."""

from collections.abc import Sequence

from torch.fx import Graph, Node

from attnres_fx.errors import RewriteError
from attnres_fx.passes.graph.nodes import describe
from attnres_fx.passes.rewrite.read_plan import DepthReadPlan, StreamPlan
from attnres_fx.passes.rewrite.sources import Entry, Moved, SourceBuilder, Table
from attnres_fx.passes.rewrite.steps import RowsLast
from attnres_fx.passes.streams.feature_dimensions import LAST
from attnres_fx.passes.streams.formal_sum import FormalSums, Root
from attnres_fx.passes.streams.stream import Stream


class StreamStates:
    """The states of one stream, evaluated one after another in graph order.

    Attributes:
        graph: The graph that is rewritten.
        nodes: The states, in graph order.
        builder: What evaluates them, and writes the nodes of their sources.
    """

    def __init__(self, graph: Graph, sums: FormalSums, plan: StreamPlan, moved: Moved, frozen: frozenset[Node]) -> None:
        self.graph = graph
        self._sums = sums
        self._post_norm = plan.stream.post_norm
        self._window = plan.schedule.window
        self._by_name: dict[str, Node] = {n.name: n for n in graph.nodes}
        self._roots = self._site_before_each_root(plan.stream)
        self.nodes = sorted(n for n, r in sums.root.items() if r in self._roots)
        groups = {self._by_name[term.node]: term.group for term in plan.terms}
        extras = frozenset(term.group for term in plan.terms if term.source is None)
        self.builder = SourceBuilder(graph, sums, groups, moved, extras, frozen)
        self._has_summaries = bool(plan.unread_ends) or any(read.summary is not None for read in plan.reads)
        self._unread_ends = {self._by_name[end.node]: end.summary for end in plan.unread_ends}
        self._reads: dict[Node, list[DepthReadPlan]] = {}
        for read in plan.reads:
            self._reads.setdefault(self._by_name[read.site], []).append(read)

    def _site_before_each_root(self, stream: Stream) -> dict[Node, Node | None]:
        """The roots of a stream's parts, each with the site of the norm that it is the result of."""
        roots: dict[Node, Node | None] = {self._by_name[stream.root.node]: None}
        if not stream.post_norm:
            return roots
        for read in stream.reads:
            roots.setdefault(self._sums.root[self._by_name[read.state]], None)
        sites = [self._by_name[r.site] for r in stream.reads]
        before = dict(zip(list(roots)[1:], sites, strict=False))
        return {root: before.get(root) for root in roots}

    def reads_at(self, node: Node) -> Sequence[DepthReadPlan]:
        """The reads whose site a state is."""
        return self._reads.get(node, ())

    def evaluate(self, node: Node) -> None:
        """Find the sources of a state whose parents have been evaluated."""
        site = self._roots.get(node)
        if site is None or not isinstance(self._sums.states[node], Root):
            self.builder.evaluate(node)
        else:
            summary = next((r.summary for r in self.reads_at(site) if r.makes_summary), None)
            carried = self.builder.tables[site]
            self.builder.tables[node] = carried if summary is None else Table({summary: Entry(node)})
        if node in self._unread_ends:
            self.builder.close_block(node, self._unread_ends[node])

    def sources(self, read: DepthReadPlan, site: Node) -> list[Node]:
        """The nodes of the planned sources, written at the insertion point where they are new.

        Where the chain goes on from a summary already, they are the sources of the whole block.
        """
        entries = self.builder.whole.get(site, self.builder.tables[site]).resolved()
        missing = set(read.groups) - set(entries)
        if missing or (self._window is None and len(entries) != len(set(read.groups))):
            if self._has_summaries:
                raise RewriteError(
                    f"a state of the stream {read.stream!r} that was set aside joins it again before {read.read!r} (at "
                    f"{describe(site)}), and with variant 'local' the stream has gone on from the summary of a block "
                    f"by then, which the other state does not have: use variant 'block' or 'full', or blocks that do "
                    f"not end in between."
                )
            actual, planned = (" ".join(sorted(map(str, groups))) for groups in (entries, read.groups))
            raise RewriteError(
                f"the read {read.read!r} of {read.stream!r} was planned with the sources {planned} and the graph has "
                f"{actual} at {site.name!r}: plan the reads of the graph that is rewritten."
            )
        nodes = [self.builder.build(entries[group]) for group in read.groups]
        if read.dimension == LAST:
            return nodes
        return [self.builder.apply(RowsLast(read.dimension, site), node) for node in nodes]

    def behind(self, site: Node) -> Node:
        """The node before which what is read at a state is inserted."""
        return site.next

    def consumed(self, read: DepthReadPlan) -> list[tuple[Node, Node]]:
        """The consumers of a read, each with what it takes of the state: the state itself, or a row map of it."""
        state, sums = self._by_name[read.state], self._sums
        pairs = []
        for user in map(self._by_name.__getitem__, read.consumers):
            states = (n for n in user.all_input_nodes if n in sums.root)
            pairs += [(user, n) for n in states if sums.row_map_path(n)[0] is state]
        return pairs

    def go_on_from(self, read: DepthReadPlan, site: Node, value: Node) -> None:
        """Let the chain go on from a read that makes a summary; on a post-norm stream the norm behind it does that."""
        if read.makes_summary and read.summary is not None and not self._post_norm:
            self.builder.go_on_from(site, read.summary, value)
