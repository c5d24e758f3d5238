"""Which nodes write into a storage, and which share one.

Values are storages, not nodes: a node may be a view of another, and an in-place operation changes both.
"""

import operator
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from attnres_fx.passes.graph.nodes import computed_value, tensor_of
from attnres_fx.passes.graph.operations import (
    CASTS,
    called_module,
    dropout_probability,
    indexes_by_tensor,
    is_dropout,
    op_name,
    trains,
)

_NO_MUTATION = frozenset(["requires_grad_", "retain_grad_", "_set_grad_enabled", "share_memory_"])
#: In-place operations that change how a tensor looks at its storage, and nothing in it.
_RESHAPE_IN_PLACE = frozenset(["unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "swapdims_", "t_"])
#: Views where the strides allow one, copies where they do not.
_MAYBE_COPIES = frozenset(["reshape", "flatten", "contiguous", "reshape_as", "ravel"])
#: Views in fact, although their schemas call them copies.
_UNSAFE = frozenset(["unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes"])
_ATTRIBUTE_VIEWS = frozenset(["T", "mT", "H", "mH", "real", "imag", "data"])


def mutated_arguments(node: Node) -> list[Node]:
    """The tensors whose storage a node writes into."""
    if op_name(node) in _RESHAPE_IN_PLACE:
        return []
    found = _written(node)
    nodes = found if isinstance(found, list | tuple) else [found]
    return [n for n in nodes if isinstance(n, Node) and tensor_of(n) is not None]


def written_as_one(node: Node) -> bool:
    """Whether a node writes into one tensor that it is given as such, not into a list of them."""
    return isinstance(_written(node), Node)


def reshaped_in_place(node: Node) -> Node | None:
    """The tensor that a node gives another shape, in place and without touching its values."""
    target = _first(node) if op_name(node) in _RESHAPE_IN_PLACE else None
    return target if isinstance(target, Node) else None


def _first(node: Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def _written(node: Node) -> Any:
    name = op_name(node)
    if node.target is operator.setitem or _is_inplace_module(node):
        return node.args[0]
    if isinstance(node.target, torch._ops.OpOverload):
        return _written_by_schema(node) if node.target._schema.is_mutable else None
    if node.op == "call_function" and node.kwargs.get("out") is not None:
        return node.kwargs["out"]
    if node.op == "call_function" and node.kwargs.get("inplace") is True:
        return _first(node)
    in_place = name.endswith("_") and not name.endswith("__") and name not in _NO_MUTATION
    return _first(node) if in_place else None


def _is_inplace_module(node: Node) -> bool:
    return node.op == "call_module" and bool(getattr(called_module(node), "inplace", False))


def _written_by_schema(node: Node) -> Any:
    schema = node.target._schema  # type: ignore[union-attr]
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
    return None


def aliased_argument(node: Node) -> Node | None:
    """The tensor whose storage a node's value shares, if it is a view of one (or may be)."""
    name, first = op_name(node), _first(node)
    if not isinstance(first, Node):
        return None
    before, after = tensor_of(first), tensor_of(node)
    if before is None:  # one of several views
        return first if name == "getitem" and _is_view_by_schema(op_name(first), first) else None
    if name == "getitem":
        return None if indexes_by_tensor(node.args[1]) else first
    if name == "getattr":
        return first if node.args[1] in _ATTRIBUTE_VIEWS else None
    if name == "identity":
        return first
    if is_dropout(node):
        return first if trains(node) is False or dropout_probability(node) == 0 else None
    if name in CASTS:
        kept = after is not None and after.dtype == before.dtype and after.device == before.device
        return first if kept and not node.kwargs.get("copy") and _shares(node, first, before) else None
    if name in _MAYBE_COPIES:
        return first if before.is_contiguous() or _shares(node, first, before) else None
    return first if _is_view_by_schema(name, node) else None


def _shares(node: Node, first: Node, before: torch.Tensor) -> bool:
    """Whether a call shares its argument's storage, by calling it on values without data."""
    result = computed_value(node.op, node.target, node.args, node.kwargs) if node.op != "call_module" else None
    if not isinstance(result, torch.Tensor):
        return False
    return bool(result.untyped_storage()._cdata == before.untyped_storage()._cdata)


def _is_view_by_schema(name: str, node: Node) -> bool:
    if name in _UNSAFE:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return _returns_alias(node.target._schema)
    return _is_view(name)


@cache
def _is_view(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if "::" not in name else None
    return packet is not None and any(_returns_alias(getattr(packet, o)._schema) for o in packet.overloads())


def _returns_alias(schema: Any) -> bool:
    first = schema.arguments[0].alias_info if schema.arguments else None
    returned = schema.returns[0].alias_info if schema.returns else None
    return first is not None and not first.is_write and returned is not None


def returns_what_it_writes(node: Node) -> bool:
    """Whether the value of a node that writes is the tensor written to, as in-place methods have it."""
    if node.target is operator.setitem:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        returns = node.target._schema.returns
        return len(returns) == 1 and returns[0].alias_info is not None
    return True


def storage_of(node: Node) -> list[Node]:
    """A node and what it is a view of, down to the node that owns the storage."""
    chain = [node]
    while (below := aliased_argument(chain[-1])) is not None:
        chain.append(below)
    return chain
