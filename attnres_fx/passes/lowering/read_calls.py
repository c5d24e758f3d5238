"""Depth-attention nodes as the fusion passes see them, whichever of the operators they call."""

import operator
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from attnres_fx.ops.epilogue import FUSED_FIELDS, Epilogue, NormKind
from attnres_fx.ops.fused import DEPTH_ATTENTION_FUSED
from attnres_fx.ops.general import DEPTH_ATTENTION_GENERAL, READ_OPERATORS
from attnres_fx.ops.kernels import described
from attnres_fx.ops.operator import DEPTH_ATTENTION
from attnres_fx.ops.phases import DEPTH_ATTENTION_BATCH, DEPTH_ATTENTION_MERGE
from attnres_fx.ops.read_style import ReadStyle
from attnres_fx.ops.threaded import DEPTH_ATTENTION_THREADED
from attnres_fx.passes.graph.nodes import fake_like, insert_call, set_value, tensor_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_side_effects, has_trait, op_name

#: Every operator that a graph which reads through depth attention may hold.
OPERATORS = frozenset(
    {
        *READ_OPERATORS,
        DEPTH_ATTENTION_FUSED,
        DEPTH_ATTENTION_BATCH,
        DEPTH_ATTENTION_MERGE,
        DEPTH_ATTENTION_THREADED,
    }
)
_NO_KERNEL = "aten, by the inner compiler (no kernel has this form of a read)"
_READS = (DEPTH_ATTENTION, DEPTH_ATTENTION_FUSED, DEPTH_ATTENTION_MERGE)


