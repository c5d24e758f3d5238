"""Sums over the dimension along which tensors were stacked, with or without weights, as sums of the tensors.

Before:
    s = torch.stack([h, f])                          # f was computed from h
    h1 = torch.einsum("l,lbtd->btd", w, s)
After:
    h1 = w.select(0, 0) * h + w.select(0, 1) * f

So are `s.sum(0)`, `s.mean(0)`, `(s * w).sum(0)`, `torch.tensordot(w, s, 1)`, `s @ w` over the last dimension, and all
of them where `cat` joined tensors along a dimension of size 1. Weights that are computed from what they weigh stay
where they are: they make no sum of it.
"""

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import argument_of, is_floating, shape_of, shapes_agree, tensor_of
from attnres_fx.passes.graph.operations import op_name
from attnres_fx.passes.graph.pieces import Join, join_of
from attnres_fx.passes.normalize.dependences import dependence_on, depends_on_inputs


@dataclass(frozen=True)
class _Sum:
    """A call that sums what was joined.

    Attributes:
        join: What was joined, along a dimension in which each part has one entry.
        weight: What each part is multiplied by; None without weights.
        along: The dimension of the weight that goes with the join's; None where it has one entry for all parts.
        scale: A number that all of it is multiplied by.
    """

    join: Join
    weight: Node | None = None
    along: int | None = None
    scale: float = 1


def split_sum_of_stack(graph: Graph, node: Node) -> bool:
    """Write a sum over a stack as a sum of what was stacked, where that may be a state and something added to it.

    Args:
        graph: The graph.
        node: Any node of it; it stays in the graph, without users.

    Returns:
        Whether it was written anew.
    """
    found = _match(node)
    if found is None:
        return False
    parts, weight = found.join.parts, found.weight
    if weight is not None and any(dependence_on(weight, p) for p in parts):
        return False
    if not any(depends_on_inputs((q,), p) for p in parts for q in parts if p is not q):
        return False
    with graph.inserting_before(node):
        terms = [_term(graph, found, i, node) for i in range(len(parts))]
        total = terms[0]
        for term in terms[1:]:
            total = emit(graph, "add", (total, term), like=node)
        if found.scale != 1:
            total = emit(graph, "mul", (total, found.scale), like=node)
    node.replace_all_uses_with(total)
    return True


def _term(graph: Graph, found: _Sum, index: int, node: Node) -> Node:
    part: Node = found.join.parts[index]
    if not found.join.stacked:
        part = emit(graph, "select", (part, found.join.dim, 0), like=part, dialect=node)
    if found.weight is None:
        return part
    weight = found.weight
    if found.along is not None:
        weight = emit(graph, "select", (weight, found.along, index), like=weight, dialect=node)
    return emit(graph, "mul", (part, weight), like=node)


def _match(node: Node) -> _Sum | None:
    name = op_name(node)
    if name not in _MATCHES or not is_floating(node):
        return None
    found = _MATCHES[name](node)
    if found is None or len(found.join.parts) < 2 or not _keeps_shape(found, node):
        return None
    return found


def _keeps_shape(found: _Sum, node: Node) -> bool:
    """Whether the parts have the shape and dtype of the sum, so that nothing is spread or promoted."""
    for part in found.join.parts:
        shape = shape_of(part)
        if not found.join.stacked:
            shape = shape[: found.join.dim] + shape[found.join.dim + 1 :]
        value, total = tensor_of(part), tensor_of(node)
        if value is None or total is None or value.dtype != total.dtype or not shapes_agree(shape, shape_of(node)):
            return False
    weight = None if found.weight is None else tensor_of(found.weight)
    return found.weight is None or (weight is not None and weight.is_floating_point())


def _joined(node: Any) -> Join | None:
    """What a tensor was put together from, if each part has one entry along the dimension of the join."""
    join = join_of(node) if isinstance(node, Node) else None
    if join is None or join.stacked:
        return join
    ones = all(len(shape_of(p)) > join.dim and shape_of(p)[join.dim] == 1 for p in join.parts)
    return join if ones else None


def _of_sum(node: Node) -> _Sum | None:
    """`stack.sum(d)`, `stack.mean(d)`, and `(stack * w).sum(d)`."""
    dimension, product = _summed_dimension(node), node.args[0] if node.args else None
    if dimension is None or not isinstance(product, Node) or not shape_of(product):
        return None
    if op_name(product) == "mul" and len(product.args) == 2:
        found = _weighed(*product.args) or _weighed(*product.args[::-1])
    else:
        found = None if (join := _joined(product)) is None else _Sum(join)
    if found is None or found.join.dim != dimension % len(shape_of(product)):
        return None
    scale = 1 / len(found.join.parts) if op_name(node) == "mean" else 1
    return _Sum(found.join, found.weight, found.along, scale)


