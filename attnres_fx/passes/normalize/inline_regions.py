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

from operator import attrgetter
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.nodes import copy_meta
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, op_name
from attnres_fx.passes.graph.result import PassResult

_REGIONS = {
    "higher_order::wrap_with_set_grad_enabled": 1,
    "higher_order::wrap_with_autocast": 4,
    "higher_order::invoke_subgraph": 0,
    "higher_order::tag_activation_checkpoint": 0,
    "higher_order::wrap": 0,
}


def inline_regions_pass(gm: GraphModule) -> PassResult:
    """Inline, in place, every region that may hide part of a stream."""
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
    operations = [n for n in nodes if op_name(n).startswith("higher_order::") and op_name(n) not in _REGIONS]
    return [n for n in operations if _bodies_with_additions(graph_module, n)]


def _hiding_regions(gm: GraphModule) -> Any:
    for node in gm.graph.nodes:
        position = _REGIONS.get(op_name(node))
        if position is None or len(node.args) <= position:
            continue
        body = _body(gm, node.args[position])
        # A region with a mode is inlined whatever it holds: Dynamo cannot trace it again once sizes are free in it.
        if body is not None and (has_trait(node, Trait.MODE_REGION) or _has_addition(body)):
            yield node, body, position


def _body(gm: GraphModule, argument: Any) -> GraphModule | None:
    if isinstance(argument, Node) and argument.op == "get_attr":
        found = attrgetter(str(argument.target))(gm)
        return found if isinstance(found, GraphModule) else None
    return None


def _bodies_with_additions(gm: GraphModule, node: Node) -> bool:
    bodies = (_body(gm, a) for a in node.args)
    return any(b is not None and _has_addition(b) for b in bodies)


def _has_addition(body: GraphModule) -> bool:
    for node in body.graph.nodes:
        if match_addition(node) is not None:
            return True
        if op_name(node).startswith("higher_order::") and _bodies_with_additions(body, node):
            return True
    return False


def _inline(gm: GraphModule, call: Node, body: GraphModule, position: int) -> None:
    graph = gm.graph
    operands = call.args[position + 1 :]
    if op_name(call) == "higher_order::invoke_subgraph":
        operands = call.args[2:]
    mapping: dict[Node, Any] = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), operands, strict=True))
    result: Any = None
    with graph.inserting_before(call):
        leave = _enter(gm, call)
        for node in body.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                result = map_arg(node.args[0], lambda n: mapping[n])
                continue
            mapping[node] = _copied(gm, body, node, mapping, call)
        leave()
    _replace_outputs(call, result)
    graph.erase_node(call)


def _copied(gm: GraphModule, body: GraphModule, node: Node, mapping: dict[Node, Any], call: Node) -> Node:
    copied = gm.graph.node_copy(node, lambda n: mapping[n])
    copied.meta = dict(node.meta)
    if node.op in ("get_attr", "call_module"):
        copied.target = _adopt(gm, body, str(node.target), call.name)
    if op_name(call) == "higher_order::tag_activation_checkpoint" and node.op == "call_function":
        copied.meta.setdefault("recompute", torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE)
        copied.meta.setdefault("ac_graph_id", id(body))
    return copied


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


def _enter(gm: GraphModule, call: Node) -> Any:
    """Insert the call that starts a region; returns what inserts the call that ends it."""
    graph, name = gm.graph, op_name(call)

    def insert(target: Any, args: tuple[Any, ...]) -> Node:
        node = graph.call_function(target, args)
        copy_meta(node, call)
        return node

    if name == "higher_order::wrap_with_autocast":
        mode = insert(torch.amp.autocast_mode._enter_autocast, tuple(call.args[:4]))
        return lambda: insert(torch.amp.autocast_mode._exit_autocast, (mode,))
    if name == "higher_order::wrap_with_set_grad_enabled":
        before = insert(torch.is_grad_enabled, ())
        insert(torch._C._set_grad_enabled, (call.args[0],))
        return lambda: insert(torch._C._set_grad_enabled, (before,))
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
