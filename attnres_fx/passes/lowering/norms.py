"""Recognise the norm that a value goes into, in every spelling, by structure.

rms_norm(x), layer_norm(x)                                     library functions, aten and modules
x.float() * rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)     written out, then
.to(dtype), weight * _, (1 + weight) * _                       in any order, each at most where it stands
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from attnres_fx.ops.epilogue import NormKind
from attnres_fx.passes.graph.nodes import shape_of, sizes_agree, tensor_of, value_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import called_module, has_trait, op_name

Number = float | torch.SymFloat
_UNCHANGED = frozenset(["contiguous", "alias"])
_ONLY_SHAPES = frozenset(["sym_size", "size", "dim", "numel", "ndim", "is_floating_point"])


@dataclass(frozen=True)
class NormMatch:
    """A norm of a value.

    weight, bias: nodes [D], or the path of an attribute. eps: a number, or the symbol
    that Dynamo has for a number of the model's; `settled` makes a number of it. out: the node that holds the
    result. nodes: everything between the value and `out`, both ends of it included, in no order.
    """

    kind: NormKind
    weight: Node | str | None
    bias: Node | str | None
    eps: Number
    out: Node
    nodes: frozenset[Node]


def match_norm(value: Node, arithmetic: torch.dtype) -> NormMatch | None:
    """The one norm that a value goes into, or None where anything else sees the value or the norm is another.

    arithmetic: the dtype the norm must compute in.
    """
    casts = _casts(value)
    users = {u for c in casts for u in value_users(c)} - casts
    found = _library(value, casts, users, arithmetic) or _written_out(value, casts, users, arithmetic)
    return found and _with_tail(found)


def value_users(node: Node) -> list[Node]:
    """Users that look at the value, and not at its shape or dtype alone."""
    return [u for u in node.users if not asks_of(u, node)]


def asks_of(user: Node, node: Node) -> bool:
    """Whether a user asks for nothing of a node but its shape, dtype or device."""
    name = op_name(user)
    if name == "_assert_tensor_metadata":
        return not user.users
    if name == "getattr":
        return user.args[1] in ("dtype", "shape", "device", "ndim")
    if name in _ONLY_SHAPES:
        return user.args[:1] == (node,)
    return name == "type_as" and len(user.args) == 2 and user.args[1] is node and user.args[0] is not node


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
    return (has_trait(user, Trait.CAST) or op_name(user) in _UNCHANGED) and bool(user.args) and user.args[0] is node


def _dtype(node: Node) -> torch.dtype | None:
    value = tensor_of(node)
    return None if value is None else value.dtype


def is_row_vector(node: Any, width: Any) -> bool:
    shape = shape_of(node) if isinstance(node, Node) else ()
    value = tensor_of(node) if isinstance(node, Node) else None
    return len(shape) == 1 and sizes_agree(shape[0], width) and value is not None and value.is_floating_point()


# --- functions and modules ---------------------------------------------------------------------------


def _library(value: Node, casts: frozenset[Node], users: set[Node], arithmetic: torch.dtype) -> NormMatch | None:
    if len(users) != 1:
        return None
    (norm,) = users
    name = op_name(norm)
    if name not in ("rms_norm", "layer_norm") or not (set(norm.all_input_nodes) & casts):
        return None
    given = _of_module(norm) if norm.op == "call_module" else _of_function(norm, name)
    if given is None or given[0] not in casts or _computes_in(given[0]) != arithmetic:
        return None
    value, sizes, weight, bias, eps = given
    width = shape_of(value)[-1:]
    if len(sizes) != 1 or not width or not sizes_agree(sizes[0], width[0]):
        return None
    if any(isinstance(w, Node) and not is_row_vector(w, width[0]) for w in (weight, bias)):
        return None
    if eps is None:
        eps = torch.finfo(arithmetic).eps
        if isinstance(weight, Node) and _dtype(weight) != _dtype(value):
            return None  # there PyTorch's own default depends on the version
    eps = number_of(eps)
    if eps is None:
        return None
    out, ignored = _first_output(norm)
    if out is None:
        return None
    kind = NormKind.RMS if name == "rms_norm" else NormKind.LAYER
    return NormMatch(kind, weight, bias, eps, out, casts | {norm, out} | ignored)


def _computes_in(node: Node) -> torch.dtype:
    """What PyTorch's norms compute in, given an input."""
    return torch.float64 if _dtype(node) == torch.float64 else torch.float32


