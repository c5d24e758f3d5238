"""What the recognition of norms works with: a norm as it was matched, and what users of a value look at."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from attnres_fx.ops.epilogue import NormKind
from attnres_fx.passes.graph.nodes import shape_of, sizes_agree, tensor_of, value_of
from attnres_fx.passes.graph.operation_table import SHAPE_ATTRIBUTES, Trait
from attnres_fx.passes.graph.operations import has_trait, op_name

Number = float | torch.SymFloat


@dataclass(frozen=True)
class NormMatch:
    """A norm of a value.

    Args:
        kind: Which norm it is.
        weight, bias: Nodes [D], or the paths of attributes; None where it has none.
        eps: A number, or the symbol that Dynamo has for a number of the model's; `as_number` makes a number of it.
        out: The node that holds the result.
        nodes: Everything between the value and `out`, both ends of it included, in no order.
    """

    kind: NormKind
    weight: Node | str | None
    bias: Node | str | None
    eps: Number
    out: Node
    nodes: frozenset[Node]


def value_users(node: Node) -> list[Node]:
    """Users that look at the value, and not at its shape or dtype alone."""
    return [u for u in node.users if not asks_of(u, node)]


def only_user(node: Node) -> Node | None:
    """The one user that looks at the value; None where there are several, or none."""
    users = value_users(node)
    return users[0] if len(users) == 1 else None


def asks_of(user: Node, node: Node) -> bool:
    """Whether a user asks for nothing of a node but its shape, dtype or device."""
    name = op_name(user)
    if name == "_assert_tensor_metadata":
        return not user.users
    if name == "getattr":
        return user.args[1] in SHAPE_ATTRIBUTES
    if has_trait(user, Trait.SHAPE):
        return user.args[:1] == (node,)
    return name == "type_as" and len(user.args) == 2 and user.args[1] is node and user.args[0] is not node


def dtype_of(node: Node) -> torch.dtype | None:
    """The dtype of a node's tensor; None where it has none."""
    value = tensor_of(node)
    return None if value is None else value.dtype


def is_row_vector(node: Any, width: Any) -> bool:
    """Whether a node is a floating tensor [width]."""
    shape = shape_of(node) if isinstance(node, Node) else ()
    value = tensor_of(node) if isinstance(node, Node) else None
    return len(shape) == 1 and sizes_agree(shape[0], width) and value is not None and value.is_floating_point()


def number_of(value: Any) -> Number | None:
    """A number that is known: written in the graph, or one of the model's that Dynamo made an input of."""
    if isinstance(value, Node):
        held = value_of(value)
        # `item()` of a tensor that is computed has no value before it runs.
        known = isinstance(held, torch.SymFloat) and not free_unbacked_symbols(held)
        return held if known else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def as_number(number: Number) -> float:
    """The number; where it is a symbol, a guard says that the graph holds for this one alone."""
    return float(number)
