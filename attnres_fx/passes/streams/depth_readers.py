"""Models that read their depth already: weighted sums over a stack or a list of their own earlier outputs."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch.fx import Node

from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.nodes import argument_of, is_floating
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, is_light, may_be_in_norm, moves_data, op_name
from attnres_fx.passes.streams.contractions import contracted_tensors
from attnres_fx.passes.streams.dependence import Dependence


@dataclass(frozen=True)
class _Reader:
    """A weighted sum of values that are joined, or listed, along a dimension of their own.

    Attributes:
        node: The sum.
        values: What is weighed.
        attends: Whether a softmax makes the weights.
    """

    node: Node
    values: frozenset[Node]
    attends: bool = True


def find_depth_readers(nodes: tuple[Node, ...]) -> list[Node]:
    """The nodes that weigh what earlier layers wrote.

    Some of what they weigh was computed from other of it, a value is weighed by several of them, and a later one weighs
    what was computed from an earlier one. So experts, heads and scales are none, nor is one mixture of all layers at
    the end of a model. Without a softmax, a later one weighs all that an earlier one does: a stream that mixes its
    root in again at each layer weighs its last state instead.

    Args:
        nodes: Of a graph, in its order.

    Returns:
        In graph order; empty where the model does not read its depth.
    """
    found = [r for n in nodes if (r := _reader(n)) is not None] + _listed(nodes)
    readers = sorted((r for r in found if len(r.values) > 1), key=lambda r: r.node)
    if len(readers) < 2:
        return []
    anchors = {v for r in readers for v in r.values} | {r.node for r in readers}
    depends = Dependence(nodes[0].graph, anchors)
    readers = [r for r in readers if any(depends.is_branch(a, b) for a in r.values for b in r.values)]
    pairs = [(e, r) for i, r in enumerate(readers) for e in readers[:i] if _goes_on(e, r, depends)]
    return sorted({reader.node for pair in pairs for reader in pair})


def _goes_on(earlier: _Reader, later: _Reader, depends: Dependence) -> bool:
    again = not earlier.values.isdisjoint(later.values) if later.attends else earlier.values <= later.values
    return again and any(depends.is_branch(value, earlier.node) for value in later.values - earlier.values)


def _reader(node: Node) -> _Reader | None:
    if op_name(node) == "sdpa" and isinstance(value := argument_of(node, 2, "value"), Node):
        return _of_joined(node, value)
    factors = contracted_tensors(node)
    for value in factors:
        if any(_first_below(f, Trait.SOFTMAX, is_light) is not None for f in factors if f is not value):
            found = _of_joined(node, value)
            if found is not None:
                return found
    return None


def _of_joined(node: Node, value: Node) -> _Reader | None:
    """A reader of the values that are joined in what it weighs, seen through norms and elementwise work."""
    join = _first_below(value, Trait.JOINS, may_be_in_norm)
    return None if join is None else _Reader(node, frozenset(_joined(join)))


def _first_below(node: Node, trait: Trait, through: Callable[[Node], bool]) -> Node | None:
    """A node with a trait that another is computed from, through nodes of one sort alone."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if has_trait(current, trait):
            return current
        if through(current):
            stack += [n for n in current.all_input_nodes if is_floating(n)]
    return None


def _joined(node: Node) -> Iterator[Node]:
    """What a node joins, seen through other joins and views."""
    for part in node.all_input_nodes:
        below = part
        while moves_data(below) and below.all_input_nodes:
            below = below.all_input_nodes[0]
        if has_trait(below, Trait.JOINS):
            yield from _joined(below)
        else:
            yield below


def _listed(nodes: tuple[Node, ...]) -> list[_Reader]:
    """`w[0] * v0 + w[1] * v1 + …`, where the weights are slices of one tensor; whole sums, no parts of one."""
    sums: dict[Node, tuple[Node, frozenset[Node]]] = {}
    for node in nodes:
        addition = match_addition(node)
        if addition is None:
            continue
        left, right = (sums.get(n) or _weighed(n) for n in (addition.left, addition.right))
        if left is not None and right is not None and left[0] is right[0]:
            sums[node] = left[0], left[1] | right[1]
    whole = {n: found for n, found in sums.items() if not any(u in sums for u in n.users)}
    return [_Reader(n, values, has_trait(source, Trait.SOFTMAX)) for n, (source, values) in whole.items()]


def _weighed(node: Node) -> tuple[Node, frozenset[Node]] | None:
    """The tensor whose slice weighs a value, and the value."""
    pairs = ((v, w, _whole_of(w)) for v, w in _products(node))
    return next(((source, frozenset([v])) for v, w, source in pairs if source is not w), None)


def _products(node: Node) -> Iterable[tuple[Node, Node]]:
    if op_name(node) != "mul" or len(node.all_input_nodes) != 2:
        return ()
    left, right = node.all_input_nodes
    return (left, right), (right, left)


def _whole_of(node: Node) -> Node:
    """The tensor that a node is a part of, as far as a softmax."""
    while node.all_input_nodes and (moves_data(node) or has_trait(node, Trait.SPLITS) or op_name(node) == "getitem"):
        node = node.all_input_nodes[0]
    return node