Given = tuple[Node, tuple[Any, ...], Node | str | None, Node | str | None, Any]


def _of_module(node: Node) -> Given | None:
    module: Any = called_module(node)
    if type(module) not in (nn.LayerNorm, nn.RMSNorm) or len(node.args) != 1 or node.kwargs or hooked(module):
        return None
    (value,) = node.args
    named = {name: f"{node.target}.{name}" for name, held in module._parameters.items() if held is not None}
    if not isinstance(value, Node):
        return None
    sizes: Any = module.normalized_shape
    return value, tuple(sizes), named.get("weight"), named.get("bias"), module.eps


def hooked(module: Any) -> bool:
    """Whether calling a module does more than its class's forward: hooks of its own or of all, a forward of its own."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    every = [getattr(torch.nn.modules.module, f"_global{n}", None) for n in names]
    return "forward" in vars(module) or any(every) or any(getattr(module, name) for name in names)


def _of_function(node: Node, name: str) -> Given | None:
    names = ["input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"]
    if name == "rms_norm":
        names.remove("bias")
    if len(node.args) > len(names):
        return None
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if set(given) - set(names):
        return None
    value, sizes = given.get("input"), given.get("normalized_shape")
    weight, bias = given.get("weight"), given.get("bias")
    eps = given.get("eps", 1e-5 if name == "layer_norm" else None)
    if not isinstance(value, Node) or not all(w is None or isinstance(w, Node) for w in (weight, bias)):
        return None
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes) if isinstance(sizes, list | tuple) else ()
    return value, sizes, weight, bias, eps  # type: ignore[return-value]


def _first_output(norm: Node) -> tuple[Node | None, frozenset[Node]]:
    """The result of a norm, where nobody takes the statistics it returns as well; and the nodes that ignore them."""
    if tensor_of(norm) is not None:
        return norm, frozenset()
    ignored = frozenset(u for u in norm.users if not u.users)
    used = [u for u in norm.users if u not in ignored]
    taken = len(used) == 1 and op_name(used[0]) == "getitem" and used[0].args[1] == 0
    return (used[0] if taken else None), ignored


# --- written out -------------------------------------------------------------------------------------


def _written_out(value: Node, casts: frozenset[Node], users: set[Node], arithmetic: torch.dtype) -> NormMatch | None:
    squares = [u for u in users if _square_of(u, casts)]
    if len(squares) != 1 or len(users) != 2 or _dtype(squares[0]) != arithmetic:
        return None
    (product,) = users - set(squares)
    chain = _reciprocal_root(squares[0])
    if chain is None or _dtype(product) != arithmetic or not _scales(product, casts, chain.end, chain.divides):
        return None
    return NormMatch(NormKind.RMS, None, None, chain.eps, product, casts | frozenset(chain.nodes) | {product})


def _square_of(node: Node, casts: Iterable[Node]) -> bool:
    args: tuple[Any, ...] = node.args
    name = op_name(node)
    if node.kwargs and name != "pow":
        return False
    if name == "square":
        return args[0] in casts
    if name == "pow":
        exponent = args[1] if len(args) > 1 else node.kwargs.get("exponent")
        return args[0] in casts and isinstance(exponent, int | float) and exponent == 2
    return name == "mul" and len(args) == 2 and args[0] in casts and args[1] in casts


@dataclass(frozen=True)
class _Chain:
    """square, mean, + eps and root; `divides`: the value is divided by the end, which is the root itself."""

    nodes: tuple[Node, ...]
    eps: Number
    end: Node
    divides: bool


def _reciprocal_root(square: Node) -> _Chain | None:
    mean = _only_user(square)
    if mean is None or not _is_row_mean(mean, square):
        return None
    add = _only_user(mean)
    eps = None if add is None else _added_number(add, mean)
    root = None if add is None else _only_user(add)
    if add is None or eps is None or root is None or (isinstance(eps, float) and eps < 0):
        return None
    nodes, name = (square, mean, add, root), op_name(root)
    if name == "rsqrt" or (name == "pow" and len(root.args) == 2 and root.args[1] == -0.5 and root.args[0] is add):
        return _Chain(nodes, eps, root, False)
    if name != "sqrt" and not (name == "pow" and len(root.args) == 2 and root.args[1] == 0.5 and root.args[0] is add):
        return None
    inverse = _only_user(root)
    if inverse is not None and _is_reciprocal(inverse, root):
        once = _only_user(inverse)
        if once is not None and op_name(once) == "mul" and once.args == (inverse, 1):  # how export spells 1 / x
            return _Chain((*nodes, inverse, once), eps, once, False)
        return _Chain((*nodes, inverse), eps, inverse, False)
    return _Chain(nodes, eps, root, True)


def _only_user(node: Node) -> Node | None:
    users = value_users(node)
    return users[0] if len(users) == 1 else None


def _is_row_mean(node: Node, of: Node) -> bool:
    names = ("input", "dim", "keepdim", "dtype")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if op_name(node) != "mean" or not set(given) <= {*names, "out"} or given.get("out") is not None:
        return False
    dims = given.get("dim")
    dims = list(dims) if isinstance(dims, list | tuple) else [dims]
    last = len(shape_of(of)) - 1
    if given.get("dtype") not in (None, _dtype(of)) or given["input"] is not of:
        return False
    return bool(given.get("keepdim")) and len(dims) == 1 and dims[0] in (-1, last)


def number_of(value: Any) -> Number | None:
    """A number that is known: written in the graph, or one of the model's that Dynamo made an input of."""
    if isinstance(value, Node):
        held = value_of(value)
        # `item()` of a tensor that is computed has no value before it runs.
        known = isinstance(held, torch.SymFloat) and not free_unbacked_symbols(held)
        return held if known else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def settled(number: Number) -> float:
    """The number; where it is a symbol, a guard says that the graph holds for this one alone."""
    return float(number)


