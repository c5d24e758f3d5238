"""A converted graph as one chain of sublayers: which node belongs to which.

A node can run no earlier than what it takes, and no later than what takes it. In between it stays with the sublayer
whose parameters it uses (the keys of a cross-attention are made beside the decoder layer, not at the encoder's end),
or where less has to be carried. What depends on the model's inputs and constants alone (masks, rotary tables) belongs
to nobody: every stage that needs it makes its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import torch
from torch.fx import Graph, GraphModule, Node

from attnres_fx.errors import PlanError
from attnres_fx.partition.split.value_bytes import size_in_bytes
from attnres_fx.passes.graph.mutation_order import Writes, find_writes
from attnres_fx.passes.graph.nodes import describe, value_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, is_random, op_name
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.normalize.dead_code import remove_dead_code_pass


@dataclass(frozen=True)
class ChainStream:
    """A stream's run of the chain: its sublayers `first` to `first + count - 1`.

    Args:
        name: Of the stream.
        first: Its first sublayer, as a place in the chain.
        count: How many sublayers it has.
        names: One for each of them.
    """

    name: str
    first: int
    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class ChainRead:
    """A depth read of a chain's stream.

    Args:
        node: Name of its node.
        stream: Name of the stream.
        position: Sublayers of the stream written before it.
        summary: Of the read at the end of a `local` block, the node that holds what the block hands on (the read, or
            on a post-norm stream the norm after it): both are part of the block's last sublayer.
    """

    node: str
    stream: str
    position: int
    summary: str | None = None


@dataclass(frozen=True, eq=False)
class Chain:
    """A converted graph in order of its sublayers.

    Args:
        graph: The graph.
        streams: Their runs, one after another.
        unit: The sublayer of each node, -1 before the first (embedding), L after the last (final norm, head).
        floating: Nodes that each stage makes for itself.
        writes: What its in-place operations write into, and what must run before and after them.
    """

    graph: Graph
    streams: tuple[ChainStream, ...]
    unit: Mapping[Node, int]
    floating: frozenset[Node]
    writes: Writes

    @property
    def num_sublayers(self) -> int:
        return sum(s.count for s in self.streams)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for s in self.streams for name in s.names)

    @cached_property
    def _members(self) -> dict[int, list[Node]]:
        by_unit: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            if node in self.unit:
                by_unit.setdefault(self.unit[node], []).append(node)
        return by_unit

    def members(self, unit: int) -> list[Node]:
        """Nodes of one sublayer, in graph order."""
        return self._members.get(unit, [])


def drop_assertions_pass(gm: GraphModule) -> PassResult:
    """Remove what only states a tensor's dtype and device again, and what nobody uses, in place.

    Either would tie tensors to a sublayer that has no other use of them.
    """
    assertions = [n for n in gm.graph.nodes if op_name(n) == "_assert_tensor_metadata" and not n.users]
    for node in assertions:
        gm.graph.erase_node(node)
    unused = remove_dead_code_pass(gm).removed
    attributes = [n for n in gm.graph.nodes if n.op == "get_attr" and not n.users]
    for node in attributes:
        gm.graph.erase_node(node)
    changed = bool(assertions or unused or attributes)
    return PassResult(gm, changed, (), tuple(n.name for n in assertions))


def find_chain(gm: GraphModule, streams: Sequence[ChainStream], reads: Sequence[ChainRead]) -> Chain:
    """Order a converted graph by its streams.

    Args:
        gm: The graph; its nodes carry values.
        streams: Those of the chain, none nested in another's sublayer.
        reads: Their depth reads.

    Raises:
        PlanError: A node writes in place into what another sublayer makes.
    """
    placing = _Placing(gm, streams, reads)
    placing.forward()
    placing.backward()
    return Chain(gm.graph, tuple(streams), placing.unit, frozenset(placing.floating), placing.writes)


def is_mode_switch(node: Node) -> bool:
    """Whether a node switches autocast or gradients, or asks how they are switched."""
    return has_trait(node, Trait.SWITCHES_MODE | Trait.ASKS_MODE)


class _Placing:
    def __init__(self, gm: GraphModule, streams: Sequence[ChainStream], reads: Sequence[ChainRead]) -> None:
        self.gm = gm
        self.nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        self.nodes = [n for n in self.nodes if not is_mode_switch(n)]
        self.last = sum(s.count for s in streams)
        by_name = {n.name: n for n in gm.graph.nodes}
        self.anchor: dict[Node, int] = {}
        self.wrote: dict[Node, int] = {}  # of a read: the sublayer that made the last of its sources
        self._anchor_reads(streams, reads, by_name)
        self.opening = self._opening(streams, reads, by_name)
        self.writes = find_writes(gm.graph)
        self.owners = {o for owners in self.writes.targets.values() for o in owners}
        self.followers = _followers(self.writes)
        self.early: dict[Node, int] = {}
        self.floating: set[Node] = set()
        self.unit: dict[Node, int] = {}

    def _anchor_reads(
        self, streams: Sequence[ChainStream], reads: Sequence[ChainRead], by_name: Mapping[str, Node]
    ) -> None:
        """A read opens the sublayer after its sources; one that ends a block or a stream closes the one before."""
        by_stream = {s.name: s for s in streams}
        for read in reads:
            stream, node = by_stream[read.stream], by_name[read.node]
            unit = stream.first + read.position
            self.wrote[node] = max(unit - 1, 0)
            ends_stream = read.position == stream.count and unit != self.last
            self.anchor[node] = unit - 1 if read.summary or ends_stream else unit
        for read in reads:
            if read.summary:
                summary, unit = by_name[read.summary], by_stream[read.stream].first + read.position
                self.anchor[summary] = unit - 1
                self.anchor |= {u: unit for u in summary.users if u not in self.wrote and u.op != "output"}

    def _opening(
        self, streams: Sequence[ChainStream], reads: Sequence[ChainRead], by_name: dict[str, Node]
    ) -> set[Node]:
        """What the chain's first root is made of."""
        roots: list[Node] = []
        for read in reads:
            if read.stream == streams[0].name and read.position == 1:
                sources = by_name[read.node].args[0]
                assert isinstance(sources, list | tuple)
                roots += [s for s in sources[:1] if isinstance(s, Node)]
        return set(_ancestors(roots))

    def forward(self) -> None:
        unrepeatable: set[Node] = set()
        while True:
            self.early, self.floating = {}, set()
            for node in self.nodes:
                known = [self.early[i] for i in self.writes.inputs(node) if i in self.early]
                if node in self.anchor:
                    known.append(self.anchor[node])
                if known:
                    self.early[node] = max(known)
                elif node not in unrepeatable and self._may_be_repeated(node):
                    self.floating.add(node)
            # A storage that something of one sublayer is written into is that sublayer's, from its making on.
            owned = {o for w, owners in self.writes.targets.items() if w not in self.floating for o in owners}
            if owned <= unrepeatable:
                return
            unrepeatable |= owned

    def _may_be_repeated(self, node: Node) -> bool:
        """Whether a node that depends on nothing of the chain is the same wherever it is computed."""
        for source in self.writes.inputs(node):
            if source.op == "get_attr" and isinstance(attrgetter(str(source.target))(self.gm), torch.nn.Parameter):
                return False
            if source.op not in ("get_attr", "placeholder") and source not in self.floating:
                return False
        if node.op == "call_module" or is_random(node):
            return False
        return all(o.op not in ("get_attr", "placeholder") for o in self.writes.targets.get(node, ()))

    def backward(self) -> None:
        """Give every node that is not floating its sublayer, users first."""
        unused = {n for n in self.nodes if not self._users(n) and n not in self.early and n not in self.floating}
        for node in reversed(self.nodes):
            if node in self.floating or node in unused:
                continue
            late = min((self._wanted(node, user) for user in self._users(node) if user not in unused), default=None)
            self._place(node, self._unit_of(node, self.early.get(node), late))
        for node in unused:  # what is run for its effect: beside what it takes
            self.unit[node] = max((self.unit[i] for i in node.all_input_nodes if i in self.unit), default=-1)
        for write, owners in self.writes.targets.items():
            self._keep_together(write, owners)

    def _place(self, node: Node, unit: int) -> None:
        """Give a node its sublayer, and what is taken from it where it is no tensor: a list stays where it is made."""
        self.unit[node] = unit
        if isinstance(value_of(node), tuple | list):
            for user in node.users:
                if op_name(user) == "getitem" and user in self.unit:
                    self._place(user, unit)

    def _unit_of(self, node: Node, early: int | None, late: int | None) -> int:
        """The sublayer of a node that can run no earlier than `early` and no later than `late`."""
        if early is None:
            return -1 if node in self.opening or node in self.anchor or late is None else late
        if node in self.anchor or late is None or not self._goes_with_its_users(node):
            return early
        return max(early, late)

    def _keep_together(self, write: Node, owners: Sequence[Node]) -> None:
        """A write where its storage is made: it must not write into what came from another stage."""
        makers = [self.unit[o] for o in owners if o in self.unit]
        if write in self.unit and any(u != self.unit[write] for u in makers):
            raise PlanError(
                f"{describe(write)} writes in place into a tensor that sublayer {makers[0]} makes, in sublayer "
                f"{self.unit[write]}: a stage cannot write into what another has made. Write into a copy there."
            )

    def _users(self, node: Node) -> list[Node]:
        return [*node.users, *self.followers.get(node, ())]

    def _wanted(self, node: Node, user: Node) -> int:
        if user.op == "output":
            return self.last
        if user in self.floating:
            return self.last
        if user in self.wrote and (node in _sources_of(user) or node in self.writes.targets):
            return min(self.wrote[user], self.unit[user])
        return self.unit[user]

    def _goes_with_its_users(self, node: Node) -> bool:
        if node in self.writes.targets or node in self.owners:
            return True
        if node.op == "call_module" or not isinstance(value_of(node), torch.Tensor):
            return not isinstance(value_of(node), tuple | list)
        if op_name(node) == "getitem" and not isinstance(value_of(node.all_input_nodes[0]), torch.Tensor):
            return False
        carried = [i for i in node.all_input_nodes if i in self.early]
        if any(i.op == "get_attr" for i in node.all_input_nodes):
            return True
        return sum(size_in_bytes(i) for i in carried) <= size_in_bytes(node)


def _followers(writes: Writes) -> dict[Node, list[Node]]:
    """Of each write, the nodes that must run after it."""
    followers: dict[Node, list[Node]] = {}
    for node, before in writes.needs.items():
        for write in before:
            followers.setdefault(write, []).append(node)
    return followers


def _sources_of(read: Node) -> Sequence[Node]:
    sources = read.args[0]
    return [s for s in sources if isinstance(s, Node)] if isinstance(sources, list | tuple) else []


def _ancestors(nodes: Sequence[Node]) -> Iterator[Node]:
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
            yield node
