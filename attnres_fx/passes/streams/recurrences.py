"""Sums over time: each step takes in its own slice of one sequence, and computes what the other steps compute.

Such a sum looks like a residual stream, and its steps like sublayers, but how many it has follows the length of the
sequence. Layers that take a slice each, of what is computed for all of them at once, have weights of their own; a
model called again on its own output takes no slices.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

from torch.fx import Node

from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.kept_dimensions import kept_dimensions
from attnres_fx.passes.graph.nodes import argument_of, is_floating, shape_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import asks_only_metadata, called_module, has_trait, moves_data, op_name
from attnres_fx.passes.streams.data import find_data, is_weight
from attnres_fx.passes.streams.feature_dimensions import FeatureDimensions


@dataclass(frozen=True)
class _Slice:
    """A part of a sequence: the tensor it is cut from, where, and whether along its features alone."""

    sequence: Node
    place: tuple[Any, ...]
    of_features: bool


class Slices:
    """The slices of a graph's sequences, found once.

    Args:
        nodes: The nodes of a graph, in its order.
        features: Which dimension of each holds its features.
    """

    def __init__(self, nodes: Iterable[Node], features: FeatureDimensions) -> None:
        self._nodes = tuple(nodes)
        data = find_data(self._nodes)
        places: dict[Node, set[tuple[Any, ...]]] = defaultdict(set)
        self._slice: dict[Node, _Slice] = {}
        for node in self._nodes:
            found = _slice_of(node, features)
            if found is not None and found.sequence in data:
                self._slice[node] = found
                places[found.sequence].add(found.place)
        self._sequences = {n for n, found in places.items() if len(found) > 1}

    def over_time(
        self, steps: Mapping[Node, Collection[Node]], states: Collection[Node], sequence: Node | None = None
    ) -> dict[Node, Node]:
        """The steps of sums over time.

        Args:
            steps: The additions that may be steps, each with what it adds.
            states: The sums, which a step computes with; they are not looked into.
            sequence: A value that the steps may take slices of, and that is not looked into either.

        Returns:
            By step, a sequence that it takes a slice of, where another step takes another slice and all of them
            compute with the same weights.
        """
        if not self._sequences:
            return {}
        bits = _Bits()
        reached = self._reached(set(states), bits, sequence)
        taken: dict[Node, dict[Node, int]] = defaultdict(dict)
        weights: dict[Node, int] = {}
        for step, values in steps.items():
            seen = reduce(or_, (reached.get(v, 0) for v in values), 0)
            weights[step] = seen & bits.of_weights
            for source, mask in bits.of_sequence.items():
                if seen & mask:
                    taken[source][step] = seen & mask
        found: dict[Node, Node] = {}
        for source, by_step in taken.items():
            of_weights = {weights[s] for s in by_step}
            same = len(by_step) > 1 and len(set(by_step.values())) == 1
            # What modulates each call of one module is cut along its features. A step without weights needs no other.
            over_features = source in bits.of_features and (of_weights != {0} or len(by_step) == 1)
            if len(of_weights) == 1 and not same and not over_features and (len(by_step) > 1 or of_weights == {0}):
                found |= dict.fromkeys(by_step, source)
        return found

    def _reached(self, states: set[Node], bits: "_Bits", sequence: Node | None) -> dict[Node, int]:
        """The slices and the weights that each node is computed from, without what its sums were computed from."""
        reached: dict[Node, int] = {}
        of_state: set[Node] = set()
        for node in self._nodes:
            inputs = _inputs(node)
            begins = of_state.isdisjoint(inputs)
            if node in states or not begins:
                of_state.add(node)
            part = self._slice.get(node)
            if node is sequence or (node in states and (begins or match_addition(node) is not None)):
                reached[node] = 0
            elif node in states:  # a slice that scales it belongs to the step that takes it in
                reached[node] = reduce(or_, (reached[n] for n in inputs if n not in of_state), 0) & ~bits.of_weights
            elif part is not None and part.sequence in self._sequences and part.sequence not in of_state:
                within = reached[part.sequence]
                reached[node] = within if bits.are_of_one_step(within) else bits.of_slice(part)
            else:
                reached[node] = reduce(or_, (reached[n] for n in inputs), bits.of_weight(_weight_of(node)))
        return reached


@dataclass
class _Bits:
    """A bit for each weight and each slice."""

    of_weights: int = 0
    of_sequence: dict[Node, int] = field(default_factory=dict)
    of_features: set[Node] = field(default_factory=set)
    _known: dict[Any, int] = field(default_factory=dict)

    def of_weight(self, weight: str) -> int:
        if not weight:
            return 0
        bit = self._known.setdefault(weight, 1 << len(self._known))
        self.of_weights |= bit
        return bit

    def are_of_one_step(self, seen: int) -> bool:
        """Whether what was computed from these took in one slice: cut further, it is no other sequence."""
        taken = [(seen & mask).bit_count() for mask in self.of_sequence.values()]
        return any(taken) and max(taken) == 1

    def of_slice(self, part: _Slice) -> int:
        bit = self._known.setdefault((part.sequence, part.place), 1 << len(self._known))
        if part.sequence not in self.of_sequence and part.of_features:
            self.of_features.add(part.sequence)
        elif not part.of_features:
            self.of_features.discard(part.sequence)
        self.of_sequence[part.sequence] = self.of_sequence.get(part.sequence, 0) | bit
        return bit


def _inputs(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if not asks_only_metadata(node, n)]


def _weight_of(node: Node) -> str:
    """What a node computes with: a parameter, or a module that has some."""
    module = called_module(node) if node.op == "call_module" else None
    return (
        str(node.target)
        if is_weight(node) or (module is not None and next(module.parameters(), None) is not None)
        else ""
    )


def _slice_of(node: Node, features: FeatureDimensions) -> _Slice | None:
    """A node as a slice, seen through what only moves rows; None where it is all of a tensor."""
    place: list[Any] = []
    along: list[int | None] = []  # the dimension of each cut, where the walk has come to
    while (step := _step_below(node)) is not None:
        below, cut, dimension = step
        along = [_dimension_below(node, below, d, dimension) for d in along]
        node = below
        if cut is not None:
            place.append(cut)
            along.append(None if dimension is None else dimension % max(len(shape_of(node)), 1))
    if not place:
        return None
    holds = is_floating(node) and node.op != "placeholder"
    at = features.dimension(node) % max(len(shape_of(node)), 1) if holds else None
    return _Slice(node, tuple(place), holds and all(d == at for d in along))


def _dimension_below(node: Node, source: Node, dimension: int | None, cut: int | None) -> int | None:
    """Where a dimension of what a movement makes is in what it moves; a cut leaves the one that it cuts in its place.

    None where it is joined with another, or split.
    """
    if dimension is None:
        return None
    kept = next((before for n, before, after in kept_dimensions(node) if n is source and after == dimension), None)
    rank = len(shape_of(node))
    is_cut = cut is not None and rank == len(shape_of(source)) and cut % rank == dimension
    return dimension if kept is None and is_cut else kept


def _step_below(node: Node) -> tuple[Node, Any, int | None] | None:
    """What a movement of data moves, where it cuts, if it does, and the dimension it cuts along, if that is one."""
    name = op_name(node)
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, Node):
        return None
    if name == "getitem" and has_trait(source, Trait.SPLITS):
        whole = source.args[0]
        position = 1 if op_name(source) == "unbind" else 2
        return (whole, ("part", node.args[1]), _dimension(source, position)) if isinstance(whole, Node) else None
    if name == "index" and isinstance(node.args[1], list | tuple):
        return source, *_picked(name, tuple(node.args[1]))
    if not moves_data(node):
        return None
    if name in ("select", "narrow", "slice", "index_select"):
        cut = tuple(node.args[1:]) + tuple(v for k, v in sorted(node.kwargs.items()) if k != "input")
        return source, (name, cut), _dimension(node, 1)
    if name == "getitem":
        return source, *_picked(name, node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],))
    return source, None, None


def _picked(name: str, index: tuple[Any, ...]) -> tuple[Any, int | None]:
    """Where an index cuts, if it does, and the dimension it cuts along, if that is one."""
    cuts = [i for i, part in enumerate(index) if not _takes_all(part)]
    if not cuts:
        return None, None
    dimension = cuts[0] - len(index) if any(part is Ellipsis for part in index[: cuts[0]]) else cuts[0]
    return (name, tuple(map(str, index))), dimension if len(cuts) == 1 else None  # slices have no hash


def _takes_all(part: Any) -> bool:
    return part is None or part is Ellipsis or (isinstance(part, slice) and part == slice(None))


def _dimension(node: Node, position: int) -> int | None:
    value = argument_of(node, position, "dim")
    return value if isinstance(value, int) else 0 if value is None else None
