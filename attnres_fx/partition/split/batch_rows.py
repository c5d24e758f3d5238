"""Which inputs of a graph hold the rows of a batch: told by its free sizes, not by lengths that happen to be equal."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from attnres_fx.passes.graph.nodes import tensor_of


def inputs_with_rows(graph: Graph) -> tuple[bool, ...]:
    """For each input of a graph whether its first dimension is the batch's.

    The batch's is the free size that begins an input and an output: outputs of microbatches are joined there.

    Returns:
        One value an input, in order; empty where no free size does.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    outputs = next(n for n in graph.nodes if n.op == "output").args
    of_outputs = {e for node in pytree.tree_leaves(outputs) for e in _first_size(node)}
    batch = next((e for n in inputs for e in _first_size(n) if e.is_Symbol and e in of_outputs), None)
    if batch is None:
        return ()
    return tuple(any(batch in e.free_symbols for e in _first_size(n)) for n in inputs)


def _first_size(node: Any) -> Iterator[Any]:
    """The expression of the first dimension, where it is free."""
    value = tensor_of(node) if isinstance(node, Node) else None
    if value is not None and value.dim() and isinstance(value.shape[0], torch.SymInt):
        yield value.shape[0].node.expr
