"""Statistics that are taken off a tensor: `x - x.mean(1, keepdim=True)` is the first half of a norm, no residual."""

from torch.fx import Node

from attnres_fx.passes.graph.additions import Addition
from attnres_fx.passes.graph.nodes import same_shape, tensor_of
from attnres_fx.passes.graph.operations import called_module, is_light, moves_data, op_name
from attnres_fx.passes.streams.dependence import Dependence

_SPREADS = ("expand", "expand_as", "broadcast_to")


def centres(addition: Addition, root: Node, depends: Dependence) -> bool:
    """Whether the right operand is a statistic of the left one's stream that is subtracted from it.

    A statistic is smaller than what it is taken of, and is computed by one chain of reductions and elementwise work:
    mean, maximum, logarithm of a sum. What goes through weights or a norm on the way is a branch, and so is a mean
    that is added.

    Args:
        addition: The sum of a state and something that depends on it.
        root: The root of the state's stream.
        depends: Which nodes depend on the root.
    """
    node, scale = addition.right, addition.right_scale * addition.left_scale
    while op_name(node) in _SPREADS:
        node = node.all_input_nodes[0]
    if same_shape(node, addition.left):
        return False
    whole = _seen_as(addition.left)
    while not _is_one_of(node, whole) and (step := _step_of_statistic(node, root, depends)) is not None:
        scale *= _sign(node)
        node = step
    return _is_one_of(node, whole) and scale < 0


def _is_one_of(node: Node, nodes: set[Node]) -> bool:
    """Whether a node is among others, or calls what one of them calls: `g * x - (g * x).mean()`."""
    return node in nodes or any(_calls_same(node, n) for n in nodes)


def _calls_same(a: Node, b: Node) -> bool:
    return a.op == b.op and a.target == b.target and a.args == b.args and a.kwargs == b.kwargs


def _seen_as(node: Node) -> set[Node]:
    """A tensor, and what it is another form of."""
    found = {node}
    while moves_data(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
        found.add(node)
    return found


def _step_of_statistic(node: Node, root: Node, depends: Dependence) -> Node | None:
    """What a step of a statistic is computed from; None where a node is no such step."""
    inputs = [n for n in node.all_input_nodes if n is root or depends.at_all(n, root)]
    if len(inputs) != 1 or not (is_light(node) or _reduces(node)):
        return None
    return inputs[0]


def _reduces(node: Node) -> bool:
    """Whether a call makes one tensor smaller, without anything learned."""
    module = called_module(node) if node.op == "call_module" else None
    if module is not None and any(True for _ in module.parameters()):
        return False
    return len(node.all_input_nodes) == 1 and (tensor_of(node) is None or not same_shape(node, node.all_input_nodes[0]))


def _sign(node: Node) -> int:
    """-1 of a call that turns the sign of what it is given."""
    name = op_name(node)
    numbers = [a for a in node.args if isinstance(a, int | float)]
    return -1 if name == "neg" or (name in ("mul", "div") and any(n < 0 for n in numbers)) else 1