def _added_number(node: Node, to: Node) -> Number | None:
    if op_name(node) != "add" or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    return number_of(right if left is to else left)


def _is_reciprocal(node: Node, of: Node) -> bool:
    if op_name(node) == "reciprocal":
        return True
    if op_name(node) == "div" and len(node.args) == 2 and not node.kwargs:
        one = node.args[0]
        return isinstance(one, int | float) and one == 1 and node.args[1] is of
    return op_name(node) == "pow" and bool(node.args == (of, -1))


def _scales(product: Node, casts: Iterable[Node], by: Node, divides: bool) -> bool:
    args: tuple[Any, ...] = product.args
    name = op_name(product)
    if name != ("div" if divides else "mul") or len(args) != 2 or product.kwargs:
        return False
    if args[1] is by and args[0] in casts:
        return True
    return not divides and args[0] is by and args[1] in casts


# --- what follows a norm -----------------------------------------------------------------------------


def _with_tail(match: NormMatch) -> NormMatch:
    """A norm with the casts and the multiplication by a weight that follow it, as far as they belong to it."""
    out, weight, nodes = match.out, match.weight, set(match.nodes)
    weighted = weight is not None or match.bias is not None or match.kind == NormKind.LAYER
    width = shape_of(out)[-1]
    while (user := _only_user(out)) is not None:
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
