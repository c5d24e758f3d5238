"""Regions of a graph that run inside a functorch transform (vmap, grad), as one call each.

A transform is switched on by one node and off by another, and what lies between belongs together: moved out, cut or
run in another order it would mean something else, or leave the transform on.
"""

import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from attnres_fx.capture.recorder import functorch_depth, restore_functorch
from attnres_fx.ops.dispatch import is_traced
from attnres_fx.passes.graph.result import PassResult

_ON = ("_vmap_increment_nesting", "_grad_increment_nesting", "_jvp_increment_nesting", "_saved_tensors_hooks_disable")
_OFF = ("_vmap_decrement_nesting", "_grad_decrement_nesting", "_jvp_decrement_nesting", "_saved_tensors_hooks_enable")


def outline_transforms_pass(gm: GraphModule) -> PassResult:
    """Make one call of each outermost region of functorch transforms, in place.

    Args:
        gm: A graph of torch functions, from Dynamo.

    Returns:
        The names of the new calls, as notes.
    """
    names = []
    for number, region in enumerate(list(_regions(gm.graph))):
        names.append(_outline(gm, region, f"transformed_{number}").name)
    if names:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(names), (), tuple(names))


def run_region(body: Any, *inputs: Any) -> Any:
    """The outputs of an outlined region; an exception leaves no transform on."""
    if is_traced():
        return body(*inputs)
    depth = functorch_depth()
    try:
        return body(*inputs)
    except BaseException:
        restore_functorch(depth)
        raise


def _regions(graph: Graph) -> Iterator[list[Node]]:
    depth = 0
    region: list[Node] = []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        depth += (name in _ON) - (name in _OFF)
        if depth > 0 or name in _OFF:
            region.append(node)
        if depth == 0 and region:
            yield region
            region = []


def _outline(gm: GraphModule, region: list[Node], name: str) -> Node:
    inside = set(region)
    inputs = list(dict.fromkeys(i for n in region for i in n.all_input_nodes if i not in inside))
    outputs = [n for n in region if any(u not in inside for u in n.users)]
    body = Graph()
    copies = {}
    for node in inputs:
        copies[node] = body.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in region:
        copies[node] = body.node_copy(node, lambda n: copies[n])
    body.output(tuple(copies[n] for n in outputs))
    setattr(gm, name, GraphModule(gm, body))
    after = region[-1].next
    with gm.graph.inserting_before(after):
        held = gm.graph.get_attr(name)
        call = gm.graph.call_function(run_region, (held, *inputs))
        call.meta = dict(region[-1].meta)
        call.meta["example_value"] = tuple(n.meta.get("example_value") for n in outputs)
        for i, node in enumerate(outputs):
            picked = gm.graph.call_function(operator.getitem, (call, i))
            picked.meta = dict(node.meta)
            node.replace_all_uses_with(picked, delete_user_cb=lambda user: user not in inside)
    for node in reversed(region):
        gm.graph.erase_node(node)
    return call
