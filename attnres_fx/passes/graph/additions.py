"""Additions of two tensors, as every dialect writes them."""

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from attnres_fx.passes.graph.nodes import is_floating
from attnres_fx.passes.graph.operations import op_name


@dataclass(frozen=True)
class Addition:
    """`left_scale * left + right_scale * right`."""

    left: Node
    left_scale: float
    right: Node
    right_scale: float

    @property
    def swapped(self) -> "Addition":
        """The same sum with its operands in the other order."""
        return Addition(self.right, self.right_scale, self.left, self.left_scale)


def match_addition(node: Node) -> Addition | None:
    """A node as an addition of two tensors.

    Args:
        node: Any node of a graph with values on its nodes.

    Returns:
        The addition; None where a node is no addition, or where an operand or the result is not a floating tensor.
    """
    name = op_name(node)
    if name not in ("add", "sub", "rsub"):
        return None
    args = list(node.args)
    left = args[0] if args else node.kwargs.get("input")
    right = args[1] if len(args) > 1 else node.kwargs.get("other")
    alpha = args[2] if len(args) > 2 else node.kwargs.get("alpha", 1)
    if not isinstance(left, Node) or not isinstance(right, Node) or not isinstance(alpha, int | float):
        return None
    if not (is_floating(left) and is_floating(right) and is_floating(node)):
        return None
    if name == "rsub":
        return Addition(right, 1, left, -alpha)
    return Addition(left, 1, right, alpha if name == "add" else -alpha)


def adds_zero(node: Node) -> bool:
    """Whether a node is `x + 0` or `0 + x`."""
    operands = [*node.args[:2], *(node.kwargs[k] for k in ("input", "other") if k in node.kwargs)]
    numbers = [o for o in operands if not isinstance(o, Node)]
    return len(operands) == 2 and len(numbers) == 1 and is_zero(numbers[0]) and op_name(node) == "add"


def added_zero_operand(node: Node) -> Node | None:
    """The tensor of `0 + x`, which Python's `sum` writes first."""
    if op_name(node) != "add" or not adds_zero(node):
        return None
    return next((o for o in node.all_input_nodes), None)


def is_zero(value: Any) -> bool:
    """Whether an argument is the number zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0
