"""Which module consumes a state, seen through the regions that its call is wrapped in."""

from torch.fx import GraphModule, Node

from attnres_fx.passes.graph.module_paths import module_path
from attnres_fx.passes.graph.nodes import body_of
from attnres_fx.passes.graph.operations import operation_of


def consumer_path(consumer: Node, state: Node) -> str:
    """Path of the module whose code consumes a state.

    Of a region (a checkpoint around a branch) that is what consumes it in the body, so that the path does not depend
    on whether there is a region around the branch.

    Args:
        consumer: A node that takes the state.
        state: The state.
    """
    owner = consumer.graph.owning_module
    while (inside := _inside(consumer, state, owner)) is not None:
        consumer, state, owner = inside
    return module_path(consumer)


def _inside(consumer: Node, state: Node, owner: GraphModule | None) -> tuple[Node, Node, GraphModule] | None:
    """The first node of a region's body that takes the state, what the state is there, and the body."""
    operation = operation_of(consumer)
    region = None if operation is None else operation.region
    if region is None or state not in consumer.args[region.operands :]:
        return None
    body = body_of(consumer.args[region.body], owner)
    if body is None:
        return None
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    operand = inputs[consumer.args[region.operands :].index(state)]
    first = next((n for n in body.graph.nodes if operand in n.all_input_nodes), None)
    return None if first is None or first.op == "output" else (first, operand, body)
