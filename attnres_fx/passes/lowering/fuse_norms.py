"""Fold the norm that a read goes into, into the read.

Before:
    r = depth_attention([v0, v1], q, k, eps, 2)
    y = layer_norm(r, [D], w, b, 1e-5)
After:
    y = depth_attention_fused([v0, v1], q, k, eps, 2, None, 2, w, b, 1e-5, float32)[0]

The read is then never written, and backward needs no copy of it. Only where nothing but the norm sees the read, and
only norms that `match_norm` knows; the rest stays.
"""

from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch.fx import GraphModule, Node

from attnres_fx.ops.epilogue import Epilogue
from attnres_fx.ops.operator import DEPTH_ATTENTION
from attnres_fx.passes.graph.nodes import insert_attribute, nodes_without_gradients
from attnres_fx.passes.graph.operations import has_side_effects, is_aten, op_name
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.lowering.norm_match import NormMatch, Number, as_number, asks_of
from attnres_fx.passes.lowering.norms import match_norm
from attnres_fx.passes.lowering.read_calls import (
    DepthReadCall,
    as_depth_read,
    available,
    have_values,
    known_tensor,
    may_become_one,
    move_before,
)


@dataclass(frozen=True)
class NormFusion:
    """A norm to fold: names of nodes, and what the norm is.

    Args:
        read: The node of the read.
        result: The node of the norm's result.
        kind: 1 RMSNorm, 2 LayerNorm.
        weight, bias: A node's name or an attribute's path, [D]; None where the norm has none.
        eps: What the norm adds under its root.
        dtype: The dtype of the result; None for the one that the sources promote to at run time.
        modules: Paths of the norm modules that are no longer called.
    """

    read: str
    result: str
    kind: int
    weight: str | None
    bias: str | None
    eps: Number
    dtype: torch.dtype | None
    modules: tuple[str, ...] = ()


def fuse_norms_pass(gm: GraphModule) -> PassResult:
    """Fold norms into reads, in place.

    Args:
        gm: A module with values on the nodes of its graph.

    Returns:
        The module; `replaced` holds a NormFusion for each norm that was folded.
    """
    found = _find(gm)
    for fusion, call, match in found:
        _rewrite(gm, fusion, call, match)
    return PassResult(gm, bool(found), tuple(f for f, _, _ in found), tuple(f.result for f, _, _ in found))


def plan_norm_fusions(gm: GraphModule) -> tuple[NormFusion, ...]:
    """What `fuse_norms_pass` would do, as data.

    Args:
        gm: A module with values on the nodes of its graph; it is left as it is.

    Returns:
        A NormFusion for each norm that can be folded into a read, in graph order.
    """
    return tuple(fusion for fusion, _, _ in _find(gm))


def _find(gm: GraphModule) -> list[tuple[NormFusion, DepthReadCall, NormMatch]]:
    frozen = nodes_without_gradients(gm.graph)
    barriers = [n for n in gm.graph.nodes if has_side_effects(n)]
    found: list[tuple[NormFusion, DepthReadCall, NormMatch]] = []
    for node in gm.graph.nodes:
        call = as_depth_read(node)
        match = None if call is None else _norm_of(call)
        if call is None or match is None or not may_become_one(node, match.out, barriers, frozen):
            continue
        weights = _weights_of(match)
        gone = {m.out for _, _, m in found}  # a weight that is itself a folded norm's result is there no more
        if not gone.intersection(weights) and all(available(w, node) for w in weights):
            found.append((_planned(call, match), call, match))
    return found


def _norm_of(call: DepthReadCall) -> NormMatch | None:
    """The norm that alone sees a read, None where there is no such norm, or the read holds one already."""
    read = call.output
    if read is None or call.normed_or_cast or not have_values(call.sources):
        return None
    match = match_norm(read, torch.float64 if call.source_dtype == torch.float64 else torch.float32)
    return match if match is not None and _stands_alone(call, read, match) else None


def _weights_of(match: NormMatch) -> list[Node]:
    """Weight and bias of a norm, where they are nodes."""
    return [w for w in (match.weight, match.bias) if isinstance(w, Node)]


def _planned(call: DepthReadCall, match: NormMatch) -> NormFusion:
    dtype: torch.dtype | None = known_tensor(match.out).dtype
    # A graph of torch functions has no dtypes of its own: its model may be cast later, and the result follows.
    if not is_aten(match.out) and dtype == call.source_dtype:
        dtype = None
    weight, bias = (w.name if isinstance(w, Node) else w for w in (match.weight, match.bias))
    modules = tuple(str(n.target) for n in match.nodes if n.op == "call_module")
    return NormFusion(call.node.name, match.out.name, match.kind, weight, bias, match.eps, dtype, modules)


def _stands_alone(call: DepthReadCall, read: Node, match: NormMatch) -> bool:
    """Whether the nodes of a norm can go: whoever else looks at them asks only for what a source knows too."""
    source = _stand_in(call, read)
    for node in match.nodes - {match.out}:
        for user in set(node.users) - match.nodes:
            if not asks_of(user, node):
                return False
            gone = not (set(user.users) - match.nodes)
            if not gone and (node is not read or source is None):
                return False
    return True


def _stand_in(call: DepthReadCall, read: Node) -> Node | None:
    """A source with the dtype of the read: shape, device and dtype may be asked of it instead."""
    return next((s for s in call.sources if known_tensor(s).dtype == known_tensor(read).dtype), None)


def _rewrite(gm: GraphModule, fusion: NormFusion, call: DepthReadCall, match: NormMatch) -> None:
    graph, read = gm.graph, call.output
    assert read is not None
    call = _refreshed(call)
    weights = []
    for given in (match.weight, match.bias):
        if isinstance(given, Node):
            move_before(given, call.node)
        elif given is not None:
            with graph.inserting_before(call.node):
                given = insert_attribute(graph, given, like=match.out, value=attrgetter(given)(gm))
        weights.append(given)
    eps = as_number(fusion.eps)
    epilogue: Epilogue[Node] = Epilogue(call.epilogue.delta, fusion.kind, weights[0], weights[1], eps, fusion.dtype)
    fused = replace(call, epilogue=epilogue)
    out, partial = fused.insert()
    out.meta.update({k: v for k, v in match.out.meta.items() if k not in ("val", "example_value")})
    match.out.replace_all_uses_with(out)
    _replace_partial(call, partial)
    _erase(call, read, match)


def _refreshed(call: DepthReadCall) -> DepthReadCall:
    """The call as the node stands now: what it takes may have been replaced since it was looked at."""
    now = as_depth_read(call.node)
    assert now is not None
    return now


def _replace_partial(call: DepthReadCall, partial: Node | None) -> None:
    for user in list(call.node.users):
        if call.node.target is not DEPTH_ATTENTION and op_name(user) == "getitem" and user.args[1] == 1:
            assert partial is not None
            user.replace_all_uses_with(partial)
            user.graph.erase_node(user)


def _erase(call: DepthReadCall, read: Node, match: NormMatch) -> None:
    graph, stand_in = read.graph, _stand_in(call, read)
    for node in sorted(match.nodes, reverse=True):
        for user in list(node.users):
            if user not in match.nodes and not user.users:
                graph.erase_node(user)
        if node is read and node.users:
            assert stand_in is not None
            node.replace_all_uses_with(stand_in)
        graph.erase_node(node)
    if not call.node._erased:
        graph.erase_node(call.node)
