"""Norms that the library has a function or a module for, in every dialect."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from attnres_fx.ops.epilogue import NormKind
from attnres_fx.passes.graph.nodes import shape_of, sizes_agree, tensor_of
from attnres_fx.passes.graph.operations import called_module, hooked, op_name
from attnres_fx.passes.lowering.norm_match import NormMatch, Number, dtype_of, is_row_vector, number_of

_KINDS = {"rms_norm": NormKind.RMS, "layer_norm": NormKind.LAYER}


@dataclass(frozen=True)
class _NormCall:
    """What a norm is called with. eps: as it was given, None for PyTorch's default."""

    value: Node
    sizes: tuple[Any, ...]
    weight: Node | str | None
    bias: Node | str | None
    eps: Any


def match_library_norm(casts: frozenset[Node], users: set[Node], arithmetic: torch.dtype) -> NormMatch | None:
    """A call of a norm as the only user of a value.

    Args:
        casts: The value, and its casts to other dtypes.
        users: Whatever else looks at them.
        arithmetic: The dtype that the norm must compute in.

    Returns:
        The norm; None where the user is no norm, or a norm over more or less than the last dimension.
    """
    if len(users) != 1:
        return None
    (norm,) = users
    call = _of_module(norm) if norm.op == "call_module" else _of_function(norm)
    if call is None or call.value not in casts or _computes_in(call.value) != arithmetic or not _is_over_rows(call):
        return None
    eps = _eps_of(call, arithmetic)
    out, ignored = _first_output(norm)
    if eps is None or out is None:
        return None
    return NormMatch(_KINDS[op_name(norm)], call.weight, call.bias, eps, out, casts | {norm, out} | ignored)


def _computes_in(node: Node) -> torch.dtype:
    """What PyTorch's norms compute in, given an input."""
    return torch.float64 if dtype_of(node) == torch.float64 else torch.float32


def _is_over_rows(call: _NormCall) -> bool:
    """Whether a norm is over the last dimension alone, with weights of its size."""
    width = shape_of(call.value)[-1:]
    if len(call.sizes) != 1 or not width or not sizes_agree(call.sizes[0], width[0]):
        return False
    return all(is_row_vector(w, width[0]) for w in (call.weight, call.bias) if isinstance(w, Node))


def _eps_of(call: _NormCall, arithmetic: torch.dtype) -> Number | None:
    if call.eps is not None:
        return number_of(call.eps)
    if isinstance(call.weight, Node) and dtype_of(call.weight) != dtype_of(call.value):
        return None  # there PyTorch's own default depends on the version
    return torch.finfo(arithmetic).eps


def _of_module(node: Node) -> _NormCall | None:
    module: Any = called_module(node)
    if type(module) not in (nn.LayerNorm, nn.RMSNorm) or len(node.args) != 1 or node.kwargs or hooked(module):
        return None
    (value,) = node.args
    named = {name: f"{node.target}.{name}" for name, held in module._parameters.items() if held is not None}
    if not isinstance(value, Node):
        return None
    sizes: Any = module.normalized_shape
    return _NormCall(value, tuple(sizes), named.get("weight"), named.get("bias"), module.eps)


def _of_function(node: Node) -> _NormCall | None:
    kind = _KINDS.get(op_name(node))
    if kind is None:
        return None
    names = ["input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"]
    if kind == NormKind.RMS:
        names.remove("bias")
    if len(node.args) > len(names):
        return None
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if set(given) - set(names):
        return None
    value, sizes = given.get("input"), given.get("normalized_shape")
    weight, bias = given.get("weight"), given.get("bias")
    eps = given.get("eps", 1e-5 if kind == NormKind.LAYER else None)
    if not isinstance(value, Node) or not all(w is None or isinstance(w, Node) for w in (weight, bias)):
        return None
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes) if isinstance(sizes, list | tuple) else ()
    return _NormCall(value, sizes, weight, bias, eps)


def _first_output(norm: Node) -> tuple[Node | None, frozenset[Node]]:
    """The result of a norm, where nobody takes the statistics it returns as well; and the nodes that ignore them."""
    if tensor_of(norm) is not None:
        return norm, frozenset()
    ignored = frozenset(u for u in norm.users if not u.users)
    used = [u for u in norm.users if u not in ignored]
    taken = len(used) == 1 and op_name(used[0]) == "getitem" and used[0].args[1] == 0
    return (used[0] if taken else None), ignored
