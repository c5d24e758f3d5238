"""Which nodes write into a storage, and which share one.

Values are storages, not nodes: a node may be a view of another, and an in-place operation changes both.
"""

import operator
from typing import Any

import torch
from torch.fx import Node

from attnres_fx.passes.graph_tools import tensor_of, value_of
from attnres_fx.passes.spelling import (
    CASTS,
    IDENTITIES,
    RESHAPES,
    TOKEN_MOVES,
    called_module,
    dropout_probability,
    is_dropout,
    op_name,
    trains,
)

_NO_MUTATION = frozenset("requires_grad_ retain_grad_ _set_grad_enabled share_memory_".split())
_COPIES = frozenset("clone roll flip index_select lift_fresh_copy".split())
_MAYBE_COPIES = frozenset("reshape flatten contiguous reshape_as".split())
_PIECES = frozenset("split chunk unbind tensor_split split_with_sizes".split())


def mutated_argument(node: Node) -> Node | None:
    """The tensor a node writes into, if it writes into one."""
    name = op_name(node)
    target: Any = None
    if node.target is operator.setitem or _is_inplace_module(node):
        target = node.args[0]
    elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        target = _written(node)
    elif node.op == "call_function" and node.kwargs.get("inplace") is True:
        target = node.args[0] if node.args else node.kwargs.get("input")
    elif name.endswith("_") and not name.endswith("__") and name not in _NO_MUTATION and node.args:
        target = node.args[0]
    return target if isinstance(target, Node) and tensor_of(target) is not None else None


def _is_inplace_module(node: Node) -> bool:
    return node.op == "call_module" and bool(getattr(called_module(node), "inplace", False))


def _written(node: Node) -> Any:
    schema = node.target._schema  # type: ignore[union-attr]
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
    return None


def aliased_argument(node: Node) -> Node | None:
    """The tensor whose storage a node's value shares, if it is a view of one (or may be)."""
    name = op_name(node)
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, Node):
        return None
    if name == "getitem" and not isinstance(value_of(first), torch.Tensor):
        return first if op_name(first) in _PIECES else None
    before = tensor_of(first)
    if before is None:
        return None
    if name in _PIECES:
        return first
    if is_dropout(node):
        return first if trains(node) is False or dropout_probability(node) == 0 else None
    if name in _COPIES:
        return None
    if name in _MAYBE_COPIES:
        return first if before.is_contiguous() else None
    if name in CASTS:
        after = tensor_of(node)
        return first if after is not None and after.dtype == before.dtype and after.device == before.device else None
    return first if name in RESHAPES | TOKEN_MOVES | IDENTITIES else None


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
