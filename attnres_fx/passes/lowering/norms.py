"""Recognise the norm that a value goes into, in every spelling, by structure.

rms_norm(x), layer_norm(x)                                     library functions, aten and modules
x.float() * rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)     written out, then
.to(dtype), weight * _, (1 + weight) * _                       in any order, each at most where it stands
"""

from typing import Any

import torch
from torch.fx import Node

from attnres_fx.ops.epilogue import NormKind
from attnres_fx.passes.graph.nodes import shape_of, tensor_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, op_name
from attnres_fx.passes.lowering.library_norms import match_library_norm
from attnres_fx.passes.lowering.norm_match import NormMatch, is_row_vector, only_user, value_users
from attnres_fx.passes.lowering.written_norms import match_written_norm


def match_norm(value: Node, arithmetic: torch.dtype) -> NormMatch | None:
    """The one norm that a value goes into.

    Args:
        value: A node whose tensor is known.
        arithmetic: The dtype that the norm must compute in.

    Returns:
        The norm, with what belongs to it; None where anything else sees the value, or where it is no norm of this kind.
    """
    casts = _casts(value)
    users = {u for c in casts for u in value_users(c)} - casts
    found = match_library_norm(casts, users, arithmetic) or match_written_norm(casts, users, arithmetic)
    return found and _with_tail(found)


def _casts(value: Node) -> frozenset[Node]:
    """A value and its casts to other floating dtypes."""
    found, waiting = {value}, [value]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user not in found and _is_cast(user, node):
                found.add(user)
                waiting.append(user)
    return frozenset(found)


def _is_cast(user: Node, node: Node) -> bool:
    before, after = tensor_of(node), tensor_of(user)
    if before is None or after is None or not after.is_floating_point() or after.device != before.device:
        return False
    return has_trait(user, Trait.CAST | Trait.PASSES_ON) and bool(user.args) and user.args[0] is node


def _with_tail(match: NormMatch) -> NormMatch:
    """A norm with the casts and the multiplication by a weight that follow it, as far as they belong to it."""
    out, weight, nodes = match.out, match.weight, set(match.nodes)
    weighted = weight is not None or match.bias is not None or match.kind == NormKind.LAYER
    width = shape_of(out)[-1]
    while (user := only_user(out)) is not None:
        if _is_cast(user, out):
            out = user
        elif not weighted and (other := _weight_of(user, out, width)) is not None:
            out, weight, weighted = user, other, True
        else:
            break
        nodes.add(out)
    return NormMatch(match.kind, weight, match.bias, match.eps, out, frozenset(nodes))


def _weight_of(node: Node, value: Node, width: Any) -> Node | None:
    if op_name(node) != "mul" or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    other = right if left is value else left
    return other if isinstance(other, Node) and is_row_vector(other, width) else None
