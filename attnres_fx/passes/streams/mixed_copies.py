"""Hyper-connections: copies of a stream that are mixed before they are added to."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from attnres_fx.passes.graph.additions import Addition, match_addition
from attnres_fx.passes.graph.nodes import describe
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import asks_only_metadata, has_trait, moves_data, op_name
from attnres_fx.passes.streams.contractions import contracted_tensors
from attnres_fx.passes.streams.dependence import Dependence
from attnres_fx.passes.streams.formal_sum import Extended, FormalSums, Mapped, Merged


@dataclass(frozen=True)
class _Mixed:
    """An addition to what `mix` makes of the copies in `copies`, or to a part of it; `carried` are its own nodes."""

    addition: Node
    carried: frozenset[Node]
    mix: Node
    copies: Node
    branch: Node


def find_mixed_copies(nodes: tuple[Node, ...], sums: FormalSums) -> Iterator[tuple[Node, str]]:
    """The additions to mixed copies of a stream, each with the reason why that is no sum.

    A product makes the copies anew out of all of them, the branch takes them in by another way than what is carried
    on, and nothing else carries the copies on. Independent copies are added to as they are.

    Args:
        nodes: Of the graph, in its order.
        sums: Its states.
    """
    additions = {n: a for n in nodes if (a := match_addition(n)) is not None}
    found = [mixed for n, a in additions.items() for mixed in _candidates(n, a)]
    if found:
        extended = {_path(p)[0][-1] for n, s in sums.states.items() if isinstance(s, Extended) for p in sums.parents(n)}
        ancestry = Dependence(nodes[0].graph, {m.copies for m in found})
        for mixed in found:
            if mixed.copies not in extended and _reads_otherwise(mixed, ancestry):
                yield (
                    mixed.addition,
                    f"copies of the stream are mixed by {describe(mixed.mix)} before it is added to: hyper-connections",
                )
    yield from _lanes_mixed(sums)


def _candidates(node: Node, addition: Addition) -> Iterator[_Mixed]:
    for carry, branch in ((addition.left, addition.right), (addition.right, addition.left)):
        path, _ = _path(carry)
        cut = max((i for i, n in enumerate(path) if _cuts(n)), default=len(path) - 1)  # below, the branch has its part
        for value in contracted_tensors(path[-1]):
            below, copied = _path(value)
            if copied or match_addition(below[-1]) is not None:
                yield _Mixed(node, frozenset(path[: cut + 1]), path[-1], below[-1], branch)


def origin_of(node: Node) -> Node:
    """The tensor that a node moves, casts, repeats or is cut out of."""
    return _path(node)[0][-1]


def _path(node: Node) -> tuple[list[Node], bool]:
    """A node, what it moves, and so on down to what is no movement of data; and whether copies were made on the way."""
    path, copied = [node], False
    while (below := _below(path[-1])) is not None:
        copied = copied or has_trait(path[-1], Trait.REPEATS)
        path.append(below)
    return path, copied


def _cuts(node: Node) -> bool:
    """Whether a node holds a part of what it moves."""
    return op_name(node) in ("select", "narrow", "slice", "getitem")


def _below(node: Node) -> Node | None:
    """What a node moves, casts, repeats or cuts out of a list of parts."""
    if op_name(node) == "getitem" and isinstance(node.args[0], Node) and has_trait(node.args[0], Trait.SPLITS):
        node = node.args[0]
    elif op_name(node) == "stack" and len(node.all_input_nodes) == 1:
        return node.all_input_nodes[0]
    elif not (moves_data(node) or has_trait(node, Trait.REPEATS)):
        return None
    source = node.args[0] if node.args else None
    return source if isinstance(source, Node) else None


def _reads_otherwise(mixed: _Mixed, ancestry: Dependence) -> bool:
    """Whether the branch takes the copies in by another way than what is carried on."""
    if not ancestry.is_branch(mixed.branch, mixed.copies):
        return False
    seen, stack = set(mixed.carried), [mixed.branch]
    while stack:
        node = stack.pop()
        if node is mixed.copies:
            return True
        if node not in seen and ancestry.at_all(node, mixed.copies):
            seen.add(node)
            stack += [n for n in node.all_input_nodes if not asks_only_metadata(node, n)]
    return False


def _lanes_mixed(sums: FormalSums) -> Iterator[tuple[Node, str]]:
    """Sums of the same two states side by side, both carried on: copies in a list, mixed with fixed weights."""
    extended = {s.state for s in sums.states.values() if isinstance(s, Extended)}
    pairs: dict[frozenset[Node], list[Node]] = {}
    for node in {_unscaled(sums, s) for s in extended}:
        state = sums.states[node]
        if isinstance(state, Merged):
            lanes = sorted(_lanes(sums, node))
            for i, left in enumerate(lanes):
                for right in lanes[i + 1 :]:
                    pairs.setdefault(frozenset((left, right)), []).append(node)
    for merged in pairs.values():
        first, *others = sorted(merged)
        if any(not sums.dependence.at_all(other, first) for other in others):
            yield first, _reason(f"in {describe(first)}")
            return


def _reason(where: str) -> str:
    return f"copies of the stream are mixed {where} before it is added to: hyper-connections"


def _lanes(sums: FormalSums, node: Node) -> set[Node]:
    """The states that a merged state is the weighted sum of."""
    node = _unscaled(sums, node)
    state = sums.states[node]
    return _lanes(sums, state.left) | _lanes(sums, state.right) if isinstance(state, Merged) else {node}


def _unscaled(sums: FormalSums, node: Node) -> Node:
    while isinstance(state := sums.states[node], Mapped):
        node = state.state
    return node
