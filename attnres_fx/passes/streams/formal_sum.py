"""Every node as a weighted sum of terms: one forward abstract interpretation over the graph.

A node is either opaque (a value of its own) or a *state*: the root of a stream, a state extended by one
more addend, two states of one stream merged, or a state mapped row by row. States form a graph of their
own, kept as data; their terms are read off by walking it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from attnres_fx.passes.graph.additions import Addition, match_addition
from attnres_fx.passes.graph.aliasing import mutated_arguments, storage_of
from attnres_fx.passes.graph.nodes import same_shape, shape_of, sizes_agree
from attnres_fx.passes.graph.operations import asks_only_metadata, is_light
from attnres_fx.passes.graph.row_maps import RowMap, match_row_maps


@dataclass(frozen=True)
class Root:
    """The first term of a stream."""

    node: Node


@dataclass(frozen=True)
class Extended:
    """`state_scale * state + addend_scale * addend`, where the addend is a term of its own."""

    node: Node
    state: Node
    state_scale: float
    addend: Node
    addend_scale: float


@dataclass(frozen=True)
class Merged:
    """Two states of one stream added: coefficients of common terms add up."""

    node: Node
    left: Node
    left_scale: float
    right: Node
    right_scale: float


@dataclass(frozen=True)
class Mapped:
    """A state seen through one row map."""

    node: Node
    state: Node
    kind: str


State = Root | Extended | Merged | Mapped


@dataclass
class FormalSums:
    """The states of a graph.

    states: what each state node is. root: which stream (by its root node) a state node belongs to.
    order: position of every node in the graph. lost: additions that look like a stream but are not one,
        with the reason.
    """

    states: dict[Node, State] = field(default_factory=dict)
    root: dict[Node, Node] = field(default_factory=dict)
    order: dict[Node, int] = field(default_factory=dict)
    dependence: "Dependence | None" = None

    def of_stream(self, root: Node) -> Iterator[Node]:
        """State nodes of one stream in graph order."""
        return (n for n, r in self.root.items() if r is root)

    def parents(self, node: Node) -> tuple[Node, ...]:
        """The states a state is made of."""
        match self.states[node]:
            case Root():
                return ()
            case Extended(state=state) | Mapped(state=state):
                return (state,)
            case Merged(left=left, right=right):
                return (left, right)

    def addend(self, term: Node) -> Node | None:
        """What a term's addition adds to the stream; None for a root."""
        state = self.states[term]
        return state.addend if isinstance(state, Extended) else None

    def row_map_path(self, node: Node) -> list[Node]:
        """The state that a node shows, and the row maps from it to the node; a factor begins a state of its own."""
        path = [node]
        while isinstance(step := self.states[path[-1]], Mapped) and step.kind != "factor":
            path.append(step.state)
        return path[::-1]

    def terms(self, node: Node) -> tuple[Node, ...]:
        """Extended nodes (and the root) whose addends make up a state, in the order they were added."""
        seen: dict[Node, None] = {}
        stack = [node]
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen[current] = None
            stack.extend(self.parents(current))
        kept = (n for n in seen if isinstance(self.states[n], Root | Extended))
        return tuple(sorted(kept, key=self.order.__getitem__))


class Dependence:
    """Which nodes depend on which anchors, at all and through more than elementwise operations.

    One bit for each anchor; anchors are the nodes that stand in candidate additions.
    """

    def __init__(self, graph: Graph, anchors: set[Node]) -> None:
        self._bit = {node: 1 << i for i, node in enumerate(anchors)}
        self._any: dict[Node, int] = {}
        self._heavy: dict[Node, int] = {}
        #: Storages that a node writes into: whatever they are copies of, they hold something else after.
        self.written: set[Node] = set()
        for node in graph.nodes:
            reached = heavy = 0
            for source in node.all_input_nodes:
                if asks_only_metadata(node, source):
                    continue
                reached |= self._any[source] | self._bit.get(source, 0)
                heavy |= self._heavy[source]
            self._any[node] = reached
            self._heavy[node] = heavy if is_light(node) else reached
            for target in mutated_arguments(node):
                self._write(node, target)

    def _write(self, node: Node, target: Node) -> None:
        for seen in storage_of(target):
            self.written.add(seen)
            self._any[seen] |= self._any[node]
            self._heavy[seen] |= self._heavy[node]

    def at_all(self, node: Node, anchor: Node) -> bool:
        return bool(self._any[node] & self._bit.get(anchor, 0))

    def is_branch(self, node: Node, anchor: Node) -> bool:
        """Whether `node` depends on `anchor` through at least one operation that is not elementwise."""
        return bool(self._heavy[node] & self._bit.get(anchor, 0))


def find_formal_sums(graph: Graph) -> FormalSums:
    """Interpret a graph without mutations, with values on its nodes, as formal sums."""
    return _Interpreter(graph).run()