def _summed_dimension(node: Node) -> int | None:
    """The one dimension that a sum leaves out of its result; None where there are others, or it changes the dtype."""
    if node.kwargs.get("dtype") is not None or node.kwargs.get("keepdim") or len(node.args) > 2:
        return None
    dims: Any = argument_of(node, 1, "dim")
    if isinstance(dims, list | tuple):
        dims = dims[0] if len(dims) == 1 else None
    return dims if isinstance(dims, int) else None


def _weighed(stack: Any, weight: Any) -> _Sum | None:
    """`stack * w`, where w is spread over the stack."""
    join = _joined(stack)
    if join is None or not isinstance(weight, Node) or tensor_of(weight) is None:
        return None
    own = shape_of(weight)
    along = join.dim - len(shape_of(stack)) + len(own)
    if len(own) > len(shape_of(stack)):
        return None
    if along < 0:
        return _Sum(join, weight)
    return _Sum(join, weight, along) if own[along] == len(join.parts) else None


def _of_tensordot(node: Node) -> _Sum | None:
    """`tensordot(w, stack, 1)` and `tensordot(stack, w, ([d], [0]))`, where w is a vector."""
    if len(node.args) < 2:
        return None
    for at, (stack, weight) in enumerate((node.args[:2], node.args[1::-1])):
        join = _joined(stack)
        if join is None or not isinstance(weight, Node) or len(shape_of(weight)) != 1:
            continue
        rank = len(shape_of(stack))  # type: ignore[arg-type]
        if [d % rank for d in _contracted(node, at, rank)] == [join.dim]:
            return _Sum(join, weight, 0)
    return None


def _contracted(node: Node, operand: int, rank: int) -> list[int]:
    """The dimensions of an operand, which has so many, that `tensordot` sums over."""
    dims: Any = node.args[2:] if len(node.args) == 4 else argument_of(node, 2, "dims")  # aten has two lists
    if dims == 1:
        return [rank - 1 if operand == 0 else 0]
    if not isinstance(dims, list | tuple) or len(dims) != 2:
        return []
    own: Any = dims[operand]
    return [own] if isinstance(own, int) else list(own)


def _of_matmul(node: Node) -> _Sum | None:
    """`stack @ w` over the last dimension, where w is a vector."""
    stack, weight = (*node.args, None, None)[:2]
    join = _joined(stack)
    if join is None or not isinstance(weight, Node) or len(shape_of(weight)) != 1:
        return None
    return _Sum(join, weight, 0) if join.dim == len(shape_of(stack)) - 1 else None  # type: ignore[arg-type]


def _of_einsum(node: Node) -> _Sum | None:
    """`einsum("l,lbtd->btd", w, stack)`: one letter is summed, and the others of w are the last ones of the result."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    taken, result = equation.replace(" ", "").replace("...", "\N{HORIZONTAL ELLIPSIS}").split("->")
    letters = taken.split(",")
    for (stack, own), (weight, others) in zip(
        zip(operands, letters, strict=False), zip(operands[::-1], letters[::-1], strict=False), strict=False
    ):
        join = _joined(stack)
        summed = set(own) - set(result)
        if join is None or not isinstance(weight, Node) or len(summed) != 1 or len(set(own)) != len(own):
            continue
        (letter,) = summed
        rest = others.replace(letter, "")
        if others.count(letter) != 1 or own.replace(letter, "") != result or not result.endswith(rest):
            continue
        if _dimension(own, letter, len(shape_of(stack))) == join.dim:  # type: ignore[arg-type]
            return _Sum(join, weight, _dimension(others, letter, len(shape_of(weight))))
    return None


def _dimension(letters: str, letter: str, rank: int) -> int:
    """Which dimension a letter stands for, where an ellipsis may stand for several."""
    at = letters.index(letter)
    return at if "\N{HORIZONTAL ELLIPSIS}" not in letters[:at] else rank - (len(letters) - at)


_MATCHES = {
    "sum": _of_sum,
    "mean": _of_sum,
    "tensordot": _of_tensordot,
    "matmul": _of_matmul,
    "einsum": _of_einsum,
}

__all__ = ["split_sum_of_stack"]
