"""Bring streams that higher-order operations hide back into the graph.

Before:
    out = wrap_with_autocast("cpu", torch.bfloat16, True, None, body, x)
After:
    mode = _enter_autocast("cpu", torch.bfloat16, True, None)
    ... the nodes of body ...
    _exit_autocast(mode)

Checkpointed bodies keep their effect as recompute tags; a `set_grad_enabled` region sets the mode and puts
back what it found. Other bodies with no addition of two tensors hide no stream and are left as they are.
"""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.emit import emit_switch
from attnres_fx.passes.graph.nodes import body_of
from attnres_fx.passes.graph.operation_table import Region, Trait
from attnres_fx.passes.graph.operations import has_trait, op_name, operation_of
from attnres_fx.passes.graph.result import PassResult


def inline_regions_pass(gm: GraphModule) -> PassResult:
    """Inline, in place, every region that may hide part of a stream.

    Args:
        gm: A module; values on the nodes of its graph and of the bodies stay.

    Returns:
        The module, and the names of the calls that are no longer there.
    """
    inlined: list[str] = []
    while (found := next(_hiding_regions(gm), None)) is not None:
        inlined.append(found[0].name)
        _inline(gm, *found)
    if inlined:
        gm.graph.lint()
    return PassResult(gm, bool(inlined), (), tuple(inlined))


def hidden_regions(graph_module: GraphModule) -> list[Node]:
    """Calls of higher-order operations with a body that could hide a stream and cannot be inlined."""
    nodes = graph_module.graph.nodes
    operations = [n for n in nodes if op_name(n).startswith("higher_order::") and _region(n) is None]
    return [n for n in operations if _bodies_with_additions(graph_module, n)]


def _region(node: Node) -> Region | None:
    operation = operation_of(node)
    return None if operation is None else operation.region


def _hiding_regions(gm: GraphModule) -> Iterator[tuple[Node, GraphModule, Region]]:
    for node in gm.graph.nodes:
        region = _region(node)
        if region is None or len(node.args) <= region.body:
            continue
        body = body_of(node.args[region.body], gm)
        # A region with a mode is inlined whatever it holds: Dynamo cannot trace it again once sizes are free in it.
        if body is not None and (has_trait(node, Trait.MODE_REGION) or _has_addition(body)):
            yield node, body, region


def _bodies_with_additions(gm: GraphModule, node: Node) -> bool:
    bodies = (body_of(a, gm) for a in node.args)
    return any(b is not None and _has_addition(b) for b in bodies)


def _has_addition(body: GraphModule) -> bool:
    for node in body.graph.nodes:
        if match_addition(node) is not None:
            return True
        if op_name(node).startswith("higher_order::") and _bodies_with_additions(body, node):
            return True
    return False


def _inline(gm: GraphModule, call: Node, body: GraphModule, region: Region) -> None:
    graph = gm.graph
    operands = call.args[region.operands :]
    mapping: dict[Node, Any] = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), operands, strict=True))
    result: Any = None
    with graph.inserting_before(call):
        leave = _enter(graph, call)
        for node in body.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                result = map_arg(node.args[0], lambda n: mapping[n])
                continue
            mapping[node] = _copied(gm, body, node, mapping, call)
            if region.recomputes and node.op in ("call_function", "call_method", "call_module"):
                _tag_recomputed(mapping[node], body)
        leave()
    _replace_outputs(call, result)
    graph.erase_node(call)


def _copied(gm: GraphModule, body: GraphModule, node: Node, mapping: dict[Node, Any], call: Node) -> Node:
    copied = gm.graph.node_copy(node, lambda n: mapping[n])
    copied.meta = dict(node.meta)
    if node.op in ("get_attr", "call_module"):
        copied.target = _adopt(gm, body, str(node.target), call.name)
    return copied


def _tag_recomputed(node: Node, body: GraphModule) -> None:
    node.meta.setdefault("recompute", torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE)
    node.meta.setdefault("ac_graph_id", id(body))


def _adopt(gm: GraphModule, body: GraphModule, target: str, owner: str) -> str:
    """Give an attribute of a body a place in the outer module; one that is already there keeps its name."""
    value = attrgetter(target)(body)
    try:
        if attrgetter(target)(gm) is value:
            return target
    except AttributeError:
        pass
    name = f"_{owner}_{target.replace('.', '_')}"
    setattr(gm, name, value)
    return name


def _enter(graph: Graph, call: Node) -> Callable[[], object]:
    """Insert what starts a region; returns what inserts its end."""
    name = op_name(call)
    if name == "higher_order::wrap_with_autocast":
        mode = emit_switch(graph, "_enter_autocast", call.args[:4], like=call)
        return lambda: emit_switch(graph, "_exit_autocast", (mode,), like=call)
    if name == "higher_order::wrap_with_set_grad_enabled":
        before = emit_switch(graph, "is_grad_enabled", (), like=call)
        emit_switch(graph, "_set_grad_enabled", (call.args[0],), like=call)
        return lambda: emit_switch(graph, "_set_grad_enabled", (before,), like=call)
    return lambda: None


def _replace_outputs(call: Node, result: Any) -> None:
    if not isinstance(result, tuple | list):
        call.replace_all_uses_with(result)
        return
    for user in list(call.users):
        if op_name(user) != "getitem":
            raise AssertionError(f"{user} takes the whole result of {call}")
        picked: Any = result[int(user.args[1])]  # type: ignore[arg-type]
        if isinstance(picked, Node):
            user.replace_all_uses_with(picked)
        user.graph.erase_node(user)
