"""Fold the addition that builds a block's partial sum into the read that first sees the sum.

Before:
    p2 = p1 + v2
    r = depth_attention([v0, p2], q, k, eps, 2)
    p3 = p2 + v3
After:
    r, p2 = depth_attention_fused([v0, p1], q, k, eps, 2, v2, 0, None, None, 0.0, None)
    p3 = p2 + v3

Only a plain addition of two tensors of one shape, that nothing sees before the read does.
"""

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from attnres_fx.ops.epilogue import NormKind
from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.nodes import nodes_without_gradients, same_shape
from attnres_fx.passes.graph.operations import has_side_effects, op_name
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.lowering.read_calls import DepthReadCall, as_depth_read, have_values, may_become_one


@dataclass(frozen=True)
class SumFusion:
    """An addition to fold, by names of nodes.

    Args:
        read: The read that sees the sum first.
        total: The sum.
        partial, delta: What is added; the read returns `partial + delta` as well.
    """

    read: str
    total: str
    partial: str
    delta: str


def fuse_partial_sums_pass(gm: GraphModule) -> PassResult:
    """Fold partial sums into reads, in place.

    Args:
        gm: A module with values on the nodes of its graph.

    Returns:
        The module; `replaced` holds a SumFusion for each sum that was folded.
    """
    plan = plan_sum_fusions(gm)
    nodes = {n.name: n for n in gm.graph.nodes}
    for fusion in plan:
        # A later fusion may add to this sum, or add this read: it finds them under their old names.
        nodes.update(_fold(nodes, fusion))
    return PassResult(gm, bool(plan), plan, tuple(f.total for f in plan))


def plan_sum_fusions(gm: GraphModule) -> tuple[SumFusion, ...]:
    """What `fuse_partial_sums_pass` would do, as data.

    Args:
        gm: A module with values on the nodes of its graph; it is left as it is.

    Returns:
        A SumFusion for each sum that can be folded into a read, in graph order.
    """
    frozen = nodes_without_gradients(gm.graph)
    barriers = [n for n in gm.graph.nodes if has_side_effects(n)]
    plan = []
    for node in gm.graph.nodes:
        call = as_depth_read(node)
        if call is None or (terms := foldable(call)) is None:
            continue
        total = call.sources[-1]
        if may_become_one(total, node, barriers, frozen):
            plan.append(SumFusion(node.name, total.name, terms[0].name, terms[1].name))
    return tuple(plan)


def foldable(call: DepthReadCall) -> tuple[Node, Node] | None:
    """Partial sum and addend of the addition that a read's last source is, None where it must stand alone."""
    if call.epilogue.delta is not None or call.epilogue.norm != NormKind.NONE or not have_values(call.sources):
        return None
    total = call.sources[-1]
    added = match_addition(total)
    if (
        added is None
        or added.left_scale != 1
        or added.right_scale != 1
        or op_name(total) != "add"
        or "out" in total.kwargs
    ):
        return None
    if not (same_shape(added.left, total) and same_shape(added.right, total)):
        return None
    if call.sources.count(total) != 1 or min(total.users) is not call.node:
        return None
    return added.left, added.right


def _fold(nodes: dict[str, Node], fusion: SumFusion) -> dict[str, Node]:
    call = as_depth_read(nodes[fusion.read])
    assert call is not None
    total = call.sources[-1]
    fused = call.with_last(nodes[fusion.partial], nodes[fusion.delta])
    out, partial = fused.insert()
    assert partial is not None and call.output is not None
    out.meta.update({k: v for k, v in call.output.meta.items() if k not in ("val", "example_value")})
    partial.meta.update({k: v for k, v in total.meta.items() if k not in ("val", "example_value")})
    replaced = {call.output.name: out, fusion.total: partial}
    call.output.replace_all_uses_with(out)
    graph = total.graph
    for old in (call.output, call.node):
        if not old._erased:
            graph.erase_node(old)
    total.replace_all_uses_with(partial)
    graph.erase_node(total)
    return replaced
