"""Put regions that backward recomputes into checkpoints again, cut where the stream is read.

Before, with tags on all but the reads:
    r1 = depth_attention([h0], ...)
    a = attention(norm_1(r1))
    r2 = depth_attention([h0, a], ...)
    f = mlp(norm_2(r2))
After:
    r1 = depth_attention([h0], ...)
    a = checkpoint(body_1, r1, weights, use_reentrant=False)
    r2 = depth_attention([h0, a], ...)
    f = checkpoint(body_2, r2, weights, use_reentrant=False)

A compiler takes the tags, and a graph that runs by itself takes no notice of them. A read is not recomputed: it saves
its sources, which are kept for later reads in any case.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.checkpoint import checkpoint

from attnres_fx.passes.graph.nodes import copy_meta, set_value, value_of
from attnres_fx.passes.graph.operations import is_random, op_name, switches_mode, writes_in_place
from attnres_fx.passes.graph.result import PassResult

_TAGS = ("recompute", "ac_graph_id")


def outline_recomputed_pass(gm: GraphModule) -> PassResult:
    """Outline, in place, what is tagged as recomputed, and take the tags away.

    Args:
        gm: A rewritten module; its reads and regions have tags where they stood in a checkpoint.

    Returns:
        The names of the checkpoints, and those of the nodes that are inside them now.
    """
    made, moved = [], []
    for region in _regions(gm.graph):
        nodes, before = region
        if _is_worth_it(nodes):
            moved += [n.name for n in nodes]
            made.append(_outline(gm, nodes, before).name)
    for node in gm.graph.nodes:
        for tag in _TAGS:
            node.meta.pop(tag, None)
    if made:
        gm.graph.lint()
    return PassResult(gm, bool(made), tuple(made), tuple(moved))


def _regions(graph: Graph) -> list[tuple[list[Node], Node]]:
    """Runs of tagged nodes, each with the node before which the whole run may stand."""
    found: list[tuple[list[Node], Node]] = []
    run: list[Node] = []
    for node in list(graph.nodes):
        joins = _is_recomputed(node) and (not run or _region_of(node) == _region_of(run[0]))
        if run and not joins and _ends(node, run):
            found.append((run, node))
            run = []
        if _is_recomputed(node) and (joins or not run):
            run.append(node)
    return found


def _is_recomputed(node: Node) -> bool:
    calls = node.op in ("call_function", "call_method", "call_module")
    return calls and "recompute" in node.meta and not op_name(node).startswith("attnres_fx::")


def _region_of(node: Node) -> Any:
    return node.meta.get("ac_graph_id")


def _ends(node: Node, run: Sequence[Node]) -> bool:
    """Whether a run must be over before a node: it takes of it, reads the stream, or does what has its order."""
    if node.op in ("get_attr", "placeholder"):
        return False
    if node.op == "output" or _is_recomputed(node) or op_name(node).startswith("attnres_fx::"):
        return True
    ordered = is_random(node) or writes_in_place(node) or (node.op == "call_function" and switches_mode(node))
    return ordered or any(n in run for n in node.all_input_nodes)


def _is_worth_it(nodes: Sequence[Node]) -> bool:
    """Whether a run saves something, and can stand in a body: a mode that it enters is left in it."""
    switches = [n for n in nodes if n.op == "call_function" and switches_mode(n)]
    inside = set(nodes)
    if any(op_name(n) == "_exit_autocast" and n.args[0] not in inside for n in switches):
        return False
    entered = [n for n in switches if op_name(n) == "_enter_autocast"]
    if any(not any(u in inside for u in n.users) for n in entered):
        return False
    return sum(op_name(n) == "_set_grad_enabled" for n in switches) % 2 == 0 and len(nodes) - len(switches) > 1


def _outline(gm: GraphModule, nodes: list[Node], before: Node) -> Node:
    graph, inside = gm.graph, set(nodes)
    inputs = list(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    results = [n for n in nodes if any(u not in inside for u in n.users)]
    body = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = body.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = body.node_copy(node, lambda n: copies[n])
        copies[node].meta = {k: v for k, v in node.meta.items() if k not in _TAGS}
    body.output(map_arg(tuple(results), lambda n: copies[n]))
    name = _free_name(gm)
    gm.add_module(name, GraphModule(gm, body))
    with graph.inserting_before(before):
        held = graph.get_attr(name)
        call = graph.create_node("call_function", checkpoint, (held, *inputs), {"use_reentrant": False})
        copy_meta(call, nodes[0])
        set_value(call, tuple(value_of(n) for n in results), nodes[-1])
        picked = [graph.create_node("call_function", operator.getitem, (call, i)) for i in range(len(results))]
    for node, result in zip(results, picked, strict=True):
        copy_meta(result, node)
        set_value(result, value_of(node), node)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)
    return call


def _free_name(gm: torch.nn.Module) -> str:
    taken = dict(gm.named_children())
    return next(n for i in range(len(taken) + 1) if (n := f"_recomputed_{i}") not in taken)
