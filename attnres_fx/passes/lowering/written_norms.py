"""RMSNorm written out in arithmetic: square, mean, + eps, root, and the value scaled by it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from attnres_fx.ops.epilogue import NormKind
from attnres_fx.passes.graph.nodes import shape_of
from attnres_fx.passes.graph.operations import op_name
from attnres_fx.passes.lowering.norm_match import NormMatch, Number, dtype_of, number_of, only_user


def match_written_norm(casts: frozenset[Node], users: set[Node], arithmetic: torch.dtype) -> NormMatch | None:
    """`x * rsqrt(mean(x * x) + eps)`, in every spelling, as all that looks at a value.

    Args:
        casts: The value, and its casts to other dtypes.
        users: Whatever else looks at them.
        arithmetic: The dtype that the norm must compute in.

    Returns:
        The norm, without the weight that may follow it; None where the users are anything else.
    """
    squares = [u for u in users if _square_of(u, casts)]
    if len(squares) != 1 or len(users) != 2 or dtype_of(squares[0]) != arithmetic:
        return None
    (product,) = users - set(squares)
    chain = _reciprocal_root(squares[0])
    if chain is None or dtype_of(product) != arithmetic or not _scales(product, casts, chain.end, chain.divides):
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
    before = _mean_plus_eps(square)
    root = None if before is None else only_user(before[0][-1])
    if before is None or root is None:
        return None
    nodes, eps = before
    if _is_power(root, nodes[-1], "rsqrt", -0.5):
        return _Chain((*nodes, root), eps, root, False)
    if not _is_power(root, nodes[-1], "sqrt", 0.5):
        return None
    inverse = _reciprocal_of(root)
    return _Chain((*nodes, root, *inverse), eps, (root, *inverse)[-1], not inverse)


def _mean_plus_eps(square: Node) -> tuple[tuple[Node, ...], Number] | None:
    """The nodes of `mean(square) + eps`, and eps."""
    mean = only_user(square)
    if mean is None or not _is_row_mean(mean, square):
        return None
    add = only_user(mean)
    eps = None if add is None else _added_number(add, mean)
    if add is None or eps is None or (isinstance(eps, float) and eps < 0):
        return None
    return (square, mean, add), eps


def _is_power(node: Node, of: Node, name: str, exponent: float) -> bool:
    """Whether a node is a root by its name, or by its exponent."""
    if op_name(node) == name:
        return True
    return op_name(node) == "pow" and len(node.args) == 2 and bool(node.args[1] == exponent) and node.args[0] is of


def _reciprocal_of(root: Node) -> tuple[Node, ...]:
    """The nodes that make `1 / root`, where it has no other user; none where it is used as it is."""
    inverse = only_user(root)
    if inverse is None or not _is_reciprocal(inverse, root):
        return ()
    once = only_user(inverse)
    if once is not None and op_name(once) == "mul" and once.args == (inverse, 1):  # how export spells 1 / x
        return inverse, once
    return (inverse,)


def _is_row_mean(node: Node, of: Node) -> bool:
    names = ("input", "dim", "keepdim", "dtype")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if op_name(node) != "mean" or not set(given) <= {*names, "out"} or given.get("out") is not None:
        return False
    dims = given.get("dim")
    dims = list(dims) if isinstance(dims, list | tuple) else [dims]
    last = len(shape_of(of)) - 1
    if given.get("dtype") not in (None, dtype_of(of)) or given["input"] is not of:
        return False
    return bool(given.get("keepdim")) and len(dims) == 1 and dims[0] in (-1, last)


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
