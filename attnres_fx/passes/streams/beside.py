"""Sums beside a stream: a value is added to a state for one consumer alone, and the state goes on without it.

Positions do this in detection models: `q = k = x + positions` in every layer. From the second layer on `x` depends on
the positions, so that the sum looks like a residual whose branch is `x`. Where the positions are computed from `x`
itself (boxes that each layer refines), the sum is taken in by what is then added to `x`.
"""

from torch.fx import Node

from attnres_fx.passes.graph.operations import is_norm_step, may_be_in_norm
from attnres_fx.passes.graph.row_maps import match_row_maps
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums, Mapped

#: How far back from a root a norm that is written out is looked through.
_NORM_STEPS = 64


def sums_beside(sums: FormalSums) -> set[tuple[Node, Node]]:
    """The additions that start no stream, although one operand depends on the other.

    Nothing is added to the sum any more, and either what looks like its branch goes on by itself, or the state does:
    what is added to it next, for the last time, is computed from the sum. The latter in post-norm streams alone:
    elsewhere `x + f(x + g(x))` takes in a state with one more term.

    Args:
        sums: The states of a graph.

    Returns:
        Each such addition with the operand that would be the branch.
    """
    extended = {state.state for state in sums.states.values() if isinstance(state, Extended)}
    carried = sums.carried_on(extended)
    ends = {
        node: state
        for node, state in sums.states.items()
        if isinstance(state, Extended) and node not in carried and len(sums.terms(state.state)) == 1
    }
    last = {_in_place(sums, state.state): state for state in ends.values()}
    return {
        (node, state.addend)
        for node, state in ends.items()
        if not extended.isdisjoint(_row_maps_of(state.addend))
        or (
            sums.dependence.at_all(last[_in_place(sums, state.state)].addend, node)
            and _is_norm_of_sum(sums, sums.root[node])
        )
    }


def _is_norm_of_sum(sums: FormalSums, root: Node) -> bool:
    """Whether a root is a norm of another stream's sum, as the states of a post-norm stream are."""
    stack, seen, reached = [root], {root}, False
    while stack and len(seen) <= _NORM_STEPS:
        node = stack.pop()
        if node is not root and node in sums.states and len(sums.terms(node)) > 1:
            reached = True
        elif may_be_in_norm(node):
            fresh = [n for n in node.all_input_nodes if n not in seen]
            seen.update(fresh)
            stack += fresh
    return reached and any(map(is_norm_step, seen))


def _in_place(sums: FormalSums, node: Node) -> Node:
    """The state that a node shows with every row where it was."""
    while isinstance(step := sums.states[node], Mapped) and step.kind != "token":
        node = step.state
    return node


def _row_maps_of(value: Node) -> list[Node]:
    """A value, what it is a row map of, and their other row maps."""
    while below := match_row_maps(value):
        value = below[0].state
    same = [value]
    for node in same:
        same += [u for u in node.users if u not in same and any(m.state is node for m in match_row_maps(u))]
    return same
