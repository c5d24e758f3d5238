"""Sums that only prepare a root: its own rows, weighed by something computed from it, are added to it.

A smear does this: `x[:, 1:] + gate(x) * x[:, :-1]`, before the first layer. Without a gate, or with a parameter in its
place, nothing is computed from the root and no rule takes it for a branch.
"""

from collections.abc import Collection
from itertools import takewhile

from torch.fx import Node

from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.row_maps import match_row_maps
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums
from attnres_fx.passes.streams.root_states import RootStates


def sums_of_own_rows(sums: FormalSums) -> set[tuple[Node, Node]]:
    """The additions that begin a stream with nothing but the root's own rows, and are read before more is added.

    A stream whose later sublayers do the same keeps them all: there they are what the model does.

    Args:
        sums: The states of a graph.

    Returns:
        Each such addition with the operand that would be the branch.
    """
    own = _rows_of_states(sums)
    extended = {n: s for n, s in sums.states.items() if isinstance(s, Extended) and s.addend not in sums.states}
    weighed = {n: s for n, s in extended.items() if own.get(s.addend) is sums.root[n]}
    roots = dict.fromkeys(sums.root[n] for n in weighed)
    return {(n, weighed[n].addend) for root in roots for n in _preparing(RootStates(sums, root), weighed)}


def _preparing(stream: RootStates, weighed: Collection[Node]) -> list[Node]:
    """The terms that a stream begins with, if they are read by themselves and it goes on with terms of another kind."""
    begun = list(takewhile(weighed.__contains__, stream.terms))
    later = stream.terms[len(begun) :]
    is_read = any(r.terms == (stream.root, *begun) for r in stream.reads)
    return begun if is_read and later and not any(t in weighed for t in later) else []


def _rows_of_states(sums: FormalSums) -> dict[Node, Node]:
    """The values that are rows of one stream's states, moved, weighed and added to each other, each with its root.

    Nothing was computed across the features of such a value, whatever its weights come from.
    """
    own = dict(sums.root)
    for node in sums.nodes:
        if node in own or all(n not in own for n in node.all_input_nodes):
            continue
        addition = match_addition(node)
        if addition is not None:
            roots = {own.get(addition.left), own.get(addition.right)}
        else:
            roots = {own[m.state] for m in match_row_maps(node) if m.state in own}
        root = roots.pop() if len(roots) == 1 else None
        if root is not None:
            own[node] = root
    return own
