"""Sums beside a stream: a value is added to a state for one consumer alone, and the state goes on without it.

Positions do this in detection models: `q = k = x + positions` in every layer. From the second layer on `x` depends on
the positions, so that the sum looks like a residual whose branch is `x`.
"""

from torch.fx import Node

from attnres_fx.passes.graph.row_maps import match_row_maps
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums


def sums_beside(sums: FormalSums) -> set[tuple[Node, Node]]:
    """The additions that start no stream, although one operand depends on the other.

    Nothing is added to the sum any more, and what looks like its branch goes on by itself.

    Args:
        sums: The states of a graph.

    Returns:
        Each such addition with the operand that goes on.
    """
    extended = {state.state for state in sums.states.values() if isinstance(state, Extended)}
    carried = _carried_on(sums, extended)
    return {
        (node, state.addend)
        for node, state in sums.states.items()
        if isinstance(state, Extended) and node not in carried and len(sums.terms(state.state)) == 1
        if not extended.isdisjoint(_row_maps_of(state.addend))
    }


def _carried_on(sums: FormalSums, extended: set[Node]) -> set[Node]:
    """The states that another term is added to, whatever is done to them before that."""
    stack = list(extended)
    found: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(sums.parents(node))
    return found


def _row_maps_of(value: Node) -> list[Node]:
    """A value, what it is a row map of, and their other row maps."""
    while below := match_row_maps(value):
        value = below[0].state
    same = [value]
    for node in same:
        same += [u for u in node.users if u not in same and any(m.state is node for m in match_row_maps(u))]
    return same
