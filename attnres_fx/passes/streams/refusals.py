"""Streams that are carried by something other than addition: named, never guessed at."""

from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Graph, Node

from attnres_fx.passes.graph.additions import Addition, match_addition
from attnres_fx.passes.graph.nodes import describe, is_floating, shape_of, shapes_agree, sizes_agree
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, op_name
from attnres_fx.passes.streams.dependence import Dependence
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums, Merged, State


@dataclass(frozen=True)
class Refusal:
    """Something that looks like a residual stream and was left alone.

    Args:
        kind: `"not additive"`, `"width"`, `"injected"` (added into another stream's sublayers), `"interrupted"`
            (one stream ends where another begins), or `"hidden"` in a region that cannot be inlined.
        place: The node, its module path and source line.
        reason: Why it was refused.
        stops_conversion: Whether a model that has it must not be converted, because the result would be wrong.
        advice: What to do instead.
    """

    kind: Literal["not additive", "width", "injected", "interrupted", "hidden"]
    place: str
    reason: str
    stops_conversion: bool = False
    advice: str = ""


def find_refusals(graph: Graph, sums: FormalSums) -> list[tuple[Node, Refusal]]:
    """Where a stream is carried by something that is no sum.

    Args:
        graph: The graph that the sums are of.
        sums: Its states.

    Returns:
        In graph order, the node that carries and why it is refused; after them, streams that change their width.
    """
    refusals = []
    additions = {n: a for n in graph.nodes if (a := match_addition(n)) is not None}
    lerps = {n for n in graph.nodes if op_name(n) == "lerp" and is_floating(n)}
    ancestry = Dependence(graph, _carries_and_their_inputs(additions, lerps))
    for node in graph.nodes:
        reason = ""
        if node in lerps:
            reason = _why_gated_lerp(node, ancestry)
        elif node in additions:
            reason = _why_gated_sum(additions[node], sums.states.get(node), ancestry)
        if reason:
            refusals.append((node, Refusal("not additive", describe(node), reason, True, _ADVICE)))
    return refusals + _widened(graph, sums)


def _carries_and_their_inputs(additions: dict[Node, Addition], lerps: set[Node]) -> set[Node]:
    operands = {o for a in additions.values() for o in (a.left, a.right)}
    inputs = {i for n in (*operands, *lerps) for i in n.all_input_nodes}
    return operands | inputs | additions.keys() | lerps


def _why_gated_sum(addition: Addition, state: State | None, ancestry: Dependence) -> str:
    if isinstance(state, Merged):
        return ""
    why = _why_gated_difference if isinstance(state, Extended) else _why_not_additive
    pairs = ((addition.left, addition.right), (addition.right, addition.left))
    return next((reason for carry, branch in pairs if (reason := why(carry, branch, ancestry))), "")


_ADVICE = "Hyper-connections and gated carries cannot be converted; name other streams in the config, or leave it."


def _why_gated_lerp(node: Node, ancestry: Dependence) -> str:
    start, end, weight = (*node.args, None, None, None)[:3]
    if not all(isinstance(n, Node) for n in (start, end, weight)):
        return ""
    gated = ancestry.is_branch(weight, start) and ancestry.is_branch(end, start)  # type: ignore[arg-type]
    return f"the stream is weighted by {describe(weight)}, which depends on it: a gated carry" if gated else ""  # type: ignore[arg-type]


def _why_gated_difference(carry: Node, branch: Node, ancestry: Dependence) -> str:
    """Whether `x + branch` is `x + g * (f - x)`."""
    if op_name(branch) != "mul" or len(branch.args) != 2:
        return ""
    for gate, difference in (branch.args, branch.args[::-1]):
        if not isinstance(gate, Node) or not isinstance(difference, Node) or not is_floating(gate):
            continue
        inner = match_addition(difference)
        if inner is None or not ancestry.is_branch(gate, carry):
            continue
        sides = ((inner.left, inner.left_scale, inner.right), (inner.right, inner.right_scale, inner.left))
        if any(x is carry and scale < 0 and ancestry.is_branch(f, carry) for x, scale, f in sides):
            return f"the stream is moved towards a branch by {describe(gate)}, which depends on it: a gated carry"
    return ""


def _why_not_additive(carry: Node, branch: Node, ancestry: Dependence) -> str:
    """Why `carry + branch` is a residual of `x` in all but the carry, where it is one."""
    if op_name(carry) == "mul":
        return _why_multiplied(carry, branch, ancestry)
    if has_trait(carry, Trait.MIXES) and len(shape_of(carry)) >= 3:
        return _why_mixed(carry, branch, ancestry)
    return ""


def _why_multiplied(carry: Node, branch: Node, ancestry: Dependence) -> str:
    for x, gate in (carry.args, carry.args[::-1]) if len(carry.args) == 2 else ():
        if not isinstance(x, Node) or not isinstance(gate, Node) or not is_floating(x):
            continue
        # A gate is computed from x by more than elementwise work, and so is the branch.
        if ancestry.is_branch(gate, x) and ancestry.is_branch(branch, x):
            return f"the stream is multiplied by {describe(gate)}, which depends on the stream: a gated carry"
    return ""


def _why_mixed(carry: Node, branch: Node, ancestry: Dependence) -> str:
    for x in carry.all_input_nodes:
        copies = is_floating(x) and len(shape_of(x)) >= 4 and shapes_agree(shape_of(x), shape_of(carry))
        if copies and x.op != "get_attr" and ancestry.is_branch(branch, x) and not ancestry.at_all(x, branch):
            return f"copies of the stream are mixed by {describe(carry)} before it is added to: hyper-connections"
    return ""


def _widened(graph: Graph, sums: FormalSums) -> list[tuple[Node, Refusal]]:
    """States that are padded or concatenated along their features and then extended as if they were one stream."""
    refusals = []
    depends = sums.dependence
    for node in graph.nodes:
        addition = match_addition(node)
        if addition is None:
            continue
        for carry, branch in ((addition.left, addition.right), (addition.right, addition.left)):
            if not has_trait(carry, Trait.WIDENS) or not carry.all_input_nodes:
                continue
            states = [n for n in carry.all_input_nodes if n in sums.states]
            wider = [s for s in states if not sizes_agree(*_widths(s, carry, sums))]
            for state in wider:
                root = sums.root[state]
                if state is not root and depends.is_branch(branch, root):
                    before, after = _widths(state, carry, sums)
                    why = f"the width of the stream changes from {before} to {after} at {describe(carry)}"
                    advice = "Put a projection with a norm between the two widths, so that they are two streams."
                    refusals.append((node, Refusal("width", describe(node), why, True, advice)))
                    break
    return refusals


def _widths(state: Node, carry: Node, sums: FormalSums) -> tuple[Any, Any]:
    """The sizes that two tensors have where the first has its features."""
    at = sums.features.trailing(state)
    return shape_of(state)[at], shape_of(carry)[at] if len(shape_of(carry)) >= -at else 0
