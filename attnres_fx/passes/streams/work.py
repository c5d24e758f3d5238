"""How much a node computes, roughly: enough to tell a stack of layers from a skip around it."""

from math import prod, sqrt
from typing import Any

from torch import Tensor
from torch.fx import Node

from attnres_fx.passes.graph.example_sizes import example_size
from attnres_fx.passes.graph.nodes import tensor_of
from attnres_fx.passes.graph.operations import called_module


def work_of(node: Node) -> float:
    """The multiplications of a contraction, estimated from sizes alone.

    Each index of a matrix product is in two of its three tensors, so that the root of the product of their sizes is
    their number: `[M, K] @ [K, N] -> [M, N]` takes M K N. Where an index is in all three it counts a little more.
    """
    module = called_module(node) if node.op == "call_module" else None
    taken = [t for n in node.all_input_nodes if (t := tensor_of(n)) is not None]
    taken += [] if module is None else list(module.parameters())
    made = tensor_of(node)
    sizes = sorted((_elements(t) for t in taken), reverse=True)[:2]
    return sqrt(prod(sizes) * _elements(made)) if made is not None and sizes else 0.0


def _elements(tensor: Tensor) -> float:
    sizes: list[Any] = [example_size(s) for s in tensor.shape]
    return float(prod(s for s in sizes if s is not None))
