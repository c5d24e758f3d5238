"""Take residual additions out of the operations they are fused into.

Before:
    h1 = torch.addmm(h0, a, w)        # a was computed from h0
After:
    h1 = h0 + torch.mm(a, w)

Only where the addend has the result's shape and the product depends on it: a bias stays where it is.
The `0 + x` that Python's `sum` begins with becomes `x`.
"""

import logging
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnres_fx.passes.graph_tools import computed_value, insert_call, same_shape, tensor_of
from attnres_fx.passes.result import PassResult
from attnres_fx.passes.spelling import added_zero_operand, is_aten, is_floating, op_name

log = logging.getLogger(__name__)

# Name of the product, and the keywords of the two factors and the two scales.
_FUSED = {
    "addmm": ("mm", "mat1", "mat2", "beta", "alpha"),
    "baddbmm": ("bmm", "batch1", "batch2", "beta", "alpha"),
    "addcmul": ("mul", "tensor1", "tensor2", "", "value"),
    "addcdiv": ("div", "tensor1", "tensor2", "", "value"),
}


def unfuse_additions_pass(gm: GraphModule) -> PassResult:
    """Split, in place, fused additions whose addend may be a state."""
    split = []
    for node in list(gm.graph.nodes):
        if (operand := added_zero_operand(node)) is not None and _is_same_kind(operand, node):
            split.append(node.name)
            node.replace_all_uses_with(operand)
            gm.graph.erase_node(node)
            continue
        parts = _read(node)
        if parts is None:
            continue
        order = {n: i for i, n in enumerate(gm.graph.nodes)}
        if not same_shape(parts[0], node) or not _hangs_on(parts[1:3], parts[0], order):
            continue
        split.append(node.name)
        _split(gm, node, parts)
    if split:
        gm.graph.lint()
        log.info("unfuse additions: %d split", len(split))
    return PassResult(gm, bool(split), (), tuple(split))


def _is_same_kind(operand: Node, node: Node) -> bool:
    before, after = tensor_of(operand), tensor_of(node)
    return before is not None and after is not None and before.dtype == after.dtype and same_shape(operand, node)


def _read(node: Node) -> tuple[Node, Node, Node, float, float] | None:
    if op_name(node) not in _FUSED:
        return None
    _, first, second, beta, alpha = _FUSED[op_name(node)]
    keywords = dict(node.kwargs)
    positional = list(node.args)
    addend = positional.pop(0) if positional else keywords.get("input", keywords.get("self"))
    left = positional.pop(0) if positional else keywords.get(first)
    right = positional.pop(0) if positional else keywords.get(second)
    if not all(isinstance(n, Node) for n in (addend, left, right)) or positional:
        return None
    scales = keywords.get(beta, 1), keywords.get(alpha, 1)
    if not all(isinstance(s, int | float) for s in scales) or not is_floating(node):
        return None
    return addend, left, right, *scales  # type: ignore[return-value]


def _hangs_on(products: tuple[Any, ...], addend: Node, order: dict[Node, int]) -> bool:
    """Whether a factor was computed from the addend, or from what the addend was computed from."""
    roots = {addend, *addend.all_input_nodes}
    earliest = min(order[r] for r in roots if r in order)
    stack, seen = list(products), set()
    while stack:
        node = stack.pop()
        if node in seen or order.get(node, -1) < earliest:
            continue
        if node in roots and node.op != "get_attr":
            return True
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return False


def _split(gm: GraphModule, node: Node, parts: tuple[Node, Node, Node, float, float]) -> None:
    addend, left, right, beta, alpha = parts
    aten = is_aten(node)
    product = _FUSED[op_name(node)][0]
    packet = getattr(torch.ops.aten, product)
    target = (packet.Tensor if product in ("mul", "div") else packet.default) if aten else getattr(torch, product)
    value = tensor_of(node)
    with gm.graph.inserting_before(node):
        product_value = computed_value("call_function", target, (left, right), {})
        made = insert_call(gm.graph, target, (left, right), like=node, value=product_value)
        if not same_shape(made, node):
            spread: Any = torch.ops.aten.expand_as.default if aten else torch.Tensor.expand_as
            made = insert_call(gm.graph, spread, (made, addend), like=node, value=value)
        if beta != 1:
            scaled: Any = torch.ops.aten.mul.Tensor if aten else torch.mul
            addend = insert_call(gm.graph, scaled, (addend, beta), like=node, value=value)
        plus: Any = torch.ops.aten.add.Tensor if aten else torch.add
        total = insert_call(gm.graph, plus, (addend, made), like=node, value=value)
        if alpha != 1:
            total.kwargs = {"alpha": alpha}
    node.replace_all_uses_with(total)
    gm.graph.erase_node(node)
