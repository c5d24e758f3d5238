"""Sums in which the stream is weighted by what was computed from it: gated carries, in every spelling."""

from collections.abc import Collection, Iterator, Mapping

from torch.fx import Node

from attnres_fx.passes.graph.additions import Addition, match_addition
from attnres_fx.passes.graph.nodes import describe, is_floating, shape_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, moves_data, op_name
from attnres_fx.passes.streams.centring import centres
from attnres_fx.passes.streams.dependence import Dependence
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums, Merged
from attnres_fx.passes.streams.mixed_copies import origin_of


def find_gated_carries(nodes: tuple[Node, ...], sums: FormalSums) -> Iterator[tuple[Node, str]]:
    """The nodes that carry a stream through a gate, each with the reason why that is no sum.

    Args:
        nodes: Of the graph, in its order.
        sums: Its states.
    """
    additions = {n: a for n in nodes if (a := match_addition(n)) is not None}
    chosen = {n: t for n in nodes if is_floating(n) and (t := _chosen_between(n)) is not None}
    cells = {n: c for n in nodes if (c := _cell(n)) is not None}
    ancestry = Dependence(sums.nodes[0].graph, _asked_about(additions, chosen, cells))

    def why(node: Node) -> str:
        if node in chosen:
            return _why_chosen(*chosen[node], ancestry)
        if node in cells:
            return _why_cell(node, *cells[node], ancestry)
        if node in additions and not isinstance(sums.states.get(node), Merged):
            return _why_gated(additions[node], isinstance(sums.states.get(node), Extended), ancestry)
        return ""

    yield from ((node, reason) for node in nodes if (reason := why(node)))


def _asked_about(
    additions: Mapping[Node, Addition], chosen: Collection[Node], cells: Mapping[Node, tuple[Node, Node]]
) -> set[Node]:
    """The nodes that others may depend on, as far as the rules below ask."""
    operands = {o for a in additions.values() for o in (a.left, a.right)}
    inputs = {i for n in (*operands, *chosen) for i in n.all_input_nodes}
    inputs |= {origin_of(i) for i in inputs}
    return {*operands, *inputs, *additions, *chosen, *(state for _, state in cells.values())}


def _why_cell(node: Node, taken: Node, state: Node, ancestry: Dependence) -> str:
    if not ancestry.is_branch(taken, state):
        return ""
    return f"the stream is the state of {op_name(node)!r}, a cell with gates: a gated carry"


def _chosen_between(node: Node) -> tuple[Node, Node, Node] | None:
    """Start, end and weight of `lerp`, or of `where`."""
    first, second, third, *more = [*node.args, *node.kwargs.values(), None, None, None]
    known = isinstance(first, Node) and isinstance(second, Node) and isinstance(third, Node) and more == [None] * 3
    if not known:
        return None
    if op_name(node) == "lerp":
        return first, second, third  # type: ignore[return-value]
    if op_name(node) == "where" and is_floating(second) and is_floating(third):  # type: ignore[arg-type]
        return second, third, first  # type: ignore[return-value]
    return None


def _why_chosen(start: Node, end: Node, weight: Node, ancestry: Dependence) -> str:
    for x, other in ((start, end), (end, start)):
        if ancestry.is_branch(weight, x) and ancestry.is_branch(other, x):
            return f"the stream is weighted by {describe(weight)}, which depends on it: a gated carry"
    return ""


def _cell(node: Node) -> tuple[Node, Node] | None:
    """What a cell of a recurrent network takes in, and the state that it is given, whatever shape that was brought to.

    A cell over time takes in what was not computed from its state.
    """
    if not has_trait(node, Trait.GATED_CELL) or len(node.args) < 2:
        return None
    taken, state = node.args[:2]
    state = state[0] if isinstance(state, list | tuple) else state
    while isinstance(state, Node) and moves_data(state) and isinstance(state.args[0], Node):
        state = state.args[0]
    return (taken, state) if isinstance(taken, Node) and isinstance(state, Node) else None


def _why_gated(addition: Addition, extended: bool, ancestry: Dependence) -> str:
    for read in (addition, addition.swapped):
        why = _why_moved(read.left, read.right, ancestry) or ("" if extended else _why_multiplied(read, ancestry))
        if why:
            return why
    return ""


def _why_moved(carry: Node, branch: Node, ancestry: Dependence) -> str:
    """Whether `x + branch` is `x + g * (f - x)`, or `f + g * (x - f)`."""
    for gate, difference in _factors(branch):
        inner = match_addition(difference)
        if inner is None or not is_floating(gate):
            continue
        sides = ((inner.left, inner.left_scale, inner.right), (inner.right, inner.right_scale, inner.left))
        other = next((f for x, scale, f in sides if x is carry and scale < 0), None)
        for x, f in () if other is None else ((carry, other), (other, carry)):
            if ancestry.is_branch(gate, x) and ancestry.is_branch(f, x):
                return f"the stream is moved towards a branch by {describe(gate)}, which depends on it: a gated carry"
    return ""


def _why_multiplied(addition: Addition, ancestry: Dependence) -> str:
    """Whether a sum is `g * x + f`, where gate and branch are more than elementwise work on x.

    What is taken off a product as its mean is no branch: a norm with its gain first centres `g * h`, and where norms
    share the gain, h depends on it.
    """
    branch = addition.right
    for value, gate in _factors(addition.left):
        for x in (value, origin_of(value)):
            if not is_floating(x) or not (ancestry.is_branch(gate, x) and ancestry.is_branch(branch, x)):
                continue
            if not _may_be_carried(x, addition.left) or centres(addition, x, ancestry):
                continue
            others = [v for v, weight in _factors(branch) if ancestry.is_branch(weight, x)]
            if any(v is x or not ancestry.is_branch(v, x) for v in others):
                return f"copies of the stream are mixed with weights like {describe(gate)}: hyper-connections"
            if x is value:
                return f"the stream is multiplied by {describe(gate)}, which depends on the stream: a gated carry"
    return ""


def _may_be_carried(value: Node, product: Node) -> bool:
    """Whether a factor may be a stream: one vector for all rows of a product is their gain."""
    return len(shape_of(value)) > 1 or len(shape_of(product)) == 1


def _factors(node: Node) -> list[tuple[Node, Node]]:
    """Both orders of the factors of a product of two tensors."""
    if op_name(node) != "mul" or len(node.args) != 2 or not all(isinstance(a, Node) for a in node.args):
        return []
    left, right = node.args
    return [(left, right), (right, left)]  # type: ignore[list-item]