class _Interpreter:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.sums = FormalSums(order={n: i for i, n in enumerate(graph.nodes)})
        self.additions = {n: a for n in graph.nodes if (a := match_addition(n)) is not None}
        self.maps: dict[Node, tuple[RowMap, ...]] = {n: m for n in graph.nodes if (m := match_row_maps(n))}
        self.depends = Dependence(graph, self._anchors())
        self.sums.dependence = self.depends

    def _anchors(self) -> set[Node]:
        found: set[Node] = set()
        stack = [o for a in self.additions.values() for o in (a.left, a.right)]
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            stack.extend(m.state for m in self.maps.get(node, ()))
        return found

    def run(self) -> FormalSums:
        for node in self.graph.nodes:
            addition = self.additions.get(node)
            if addition is not None:
                self._add(node, addition)
        for node in self.graph.nodes:
            self._state_of(node)
        self.sums.root = dict(sorted(self.sums.root.items(), key=lambda item: self.sums.order[item[0]]))
        return self.sums

    def _state_of(self, node: Node) -> Node | None:
        """Root of the stream a node is a state of, following maps down to a known state."""
        sums = self.sums
        if node in sums.states:
            return sums.root[node]
        for row_map in self._maps_of(node):
            root = self._state_of(row_map.state)
            if root is not None and self._is_independent(row_map, root):
                sums.states[node] = Mapped(node, row_map.state, row_map.kind)
                sums.root[node] = root
                return root
        return None

    def _maps_of(self, node: Node) -> tuple[RowMap, ...]:
        return () if node in self.depends.written else self.maps.get(node, ())

    def _is_independent(self, row_map: RowMap, root: Node) -> bool:
        return not any(o is root or self.depends.at_all(o, root) for o in row_map.others)

    def _add(self, node: Node, addition: Addition) -> None:
        left, right = addition.left, addition.right
        left_root, right_root = self._state_of(left), self._state_of(right)
        swapped = Addition(right, addition.right_scale, left, addition.left_scale)
        if left_root is not None and left_root is right_root:
            self._merge(node, addition)
            return
        candidates = [(addition, left_root, right_root), (swapped, right_root, left_root)]
        if right_root is not None and (left_root is None or self._length(right) > self._length(left)):
            candidates.reverse()
        for ordered, state_root, _ in candidates:
            if state_root is not None and self._extends_by_branch(node, ordered, state_root):
                return
        for ordered, state_root, other_root in candidates:
            if state_root is None or other_root is not None or self._is_before(ordered.right, state_root):
                continue
            if self._extends_by_injection(node, ordered, state_root):
                return
        for ordered, state_root, _ in candidates:
            if state_root is None and self._starts(node, ordered):
                return
        for ordered, state_root, _ in candidates:
            if state_root is not None and self._extends_by_injection(node, ordered, state_root):
                return

    def _length(self, node: Node) -> int:
        return len(self.sums.terms(node))

    def _merge(self, node: Node, a: Addition) -> None:
        sums = self.sums
        root = sums.root[a.left]
        if not (same_shape(a.left, node) and same_shape(a.right, node)):
            return
        lengths = self._length(a.left), self._length(a.right)
        if min(lengths) == 1 < max(lengths):  # the root again, as one more addend
            longer = a if lengths[0] > 1 else Addition(a.right, a.right_scale, a.left, a.left_scale)
            self._extend(node, longer, root)
            return
        if max(lengths) > 1 or (self._is_scaled_root(a.left) and self._is_scaled_root(a.right)):
            sums.states[node] = Merged(node, a.left, a.left_scale, a.right, a.right_scale)
            sums.root[node] = root

    def _is_scaled_root(self, node: Node) -> bool:
        """Whether a state is the root times something: its rows are where they were."""
        while isinstance(step := self.sums.states[node], Mapped):
            if step.kind not in ("factor", "cast", "identity"):
                return False
            node = step.state
        return True

    def _extends_by_branch(self, node: Node, a: Addition, root: Node) -> bool:
        if not same_shape(a.right, node) or not _broadcasts_rows(a.left, node):
            return False
        if not self.depends.is_branch(a.right, root):
            return False
        self._extend(node, a, root)
        return True

    def _is_before(self, node: Node, root: Node) -> bool:
        """Whether a stream was computed from a value, or from what it maps, by more than elementwise work.

        Then the stream may be inside a sublayer of that value's own; `a * x0 + b * x0` is not.
        """
        path = [node]
        while below := [m.state for m in self._maps_of(path[-1]) if self._may_start_below(m)]:
            path.append(below[0])
        return any(self.depends.is_branch(root, n) for n in path)

    def _extends_by_injection(self, node: Node, a: Addition, root: Node) -> bool:
        if self._length(a.left) < 2 or not same_shape(a.left, node):
            return False
        if a.right is root or self.depends.at_all(a.right, root):
            return False
        self._extend(node, a, root)
        return True

    def _starts(self, node: Node, a: Addition) -> bool:
        """Whether `left + right` begins a stream: right is a branch of left, or of what left is a map of."""
        if not same_shape(a.right, node) or not _broadcasts_rows(a.left, node):
            return False
        path = [a.left]
        while not self.depends.is_branch(a.right, path[-1]):
            below = [m.state for m in self._maps_of(path[-1]) if self._may_start_below(m)]
            if not below:
                return False
            path.append(below[0])
        root = path[-1]
        self.sums.states.setdefault(root, Root(root))
        self.sums.root.setdefault(root, root)
        if self._state_of(a.left) is None:
            return False
        self._extend(node, a, self.sums.root[root])
        return True

    def _may_start_below(self, row_map: RowMap) -> bool:
        return not any(self.depends.at_all(o, row_map.state) or o is row_map.state for o in row_map.others)

    def _extend(self, node: Node, a: Addition, root: Node) -> None:
        self.sums.states[node] = Extended(node, a.left, a.left_scale, a.right, a.right_scale)
        self.sums.root[node] = root


def _broadcasts_rows(state: Node, result: Node) -> bool:
    """Whether a state has the result's shape, or is spread over it in leading dimensions only."""
    if same_shape(state, result):
        return True
    small, large = shape_of(state), shape_of(result)
    return bool(small) and len(small) <= len(large) and sizes_agree(small[-1], large[-1]) and len(small) >= 2


__all__ = ["Extended", "FormalSums", "Mapped", "Merged", "Root", "State", "find_formal_sums"]
