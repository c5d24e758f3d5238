"""What happens to a source between the node that writes it and the read: row maps, factors, shapes, gradients."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import copy_call, fake_like, same_shape, shape_of, shapes_agree, tensor_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait


@dataclass(frozen=True)
class Replay:
    """Do to an entry what a row map of the graph does to the state."""

    node: Node
    state: Node
    kind: str


@dataclass(frozen=True)
class Scale:
    factor: float


@dataclass(frozen=True)
class SpreadLike:
    """Expand an entry to the shape of a node."""

    node: Node


@dataclass(frozen=True)
class Detach:
    """Let no gradient through: the state was computed where gradients are off."""


@dataclass(frozen=True)
class RowsLast:
    """Put the features of an entry, which are in another dimension, in the last one, as the operator wants them."""

    dimension: int
    #: The node in whose dialect it is written; the same turn for every read.
    site: Node = field(compare=False)


Step = Replay | Scale | SpreadLike | Detach | RowsLast


def simplified(base: Node, steps: tuple[Step, ...]) -> list[Step]:
    """Steps from a node, without those that change nothing and without views that are undone by later ones."""
    value = tensor_of(base)
    assert value is not None
    path = _Path([tuple(value.shape)], value.dtype)
    for step in steps:
        if isinstance(step, Replay):
            path.replay(step)
        elif isinstance(step, SpreadLike):
            path.append(step, shape_of(step.node))
        elif not isinstance(step, Detach) or step not in path.steps:
            path.append(step, path.shapes[-1])
    return path.steps


@dataclass
class _Path:
    """Steps that change something, the shape before and after each, and the dtype after the last."""

    shapes: list[tuple[Any, ...]]
    dtype: torch.dtype
    steps: list[Step] = field(default_factory=list)

    def append(self, step: Step, shape: tuple[Any, ...]) -> None:
        self.steps.append(step)
        self.shapes.append(shape)

    def replay(self, step: Replay) -> None:
        mapped = tensor_of(step.node)
        assert mapped is not None
        shape = tuple(mapped.shape)
        if self._changes_nothing(step, mapped):
            return
        if step.kind == "reshape" and (back := self._earlier(shape)) is not None:
            del self.steps[back:], self.shapes[back + 1 :]
            return
        if step.kind == "cast":
            self.dtype = mapped.dtype
        self.append(step, shape)

    def _changes_nothing(self, step: Replay, mapped: torch.Tensor) -> bool:
        if step.kind == "identity" or (step.kind == "cast" and mapped.dtype == self.dtype):
            return True
        unmoved = step.kind == "reshape" or has_trait(step.node, Trait.SAME_AT_SAME_SHAPE)
        return unmoved and shapes_agree(tuple(mapped.shape), self.shapes[-1])

    def _earlier(self, shape: tuple[Any, ...]) -> int | None:
        """How far back a run of reshapes goes to a point that had this shape already."""
        for i in range(len(self.steps) - 1, -1, -1):
            step = self.steps[i]
            if not (isinstance(step, Replay) and step.kind == "reshape"):
                return None
            if shapes_agree(self.shapes[i], shape):
                return i
        return None


def insert_step(graph: Graph, step: Step, node: Node) -> Node:
    """The nodes that a step puts behind a node, at the graph's insertion point."""
    value = tensor_of(node)
    assert value is not None
    if isinstance(step, Detach):
        return emit(graph, "detach", (node,), like=node, value=value)
    if isinstance(step, Scale):
        return emit(graph, "mul", (node, step.factor), like=node, value=value)
    if isinstance(step, SpreadLike):
        if same_shape(node, step.node):
            return node
        spread = value.expand(shape_of(step.node))
        return emit(graph, "expand_as", (node, step.node), like=node, value=spread, dialect=step.node)
    if isinstance(step, RowsLast):
        return turn_rows(graph, node, step.dimension, -1, like=step.site)
    mapped, before = tensor_of(step.node), tensor_of(step.state)
    assert mapped is not None and before is not None
    if step.kind == "factor" and torch.promote_types(value.dtype, before.dtype) != value.dtype:
        # Multiplied as the state is: an output in half precision is not multiplied in half precision.
        value = fake_like(value, before.dtype)
        node = emit(graph, "to", (node, before.dtype), like=node, value=value)
    changes_dtype = step.kind == "cast" or before.dtype != mapped.dtype
    dtype = mapped.dtype if changes_dtype else value.dtype
    return copy_call(step.node, {step.state: node}, value=fake_like(mapped, dtype))


def turn_rows(graph: Graph, node: Node, dimension: int, to: int, *, like: Node) -> Node:
    """A node with one of its dimensions elsewhere, at the graph's insertion point.

    The result is contiguous: what a view or a kernel takes after it must be, and a source is copied once for all reads.

    Args:
        graph: The graph to write into.
        node: What is turned.
        dimension: The dimension that goes.
        to: The place it has then; the others keep their order.
        like: The node in whose dialect to write, and whose place in the source is noted.
    """
    value = tensor_of(node)
    assert value is not None
    order = list(range(value.dim()))
    order.insert(to % value.dim(), order.pop(dimension))
    turned = emit(graph, "permute", (node, order), like=like, value=value.permute(order))
    return emit(graph, "contiguous", (turned,), like=like, value=value.permute(order).contiguous())
