"""What a symbolic size was in the user's example, where the tracer saw another one.

A batch of one is traced as two, so that it can be free. Bytes and operations are counted as the example had them.
"""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sympy import Integer  # type: ignore[import-untyped]
from torch import Tensor
from torch.fx import GraphModule

from attnres_fx.passes.graph.nodes import value_of

#: By the tracer's shape environment: its symbols, and their values in the example.
_EXAMPLE: WeakKeyDictionary[Any, dict[Any, Integer]] = WeakKeyDictionary()


def remember_example_sizes(gm: GraphModule, shapes: Iterable[tuple[int, ...]]) -> None:
    """Say what the free sizes of a graph were in the example.

    Args:
        gm: The graph.
        shapes: Of each input of the graph in the example, empty where it is no tensor.
    """
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, shape in zip(inputs, shapes, strict=True):
        value = value_of(node)
        if not isinstance(value, Tensor):
            continue
        for size, number in zip(value.shape, shape, strict=False):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                _EXAMPLE.setdefault(size.node.shape_env, {})[size.node.expr] = Integer(number)


def example_size(size: Any) -> Any:
    """A number as the example had it: a symbolic one's value there, None where it depends on data; others as is."""
    if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return size
    known = _EXAMPLE.get(size.node.shape_env, {})
    value = size.node.expr.xreplace(known) if known else None
    if value is not None and not value.free_symbols:
        return size.node.pytype(value)
    return size.node.hint if size.node.has_hint() else None
