"""Sizes that follow from the model's inputs, asked of the inputs: no stage needs a tensor for its shape alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from attnres_fx.passes.graph.nodes import describe, tensor_of, value_of
from attnres_fx.passes.graph.result import PassResult

Symbols = Mapping[Any, tuple[Node, int]]


def symbols_of(graph: Graph) -> dict[Any, tuple[Node, int]]:
    """Each free size as the input and dimension that has it."""
    dimensions: dict[Any, tuple[Node, int]] = {}
    for node in graph.nodes:
        value = tensor_of(node) if node.op == "placeholder" else None
        for dim, size in enumerate(value.shape if value is not None else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                dimensions.setdefault(size.node.expr, (node, dim))
    return dimensions


def ask_inputs_for_sizes_pass(gm: GraphModule) -> PassResult:
    """Compute every size from the inputs' sizes, in place.

    Before:
        h = embedding(weight, ids); n = sym_size(h, 1); positions = arange(n)
    After:
        n = sym_size(ids, 1); positions = arange(n)
    A size that depends on data, or on no input alone, stays as it is.
    """
    symbols = symbols_of(gm.graph)
    asked: dict[Any, Node] = {}
    replaced = []
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if not inputs:
        return PassResult(gm, False)
    first = inputs[-1].next
    for node in list(gm.graph.nodes):
        value = value_of(node)
        if node in asked.values() or not _is_replaceable(node, symbols):
            continue
        expression = value.node.expr
        with gm.graph.inserting_before(first):
            for symbol in sorted(expression.free_symbols, key=str):
                if symbol not in asked:
                    asked[symbol] = _ask(gm.graph, *symbols[symbol], like=node)
            new = _computed(expression, {s: asked[s] for s in expression.free_symbols})
        if isinstance(new, Node):
            new.meta.setdefault("val", value)
        node.replace_all_uses_with(new)  # type: ignore[arg-type]
        replaced.append(describe(node))
        gm.graph.erase_node(node)
    if replaced:
        gm.graph.lint()
    return PassResult(gm, bool(replaced), tuple(replaced))


def _is_replaceable(node: Node, symbols: Symbols) -> bool:
    """Whether a node is a size that follows from the inputs' and is not asked of one already."""
    value = value_of(node)
    if not isinstance(value, torch.SymInt) or node.op == "placeholder" or not node.users:
        return False
    return value.node.expr.free_symbols <= symbols.keys() and not _asks_an_input(node)


def _asks_an_input(node: Node) -> bool:
    return len(node.all_input_nodes) == 1 and node.all_input_nodes[0].op == "placeholder"


def _ask(graph: Graph, source: Node, dim: int, *, like: Node) -> Node:
    value = tensor_of(source)
    assert value is not None
    node = graph.call_function(torch.ops.aten.sym_size.int, (source, dim))
    node.meta = {**like.meta, "val": value.shape[dim]}
    return node


def _computed(expression: Any, sizes: Mapping[Any, Node]) -> Node | int:
    """An expression of sizes as nodes, inserted at the graph's insertion point."""
    if expression.is_Integer:
        return int(expression)
    result = sympy_interp(PythonReferenceAnalysis, {s: Proxy(n) for s, n in sizes.items()}, expression)
    return result.node if isinstance(result, Proxy) else int(result)


def sizes_for(symbols: Symbols, inputs: Mapping[Node, Any]) -> dict[Any, int]:
    """The free sizes as a call's own inputs have them."""
    return {symbol: int(inputs[node].shape[dim]) for symbol, (node, dim) in symbols.items()}


def concrete_shape(value: torch.Tensor, sizes: Mapping[Any, int]) -> tuple[int, ...]:
    """The shape a fake tensor stands for, at the sizes given."""
    return tuple(int(s.node.expr.xreplace(dict(sizes))) if isinstance(s, torch.SymInt) else int(s) for s in value.shape)
