"""The states of a graph as formal sums: plain data, read off the graph by `find_formal_sums`.

A state is the root of a stream, a state extended by one more addend, two states of one stream merged, or a state
mapped row by row. States form a graph of their own; their terms are found by walking it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch.fx import Node

from attnres_fx.passes.normalize.dead_code import Live
from attnres_fx.passes.streams.dependence import Dependence
from attnres_fx.passes.streams.feature_dimensions import FeatureDimensions


@dataclass(frozen=True)
class Root:
    """The first term of a stream."""

    node: Node


@dataclass(frozen=True)
class Extended:
    """`state_scale * state + addend_scale * addend`, where the addend is a term of its own."""

    node: Node
    state: Node
    state_scale: float
    addend: Node
    addend_scale: float


@dataclass(frozen=True)
class Merged:
    """Two states of one stream added: coefficients of common terms add up."""

    node: Node
    left: Node
    left_scale: float
    right: Node
    right_scale: float


@dataclass(frozen=True)
class Mapped:
    """A state seen through one row map."""

    node: Node
    state: Node
    kind: str


State = Root | Extended | Merged | Mapped


@dataclass
class FormalSums:
    """The states of a graph.

    Args:
        nodes: Every node of the graph as it was analysed, in its order.
        dependence: Which nodes depend on the operands of additions, and how.
        features: Which dimension of each node holds its features.
        live: The nodes whose values get out of the graph; others see the plain sums and read nothing.
        states: What each state is, by its node.
        root: Which stream a state belongs to, by the nodes of both: the state's and the stream's root.
    """

    nodes: tuple[Node, ...]
    dependence: Dependence
    live: Live
    features: FeatureDimensions
    states: dict[Node, State] = field(default_factory=dict)
    root: dict[Node, Node] = field(default_factory=dict)

    def of_stream(self, root: Node) -> Iterator[Node]:
        """State nodes of one stream in graph order."""
        return (n for n, r in self.root.items() if r is root)

    def parents(self, node: Node) -> tuple[Node, ...]:
        """The states a state is made of."""
        match self.states[node]:
            case Root():
                return ()
            case Extended(state=state) | Mapped(state=state):
                return (state,)
            case Merged(left=left, right=right):
                return (left, right)

    def carried_on(self, extended: Iterable[Node]) -> set[Node]:
        """These states and all that they are made of: what more is added to, whatever is done to it before that."""
        stack, found = list(extended), set[Node]()
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(self.parents(node))
        return found

    def addend(self, term: Node) -> Node | None:
        """What a term's addition adds to the stream; None for a root."""
        state = self.states[term]
        return state.addend if isinstance(state, Extended) else None

    def row_map_path(self, node: Node) -> list[Node]:
        """The state that a node shows, and the row maps from it to the node; a factor begins a state of its own."""
        path = [node]
        while isinstance(step := self.states[path[-1]], Mapped) and step.kind != "factor":
            path.append(step.state)
        return path[::-1]

    def terms(self, node: Node) -> tuple[Node, ...]:
        """Extended nodes (and the root) whose addends make up a state, in the order they were added."""
        seen: dict[Node, None] = {}
        stack = [node]
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen[current] = None
            stack.extend(self.parents(current))
        kept = (n for n in seen if isinstance(self.states[n], Root | Extended))
        return tuple(sorted(kept))


__all__ = ["Extended", "FormalSums", "Mapped", "Merged", "Root", "State"]
