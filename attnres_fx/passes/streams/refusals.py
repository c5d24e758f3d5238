"""Streams that are carried by something other than addition: named, never guessed at."""

from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Graph, Node

from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.nodes import describe, shape_of, sizes_agree
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, is_light
from attnres_fx.passes.streams.depth_readers import find_depth_readers
from attnres_fx.passes.streams.formal_sum import FormalSums
from attnres_fx.passes.streams.gated_carries import find_gated_carries
from attnres_fx.passes.streams.mixed_copies import find_mixed_copies
from attnres_fx.passes.streams.recurrences import Slices


@dataclass(frozen=True)
class Refusal:
    """Something that looks like a residual stream and was left alone.

    Args:
        kind: `"not additive"`, `"width"`, `"injected"` (added into another stream's sublayers), `"interrupted"`
            (one stream ends where another begins), `"recurrence"` (a sum over time, not over depth), `"depth"` (the
            model reads its depth already), or `"hidden"` in a region that cannot be inlined.
        place: The node, its module path and source line.
        reason: Why it was refused.
        stops_conversion: Whether a model that has it must not be converted, because the result would be wrong.
        advice: What to do instead.
    """

    kind: Literal["not additive", "width", "injected", "interrupted", "recurrence", "depth", "hidden"]
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
    found = [*find_mixed_copies(sums.nodes, sums), *find_gated_carries(sums.nodes, sums)]
    reasons: dict[Node, str] = {}
    for node, reason in found:
        reasons.setdefault(node, reason)
    refusals = [(n, Refusal("not additive", describe(n), r, True, _ADVICE)) for n, r in sorted(reasons.items())]
    return _without_steps_of_time(refusals, sums) + _widened(graph, sums)


def _without_steps_of_time(refused: list[tuple[Node, Refusal]], sums: FormalSums) -> list[tuple[Node, Refusal]]:
    """Carries without the cells of a recurrence; of those the first one of each sequence, and what it is."""
    slices = Slices(sums.nodes, sums.features)
    steps: dict[Node, Node] = {}
    for cells in carried_on([node for node, _ in refused]):
        if len(cells) > 1:
            steps |= slices.over_time({n: n.all_input_nodes for n in cells}, cells)
    kept, seen = [], set()
    for node, refusal in refused:
        sequence = steps.get(node)
        if sequence is None:
            kept.append((node, refusal))
        elif sequence not in seen:
            seen.add(sequence)
            kept.append((node, refuse_recurrence(node, sequence)))
    return kept


def carried_on(carries: list[Node]) -> list[list[Node]]:
    """Carries in graph order, those together of which one goes on from another by no more than elementwise work."""
    group: dict[Node, list[Node]] = {}
    for node in carries:
        group[node] = [node]
        seen, stack = {node}, [node]
        while stack:
            current = stack.pop()
            for below in (n for n in current.all_input_nodes if n not in seen and is_light(n)):
                seen.add(below)
                if below not in group:
                    stack.append(below)
                elif group[below] is not group[node]:
                    group[below] += group[node]
                    group |= dict.fromkeys(group[node], group[below])
    return list({id(cells): cells for cells in group.values()}.values())


def refuse_depth_readers(nodes: tuple[Node, ...]) -> list[Refusal]:
    """The refusal of a model that reads its depth already."""
    readers = find_depth_readers(nodes)
    if not readers:
        return []
    why = f"the model reads its depth already, here and at {len(readers) - 1} more places"
    advice = "Use it as it is, convert a model with plain residuals, or name a stream to convert beside that."
    return [Refusal("depth", describe(readers[0]), why, True, advice)]


def refuse_recurrence(root: Node, sequence: Node) -> Refusal:
    """The refusal of a sum over time."""
    why = f"each step of the sum takes its slice of {describe(sequence)}: a recurrence over time, and no depth"
    return Refusal("recurrence", describe(root), why)


_ADVICE = (
    "Hyper-connections and gated carries cannot be converted: name the model's other streams in the config, or use the "
    "model as it is."
)


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
