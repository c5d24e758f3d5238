"""What a traced graph says of its inputs: their shapes, the range of free sizes, and what an export checks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.export._unlift import GuardsFn
from torch.fx import GraphModule

from attnres_fx.capture.signature import InputShape, dtype_kind
from attnres_fx.passes.graph.nodes import plain_size, value_of

#: Called with the flat inputs of a graph; raises AssertionError where it does not hold for their sizes.
Guards = Callable[..., None]


def sizes_of(bounds: Any) -> tuple[int, int | None]:
    """The least and the greatest size of a symbol, None where there is no greatest.

    Args:
        bounds: of a tracer. A lower bound of 2 only says that the tracer set 0 and 1 apart.
    """
    low = int(bounds.lower) if bounds.lower.is_Integer else 0
    high = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**31 else None
    return (0 if low == 2 else low), high


def input_shapes(gm: GraphModule) -> tuple[InputShape | None, ...]:
    """The shape of each input of a graph, None where it is no tensor."""
    shapes: list[InputShape | None] = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        value = value_of(node)
        if not isinstance(value, Tensor):
            shapes.append(None)
            continue
        sizes = tuple(s if isinstance(s, int) else str(s) for s in map(plain_size, value.shape))
        shapes.append(InputShape(str(node.target), sizes, dtype_kind(value)))
    return tuple(shapes)


def take_guards(gm: GraphModule) -> Guards | None:
    """Take out of an exported graph the call that checks its inputs.

    Returns:
        What was called, None where there is no such call. It knows what the tracer took for granted of the sizes:
        that one is even, or smaller than another.
    """
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and isinstance(guards := gm.get_submodule(str(node.target)), GuardsFn):
            gm.graph.erase_node(node)
            gm.delete_submodule(str(node.target))
            gm.recompile()
            return guards.forward
    return None
