"""Every node of a graph as a weighted sum of terms: one forward abstract interpretation.

A node is either opaque (a value of its own) or a state. A state is what an addition of two tensors makes of a
stream, or a row map of a state.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import Graph, Node

from attnres_fx.passes.graph.additions import Addition, match_addition
from attnres_fx.passes.graph.nodes import same_shape, shape_of, sizes_agree
from attnres_fx.passes.graph.operations import asks_only_metadata
from attnres_fx.passes.graph.row_maps import RowMap, adds_rows, match_row_maps
from attnres_fx.passes.normalize.dead_code import find_live
from attnres_fx.passes.streams.centring import centres
from attnres_fx.passes.streams.data import is_form_of_weight
from attnres_fx.passes.streams.dependence import Dependence
from attnres_fx.passes.streams.feature_dimensions import FeatureDimensions
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums, Mapped, Merged, Root
from attnres_fx.passes.streams.inside_norms import is_inside_norm


def find_formal_sums(graph: Graph, beside: Collection[tuple[Node, Node]] = ()) -> FormalSums:
    """Interpret a graph as formal sums.

    Args:
        graph: A graph without mutations, with values on its nodes. It is left as it is.
        beside: Additions that are no residuals, each with the operand that would be the branch (`sums_beside`).

    Returns:
        Its states, each a weighted sum of terms.
    """
    return _Interpreter(graph, frozenset(beside)).run()


#: Kinds of row maps that leave every row where it is.
_SAME_ROWS = ("factor", "cast", "identity", "detach")


@dataclass(frozen=True)
class _Reading:
    """An addition read as `state + addend`.

    Args:
        addition: The state at its left, the addend at its right.
        root: The root of the stream that the left operand is a state of; None where it is none.
        addend_root: The same of the right operand.
    """

    addition: Addition
    root: Node | None
    addend_root: Node | None


class _Interpreter:
    def __init__(self, graph: Graph, beside: frozenset[tuple[Node, Node]]) -> None:
        self.graph = graph
        self.beside = beside
        live = find_live(graph)
        self.features = FeatureDimensions(graph)
        self.additions = {n: a for n in graph.nodes if n in live.observed and (a := match_addition(n)) is not None}
        self.maps: dict[Node, tuple[RowMap, ...]] = {
            n: m for n in graph.nodes if n in live.observed and (m := match_row_maps(n, self.features.keeps_rows))
        }
        self.depends = Dependence(graph, self._anchors())
        self.sums = FormalSums(tuple(graph.nodes), self.depends, live, self.features)

    def _anchors(self) -> set[Node]:
        found: set[Node] = set()
        stack = [n for node, a in self.additions.items() for n in (node, a.left, a.right)]
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
        # A state that is turned or gets more rows is one where the stream goes on from it; elsewhere a read does that.
        self.maps = {n: kept for n, maps in self.maps.items() if (kept := tuple(m for m in maps if self._stays(n, m)))}
        for node in self.graph.nodes:
            self._state_of(node)
        self.sums.root = dict(sorted(self.sums.root.items(), key=lambda item: item[0]))
        return self.sums

    def _state_of(self, node: Node) -> Node | None:
        """Root of the stream a node is a state of, following maps down to a known state."""
        sums = self.sums
        if node in sums.states:
            return sums.root[node]
        for row_map in self._maps_of(node):
            root = self._state_of(row_map.state)
            if root is not None and self._is_independent(row_map, root) and not self._is_in_norm(node, row_map):
                sums.states[node] = Mapped(node, row_map.state, row_map.kind)
                sums.root[node] = root
                return root
        return None

    def _maps_of(self, node: Node) -> tuple[RowMap, ...]:
        return () if node in self.depends.written else self.maps.get(node, ())

    def _stays(self, node: Node, row_map: RowMap) -> bool:
        return not (self.features.turns(row_map.state, node) or adds_rows(node))

    def _is_independent(self, row_map: RowMap, root: Node) -> bool:
        return not any(o is root or self.depends.at_all(o, root) for o in row_map.others)

    def _is_in_norm(self, node: Node, row_map: RowMap) -> bool:
        return row_map.kind == "factor" and is_inside_norm(node, self._forms_of(row_map.state))

    def _forms_of(self, state: Node) -> set[Node]:
        """A state, and what it is a cast or a view of."""
        return set(self.sums.row_map_path(state))

    def _add(self, node: Node, addition: Addition) -> None:
        self._begin_with_one_value(addition)
        left_root, right_root = self._state_of(addition.left), self._state_of(addition.right)
        if left_root is not None and left_root is right_root:
            self._merge(node, addition)
            return
        readings = self._readings(addition, left_root, right_root)
        rules = (self._extends_by_branch, self._extends_by_outside_value, self._starts, self._extends_by_injection)
        for rule in rules:
            if any(rule(node, reading) for reading in readings):
                return

    def _begin_with_one_value(self, addition: Addition) -> None:
        """`a * x + b * x` is a multiple of x, which may be the root of a stream: without terms it is none."""
        left, right = self._multiple_of(addition.left), self._multiple_of(addition.right)
        if left is right and left not in self.sums.states and left not in (addition.left, addition.right):
            self.sums.states[left] = Root(left)
            self.sums.root[left] = left

    def _multiple_of(self, node: Node) -> Node:
        while below := [m for m in self._maps_of(node) if m.kind in _SAME_ROWS and self._may_start_below(m)]:
            node = below[0].state
        return node

    def _readings(self, addition: Addition, left_root: Node | None, right_root: Node | None) -> list[_Reading]:
        """Both ways to read an addition; first the one whose state has more terms, and the left one of equals."""
        readings = [_Reading(addition, left_root, right_root), _Reading(addition.swapped, right_root, left_root)]
        if right_root is not None and (left_root is None or self._length(addition.right) > self._length(addition.left)):
            readings.reverse()
        return readings

    def _length(self, node: Node) -> int:
        return len(self.sums.terms(node))

    def _merge(self, node: Node, a: Addition) -> None:
        sums = self.sums
        root = sums.root[a.left]
        if not _fits(a.left, a.right, node):
            return
        lengths = self._length(a.left), self._length(a.right)
        if min(lengths) == 1 < max(lengths):
            longer = a if lengths[0] > 1 else a.swapped
            if self._was_read(longer.left, node):  # the root again, as one more addend
                self._extend(node, longer, root)
                return
        if max(lengths) > 1 or (self._is_scaled_root(a.left) and self._is_scaled_root(a.right)):
            sums.states[node] = Merged(node, a.left, a.left_scale, a.right, a.right_scale)
            sums.root[node] = root

    def _was_read(self, state: Node, merged: Node) -> bool:
        """Whether anything but its sum takes in a state, or one that it was made of and that has more than the root.

        Until then all of it is one sum still being written: `lerp(h, h + 2 * f, 0.5)` is `h + f`. A sum beside it that
        stands before the merged one is a reader: positions that are added for one consumer.
        """
        stack = [state]
        seen = {state, merged}
        while stack:
            current = max(stack)  # so that what else the sum made of it was seen before
            stack.remove(current)
            users = [u for u in current.users if u not in seen and (u not in self.additions or u < merged)]
            if not all(u in self.maps or asks_only_metadata(u, current) for u in users):
                return True
            below = (
                [p for p in self.sums.parents(current) if self._length(p) > 1] if current in self.sums.states else []
            )
            fresh = {n for n in (*below, *users) if n not in seen and (n in self.maps or n in below)}
            seen |= fresh
            stack.extend(fresh)
        return False

    def _is_scaled_root(self, node: Node) -> bool:
        """Whether a state is the root times something: its rows are where they were."""
        while isinstance(step := self.sums.states[node], Mapped):
            if step.kind not in _SAME_ROWS:
                return False
            node = step.state
        return True

    def _extends_by_branch(self, node: Node, reading: _Reading) -> bool:
        """`state + addend`, where the addend is a branch of the state's stream."""
        a, root = reading.addition, reading.root
        if root is None or not _fits(a.left, a.right, node) or not self._broadcasts_rows(a.left, node):
            return False
        if (node, a.right) in self.beside or centres(a, root, self.depends):
            return False
        if not self.depends.is_branch(a.right, root):
            return False
        self._extend(node, a, root)
        return True

    def _extends_by_outside_value(self, node: Node, reading: _Reading) -> bool:
        """`state + addend`, where the addend is part of no stream and the state's was not computed from it."""
        a, root = reading.addition, reading.root
        if root is None or reading.addend_root is not None or self._is_before(a.right, root):
            return False
        return self._extends_by_injection(node, reading)

    def _is_before(self, node: Node, root: Node) -> bool:
        """Whether a stream was computed from a value, or from what it maps, by more than elementwise work.

        Then the stream may be inside a sublayer of that value's own; `a * x0 + b * x0` is not.
        """
        path = [node]
        while below := [m.state for m in self._maps_of(path[-1]) if self._may_start_below(m)]:
            path.append(below[0])
        return any(self.depends.is_branch(root, n) for n in path)

    def _extends_by_injection(self, node: Node, reading: _Reading) -> bool:
        """`state + addend`, where the addend does not depend on the state's stream."""
        a, root = reading.addition, reading.root
        if root is None or self._length(a.left) < 2 or not same_shape(a.left, node):
            return False
        if a.right is root or self.depends.at_all(a.right, root) or is_inside_norm(node, self._forms_of(a.left)):
            return False
        self._extend(node, a, root)
        return True

    def _starts(self, node: Node, reading: _Reading) -> bool:
        """`left + right` begins a stream: right is a branch of left, or of what left is a map of."""
        a = reading.addition
        if reading.root is not None or not _fits(a.left, a.right, node) or not self._broadcasts_rows(a.left, node):
            return False
        if (node, a.right) in self.beside:
            return False
        path, shifts = [a.left], []
        while not self.depends.is_branch(a.right, path[-1]):
            shift = self._shift_of(path[-1])
            below = [m.state for m in self._maps_of(path[-1]) if self._may_start_below(m)]
            if shift is not None:
                shifts.append((path[-1], shift))
                below = [shift.left]
            if not below:
                return False
            path.append(below[0])
        root = path[-1]
        if centres(a, root, self.depends):
            return False
        self.sums.states.setdefault(root, Root(root))
        self.sums.root.setdefault(root, root)
        for shifted, shift in reversed(shifts):
            if self._state_of(shift.left) is not None:
                self._extend(shifted, shift, root)
        if self._state_of(a.left) is None:
            return False
        self._extend(node, a, self.sums.root[root])
        return True

    def _shift_of(self, node: Node) -> Addition | None:
        """An addition of a parameter to a value, as a carry that is scaled and shifted has it: `(x + b) * s + f(x)`."""
        addition = self.additions.get(node)
        if addition is None or node in self.sums.states:
            return None
        ways = (addition, addition.swapped)
        return next((w for w in ways if is_form_of_weight(w.right) and same_shape(w.left, node)), None)

    def _may_start_below(self, row_map: RowMap) -> bool:
        return not any(self.depends.at_all(o, row_map.state) or o is row_map.state for o in row_map.others)

    def _extend(self, node: Node, a: Addition, root: Node) -> None:
        self.sums.states[node] = Extended(node, a.left, a.left_scale, a.right, a.right_scale)
        self.sums.root[node] = root

    def _broadcasts_rows(self, state: Node, result: Node) -> bool:
        """Whether a state has the result's shape, or is spread over it in dimensions other than its features'."""
        if same_shape(state, result):
            return True
        small, large = shape_of(state), shape_of(result)
        if len(small) < 2 or len(small) > len(large):
            return False
        at = self.features.trailing(state)
        return at == self.features.trailing(result) and sizes_agree(small[at], large[at])


def _fits(left: Node, right: Node, result: Node) -> bool:
    """Whether one operand of an addition has the result's shape, so that the other is spread over it."""
    return same_shape(left, result) or same_shape(right, result)