@dataclass(frozen=True)
class DepthReadCall:
    """One read.

    Args:
        node: The call.
        merge: Whether it is the second of two phases.
        head: What stands before the epilogue: `(sources, query, key_weight, eps, gain)`, or of a merge
            `(mixed, lse, partial, query, key_weight, eps, gain)`.
        epilogue: What the read does besides: an addition to its last source, a norm, a cast.
        style: Its bias, scale and normalised values.
    """

    node: Node
    merge: bool
    head: tuple[Any, ...]
    epilogue: Epilogue[Node]
    style: ReadStyle[Node]

    @property
    def sources(self) -> list[Node]:
        """What is mixed, the partial sum last; a phase-1 output stands for all that it mixes."""
        return [self.head[0], self.head[2]] if self.merge else list(self.head[0])

    @property
    def output(self) -> Node | None:
        """The node that holds the read, None where the first output is not taken exactly once."""
        if self.node.target is DEPTH_ATTENTION:
            return self.node
        firsts = [u for u in self.node.users if op_name(u) == "getitem" and u.args[1] == 0]
        return firsts[0] if len(firsts) == 1 else None

    @property
    def normed_or_cast(self) -> bool:
        """Whether a norm or a dtype of its own follows the read already."""
        return self.epilogue.norm != NormKind.NONE or self.epilogue.dtype is not None

    def with_last(self, last: Node, delta: Node) -> "DepthReadCall":
        """The read with `last + delta` in place of its last source."""
        epilogue = replace(self.epilogue, delta=delta)
        if self.merge:
            return replace(self, head=(*self.head[:2], last, *self.head[3:]), epilogue=epilogue)
        return replace(self, head=([*self.head[0][:-1], last], *self.head[1:]), epilogue=epilogue)

    @property
    def source_dtype(self) -> torch.dtype:
        """The dtype that its sources, the delta among them, promote to."""
        nodes = [*self.sources, *([self.epilogue.delta] if self.epilogue.delta is not None else [])]
        return reduce(torch.promote_types, (known_tensor(n).dtype for n in nodes))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the operators with an epilogue are called with."""
        return (*self.head, *self.epilogue.to_arguments(), *self.style.to_arguments())

    def values(self) -> list[torch.Tensor]:
        """What its outputs are like: the read, and the partial sum with a delta."""
        values = [fake_like(known_tensor(self.sources[0]), self.epilogue.dtype or self.source_dtype)]
        delta = self.epilogue.delta
        if delta is not None:
            last = known_tensor(self.sources[-1])
            values.append(fake_like(last, torch.promote_types(last.dtype, known_tensor(delta).dtype)))
        return values

    def insert(self) -> tuple[Node, Node | None]:
        """Put the fused call beside the node it replaces; returns its outputs, the partial sum None without delta."""
        graph, like, values = self.node.graph, self.node, self.values()
        target = DEPTH_ATTENTION_MERGE if self.merge else DEPTH_ATTENTION_FUSED
        with graph.inserting_before(like):
            outputs = insert_outputs(graph, target, self.arguments, like=like, values=values)
        return outputs[0], outputs[1] if len(outputs) > 1 else None


def insert_outputs(
    graph: Graph,
    target: Any,
    args: tuple[Any, ...],
    *,
    like: Node,
    values: Sequence[Any],
    taken: int | None = None,
) -> list[Node]:
    """Insert a call that returns a list, and a node for each of its outputs, or of the first `taken`."""
    call = insert_call(graph, target, args, like=like, value=None)
    set_value(call, list(values), like)
    return [insert_call(graph, operator.getitem, (call, i), like=like, value=v) for i, v in enumerate(values[:taken])]


def as_depth_read(node: Node) -> DepthReadCall | None:
    """A node as a read that the passes may lower; None for every other node, phase 1 and general reads among them."""
    if node.target not in _READS or node.op != "call_function" or node.kwargs:
        return None
    if node.target is DEPTH_ATTENTION:
        return DepthReadCall(node, False, tuple(node.args[:5]), Epilogue(), ReadStyle.from_arguments(*node.args[5:]))
    merge = node.target is DEPTH_ATTENTION_MERGE
    length = 7 if merge else 5
    end = length + FUSED_FIELDS
    if len(node.args) < end:
        return None
    epilogue: Epilogue[Node] = Epilogue.from_arguments(*node.args[length:end])
    return DepthReadCall(node, merge, tuple(node.args[:length]), epilogue, ReadStyle.from_arguments(*node.args[end:]))


def known_tensor(node: Node) -> torch.Tensor:
    """The tensor of a node that is known to have one."""
    value = tensor_of(node)
    assert value is not None
    return value


def kernels_of(gm: GraphModule) -> set[str]:
    """What the reads of a graph run on, in words."""
    calls = [c for n in gm.graph.nodes if (c := as_depth_read(n)) is not None and have_values(c.sources)]
    general = any(n.target is DEPTH_ATTENTION_GENERAL for n in gm.graph.nodes)
    return {described([known_tensor(s) for s in c.sources]) for c in calls} | {_NO_KERNEL for _ in range(general)}


def have_values(nodes: Sequence[Any]) -> bool:
    """Whether all are nodes whose tensors are known."""
    return all(isinstance(n, Node) and tensor_of(n) is not None for n in nodes)


def may_become_one(first: Node, last: Node, barriers: Iterable[Node], frozen: Container[Node]) -> bool:
    """Whether two calls may be one.

    Args:
        first, last: The calls, in graph order.
        barriers: The nodes that nothing is moved across: writes, switches of a mode.
        frozen: The nodes that run without gradients.

    Returns:
        Whether no barrier stands between them, and gradients are taken through both or through neither.
    """
    return not any(first < b < last for b in barriers) and (first in frozen) == (last in frozen)


def available(node: Node, place: Node) -> bool:
    """Whether a node stands before a place, or can be moved there."""
    if node < place or node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or has_side_effects(node) or tensor_of(node) is None:
        return False
    return has_trait(node, Trait.WEIGHT_STEP) and all(available(n, place) for n in node.all_input_nodes)


def move_before(node: Node, place: Node) -> None:
    """Move a node that is `available` at a place there, with what it needs."""
    if node < place:
        return
    for needed in node.all_input_nodes:
        move_before(needed, place)
    place.prepend(node)
