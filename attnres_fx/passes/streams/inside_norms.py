"""What a written-out norm does to a state before it meets the state again: no sum or factor that reads by itself.

`gain * x * rsqrt(mean(x * x))` multiplies first, and `x * rsqrt(mean((x - bias) ** 2))` takes the variance of something
else: in both the norm takes in the one state `x`.
"""

from collections.abc import Collection

from torch.fx import Node

from attnres_fx.passes.graph.operations import is_norm_step, may_be_in_norm, op_name

#: How many steps a norm is followed.
_NORM_STEPS = 64


def is_inside_norm(node: Node, state: Collection[Node]) -> bool:
    """Whether a node is part of a written-out norm of a state that it was computed from.

    Every use of it comes, by reductions and elementwise work alone, to a product with what comes from the state itself
    in the same way; there is a reduction on one of the two ways.

    Args:
        node: A factor of a state, or the state plus something from outside.
        state: The state, in every form of it.
    """
    inside = {node: False}  # whether a reduction stands before it
    stack = [node]
    while stack:
        current = stack.pop()
        if not current.users or len(inside) > _NORM_STEPS:
            return False
        for user in current.users:
            if user in inside or _meets(user, inside, state, inside[current]):
                continue
            if not may_be_in_norm(user):
                return False
            inside[user] = inside[current] or is_norm_step(user)
            stack.append(user)
    return True


def _meets(product: Node, inside: Collection[Node], state: Collection[Node], reduced: bool) -> bool:
    """Whether a product's other operand comes from the state without what is inside."""
    if op_name(product) not in ("mul", "div", "addcmul", "addcdiv"):
        return False
    stack = [(n, reduced) for n in product.all_input_nodes if n not in inside]
    seen = {n for n, _ in stack}
    while stack and len(seen) <= _NORM_STEPS:
        node, has_reduction = stack.pop()
        if node in state:
            if has_reduction:
                return True
            continue
        if not may_be_in_norm(node):
            continue
        before = [n for n in node.all_input_nodes if n not in inside and n not in seen]
        seen.update(before)
        stack += [(n, has_reduction or is_norm_step(node)) for n in before]
    return False
