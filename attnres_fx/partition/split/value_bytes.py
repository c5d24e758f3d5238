"""Bytes of a node's tensor, with the sizes of the example."""

import torch
from torch.fx import Node

from attnres_fx.errors import PlanError
from attnres_fx.passes.graph.example_sizes import example_size
from attnres_fx.passes.graph.nodes import describe, tensor_of


def size_in_bytes(node: Node) -> int:
    """Bytes of a node's tensor, free sizes as in the example; 0 where it is no tensor."""
    value = tensor_of(node)
    if value is None:
        return 0
    count = value.element_size()
    for size in value.shape:
        count *= _plain_number(size, node)
    return count


def _plain_number(size: int | torch.SymInt, node: Node) -> int:
    """A size as the example had it. Raises PlanError for one that depends on data."""
    known = example_size(size)
    if known is None:
        raise PlanError(
            f"the size of {describe(node)} depends on data ({size}), so nobody can tell how many bytes it has: "
            f"a pipeline needs sizes that follow from the inputs'."
        )
    return int(known)
