"""Which nodes write into a storage, and which share one.

Values are storages, not nodes: a node may be a view of another, and an in-place operation changes both.
"""

import operator
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from attnres_fx.passes.graph.nodes import computed_value, tensor_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import (
    asked_in_place,
    called_module,
    dropout_probability,
    has_trait,
    indexes_by_tensor,
    is_dropout,
    op_name,
    trains,
    views_by_attribute,
)


def mutated_arguments(node: Node) -> list[Node]:
    """The tensors whose storage a node writes into."""
    if has_trait(node, Trait.RESHAPE_IN_PLACE):
        return []
    found = _written(node)
    nodes = found if isinstance(found, list | tuple) else [found]
    return [n for n in nodes if isinstance(n, Node) and tensor_of(n) is not None]


def written_as_one(node: Node) -> bool:
    """Whether a node writes into one tensor that it is given as such, not into a list of them."""
    return isinstance(_written(node), Node)


def reshaped_in_place(node: Node) -> Node | None:
    """The tensor that a node gives another shape, in place and without touching its values."""
    target = _first(node) if has_trait(node, Trait.RESHAPE_IN_PLACE) else None
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
    if asked_in_place(node):
        return _first(node)
    in_place = name.endswith("_") and not name.endswith("__") and not has_trait(node, Trait.NO_WRITE)
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
    first = _first(node)
    return first if isinstance(first, Node) and _is_view_of(node, first) else None


def _is_view_of(node: Node, first: Node) -> bool:
    name, before = op_name(node), tensor_of(first)
    if before is None:  # one of several views
        return name == "getitem" and _is_view_by_schema(op_name(first), first)
    if name == "getitem":
        return not indexes_by_tensor(node.args[1])
    if name == "getattr":
        return views_by_attribute(node)
    if name == "identity":
        return True
    if is_dropout(node):
        return trains(node) is False or dropout_probability(node) == 0
    if has_trait(node, Trait.CAST):
        return _changes_nothing(node, before) and _shares(node, first, before)
    if has_trait(node, Trait.MAYBE_COPIES):
        return before.is_contiguous() or _shares(node, first, before)
    return _is_view_by_schema(name, node)


def _changes_nothing(cast: Node, before: torch.Tensor) -> bool:
    after = tensor_of(cast)
    same = after is not None and after.dtype == before.dtype and after.device == before.device
    return same and not cast.kwargs.get("copy")


def _shares(node: Node, first: Node, before: torch.Tensor) -> bool:
    """Whether a call shares its argument's storage, by calling it on values without data."""
    result = computed_value(node.op, node.target, node.args, node.kwargs) if node.op != "call_module" else None
    if not isinstance(result, torch.Tensor):
        return False
    try:
        return bool(result.untyped_storage()._cdata == before.untyped_storage()._cdata)
    except NotImplementedError:  # a value inside vmap shows none: what may share counts as sharing
        return True


def _is_view_by_schema(name: str, node: Node) -> bool:
    if has_trait(node, Trait.VIEW):
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
