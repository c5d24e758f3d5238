"""How single values of a graph depend on others, by a walk back from them."""

from typing import Any

from torch.fx import Node

from attnres_fx.passes.graph.operations import asks_only_metadata, is_light


def depends_on_inputs(products: tuple[Any, ...], addend: Node) -> bool:
    """Whether a factor was computed from the addend, or from what the addend was computed from."""
    roots = {addend, *addend.all_input_nodes}
    earliest = min(roots)
    stack, seen = list(products), set()
    while stack:
        node = stack.pop()
        if node in seen or node < earliest:
            continue
        if node in roots and node.op != "get_attr":
            return True
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return False


def dependence_on(node: Node, tensor: Node) -> str:
    """How a node depends on a tensor: `"branch"`, `"elementwise"` or not at all."""
    return dependence_of(node, {tensor}, tensor)


def dependence_of(node: Node, bases: set[Node], earliest: Node) -> str:
    """How a node depends on some tensors, of which the earliest is named: `"branch"`, `"elementwise"` or not at all."""
    stack, seen = [(node, False)], set()
    reached = ""
    while stack:
        current, heavy = stack.pop()
        if (current, heavy) in seen or (current < earliest and current not in bases):
            continue
        seen.add((current, heavy))
        if current in bases:
            if heavy:
                return "branch"
            reached = "elementwise"
            continue
        sources = [n for n in current.all_input_nodes if not asks_only_metadata(current, n)]
        stack += [(n, heavy or not is_light(current)) for n in sources]
    return reached


__all__ = ["dependence_of", "dependence_on", "depends_on_inputs"]
