"""The nodes a state is the sum of, grouped as a schedule wants them, in the frame the state is read in.

Every state of a stream is evaluated once, in graph order, to a table from group (the root, a sublayer, a
block, a summary) to entry. Row maps wait on a state until a read needs an entry; only then are they
replayed on it, and replays are shared.
"""

from dataclasses import dataclass, field
from functools import reduce

import torch
from torch.fx import Graph, Node

from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import fake_like, same_shape, tensor_of
from attnres_fx.passes.rewrite.read_plan import Group
from attnres_fx.passes.rewrite.steps import Detach, Replay, Scale, SpreadLike, Step, insert_step, simplified
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums, Mapped, Merged, Root

#: What a node takes instead of one of its former arguments, where a read was put between the two.
Moved = dict[tuple[Node, Node], Node]


@dataclass(eq=False)
class PendingSum:
    """Two entries to be added when somebody asks; `like` is the addition it stands for.

    A sum that was written where gradients are off serves nobody where they are on.
    """

    left: "Entry"
    right: "Entry"
    like: Node
    nodes: dict[bool, Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A node, or a sum still to be written, and the steps that wait on it."""

    base: Node | PendingSum
    steps: tuple[Step, ...] = ()

    def through(self, steps: tuple[Step, ...]) -> "Entry":
        return Entry(self.base, self.steps + steps) if steps else self


@dataclass(frozen=True)
class Table:
    """Entries by group, and the steps that wait on all of them."""

    entries: dict[Group, Entry]
    steps: tuple[Step, ...] = ()

    def through(self, *steps: Step) -> "Table":
        return Table(self.entries, self.steps + steps)

    def resolved(self) -> dict[Group, Entry]:
        return {g: e.through(self.steps) for g, e in self.entries.items()} if self.steps else dict(self.entries)


@dataclass
class SourceBuilder:
    """Evaluates states to tables, and turns entries into nodes of the graph.

    extras: the groups that are terms outside the chain. frozen: the nodes that run with gradients off.
    """

    graph: Graph
    sums: FormalSums
    group_of: dict[Node, Group]
    moved: Moved
    extras: frozenset[Group] = frozenset()
    frozen: frozenset[Node] = frozenset()
    tables: dict[Node, Table] = field(default_factory=dict)
    #: What states beside the chain go on from, where the chain itself goes on from a summary.
    whole: dict[Node, Table] = field(default_factory=dict)
    #: Whether nodes are now inserted where gradients are off.
    without_gradients: bool = False
    _built: dict[tuple[Node, Step, bool], Node] = field(default_factory=dict)

    def evaluate(self, node: Node) -> Table:
        """Table of a state whose parents have been evaluated."""
        if node not in self.tables:
            step = self.sums.states[node]
            table = self._table(node, self.tables)
            detached = (Detach(),) if node in self.frozen else ()
            self.tables[node] = table.through(*detached)
            if isinstance(step, Mapped) and step.state in self.whole:
                self.whole[node] = self._table(node, self.whole).through(*detached)
        return self.tables[node]

    def go_on_from(self, node: Node, summary: Group, value: Node) -> None:
        """Let the chain go on from a summary of a state; states beside the chain keep its sources."""
        self.whole[node] = self.tables[node]
        self.tables[node] = Table({summary: Entry(value)})

    def close_block(self, node: Node, summary: Group) -> None:
        """Let the chain go on from the plain sum of a state's sources: no read stands where the block ends."""
        first, *rest = self.tables[node].resolved().values()
        total = reduce(lambda left, right: Entry(PendingSum(left, right, node)), rest, first)
        self.whole[node] = self.tables[node]
        self.tables[node] = Table({summary: total})

    def _table(self, node: Node, tables: dict[Node, Table]) -> Table:
        match self.sums.states[node]:
            case Root():
                return Table({self.group_of[node]: Entry(node)})
            case Mapped(state=state, kind="detach"):
                return tables[state].through(Detach())
            case Mapped(state=state, kind=kind):
                return tables[state].through(Replay(node, state, kind))
            case Extended() as add:
                return self._extended(add)
            case Merged() as add:
                left = self._operand(add.left, add.left_scale, add.right, node).resolved()
                right = self._operand(add.right, add.right_scale, add.left, node).resolved()
                for group, entry in right.items():
                    left[group] = Entry(PendingSum(left[group], entry, node)) if group in left else entry
                return Table(left)

    def _operand(self, state: Node, scale: float, other: Node, total: Node) -> Table:
        """The table of one of two states that are added, spread over the shape of the other where it is smaller."""
        table = self.tables[state].through(*_scaled(scale))
        return table if same_shape(state, total) else table.through(SpreadLike(other))

    def _extended(self, add: Extended) -> Table:
        # A sum that no read sees (only its shape is asked for) was planned as nothing.
        group = self.group_of.get(add.node, f"+{add.node.name}")
        beside = (group in self.extras or add.node not in self.group_of) and add.state in self.whole
        before = (self.whole if beside else self.tables)[add.state].through(*_scaled(add.state_scale))
        if not same_shape(add.state, add.node):
            before = before.through(SpreadLike(add.addend))
        entries = before.resolved()
        written = self.moved.get((add.node, add.addend), add.addend)
        addend = Entry(written, _scaled(add.addend_scale))
        if not same_shape(add.addend, add.node):
            addend = addend.through((SpreadLike(add.state),))
        entries[group] = Entry(PendingSum(entries[group], addend, add.node)) if group in entries else addend
        return Table(entries)

    def stand_in(self, table: Table) -> Node:
        """A node of the shape that the entries of a table have: a part of one, that was written before them."""
        entry = next(iter(table.resolved().values()))
        while isinstance(entry.base, PendingSum):
            entry = entry.base.left.through(entry.steps)
        return self.build(entry)

    def nodes(self, table: Table) -> dict[Group, Node]:
        """Nodes for all entries of a table, inserted at the graph's insertion point where new."""
        return {group: self.build(entry) for group, entry in table.resolved().items()}

    def build(self, entry: Entry) -> Node:
        node = entry.base if isinstance(entry.base, Node) else self._build_sum(entry.base)
        steps = entry.steps
        if node in self.frozen:
            steps = tuple(s for s in steps if not isinstance(s, Detach))
        for step in simplified(node, steps):
            node = self.apply(step, node)
        return node

    def _build_sum(self, pending: PendingSum) -> Node:
        if self.without_gradients not in pending.nodes:
            left, right = self.build(pending.left), self.build(pending.right)
            pending.nodes[self.without_gradients] = insert_add(self.graph, left, right, like=pending.like)
        return pending.nodes[self.without_gradients]

    def apply(self, step: Step, node: Node) -> Node:
        key = (node, step, self.without_gradients)
        if key not in self._built:
            self._built[key] = insert_step(self.graph, step, node)
        return self._built[key]

    def replay_maps(self, value: Node, site: Node, seen: Node) -> Node:
        """What takes a state's place at `site`, through the row maps between it and what a consumer saw."""
        path = self.sums.row_map_path(seen)
        for node in path[path.index(site) + 1 :]:
            step = self.sums.states[node]
            assert isinstance(step, Mapped)
            # Beside the original: what else it takes (a shape, an index) may be computed just before it.
            with self.graph.inserting_after(node):
                value = self.apply(Replay(node, step.state, step.kind), value)
        return value


def _scaled(factor: float) -> tuple[Step, ...]:
    return () if factor == 1 else (Scale(factor),)


def insert_add(graph: Graph, left: Node, right: Node, *, like: Node) -> Node:
    """`left + right` in the spelling of the graph, with the metadata of the addition it stands for.

    In that addition's dtype too: outputs in half precision are not summed in half precision where the
    original adds them to a float32 stream.
    """
    x, y, whole = tensor_of(left), tensor_of(right), tensor_of(like)
    assert x is not None and y is not None and whole is not None
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), whole.dtype)
    value = fake_like(x, dtype)
    if dtype not in (x.dtype, y.dtype):
        left = _insert_cast(graph, left, like=like, value=value)
    return emit(graph, "add", (left, right), like=like, value=value)


def _insert_cast(graph: Graph, node: Node, *, like: Node, value: torch.Tensor) -> Node:
    return emit(graph, "to", (node, value.dtype), like=like, value=value)


def cast_like(graph: Graph, node: Node, like: Node) -> Node:
    """A node in the dtype of another, through a cast at the graph's insertion point where it has another one."""
    held, wanted = tensor_of(node), tensor_of(like)
    if held is None or wanted is None or held.dtype == wanted.dtype:
        return node
    return _insert_cast(graph, node, like=like, value=fake_like(held, wanted.dtype))
