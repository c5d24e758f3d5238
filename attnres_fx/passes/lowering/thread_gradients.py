"""Let reads take their sources from the reads before them, so that backward adds gradients inside the kernels.

Before:
    r1 = depth_attention([v0, v1], q1, k1, eps, 2)
    r2 = depth_attention([v0, v1, v2], q2, k2, eps, 3)
After:
    r1, v0', v1' = depth_attention_threaded([v0, v1], q1, k1, eps, 2, None, 0, None, None, 0.0, None)
    r2 = depth_attention([v0', v1', v2], q2, k2, eps, 3)

The values are views of what they were. Autograd's own sum would read two gradients and write one for every source and
read; inside the kernel it is one access more.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch.fx import GraphModule, Node

from attnres_fx.ops.phases import DEPTH_ATTENTION_BATCH
from attnres_fx.ops.threaded import DEPTH_ATTENTION_THREADED
from attnres_fx.passes.graph.nodes import insert_call, nodes_without_gradients
from attnres_fx.passes.graph.operations import writes_in_place
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.lowering.read_calls import (
    DepthReadCall,
    as_depth_read,
    have_values,
    insert_outputs,
    known,
)

#: Under `"auto"` only reads on such a device are threaded: its kernels add the gradients.
AUTO_DEVICE = "cuda"


@dataclass(frozen=True)
class Thread:
    """A read that hands on sources: the names of its node and of the sources that a later read takes."""

    read: str
    handed_on: tuple[str, ...]


def thread_gradients_pass(gm: GraphModule, *, choose: bool | Literal["auto"] = "auto") -> PassResult:
    """Thread sources through reads, in place; `replaced` holds a Thread for each read that hands any on.

    choose: True, or `"auto"` for reads on a CUDA device, whose kernels add what comes in.
    """
    plan = plan_threads(gm, choose)
    handing = {t.read: t for t in plan}
    latest: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        sources = _sources(node)
        if not sources or not plan:
            continue
        taken = [latest.get(s, s) for s in sources]
        if node.name in handing:
            _hand_on(node, sources, taken, set(handing[node.name].handed_on), latest)
        else:
            node.args = (taken, *node.args[1:])
    return PassResult(gm, bool(plan), plan, ())


def plan_threads(gm: GraphModule, choose: bool | Literal["auto"]) -> tuple[Thread, ...]:
    """What `thread_gradients_pass` will do, as data."""
    if any(writes_in_place(n) for n in gm.graph.nodes):
        return ()  # what writes to a source in place would write to a view that a read returned
    reads = [(n, s) for n in gm.graph.nodes if (s := _sources(n))]
    frozen = nodes_without_gradients(gm.graph)
    plan = []
    for place, (node, sources) in enumerate(reads):
        call = as_depth_read(node)
        # Under recomputation a view handed out of the region would run the read twice.
        if call is None or node in frozen or "recompute" in node.meta or call.output is None:
            continue
        if choose == "auto" and known(sources[0]).device.type != AUTO_DEVICE:
            continue
        later = {s for _, taken in reads[place + 1 :] for s in taken}
        again = sources[:-1] if call.epilogue.delta is not None else sources
        handed_on = tuple(dict.fromkeys(s.name for s in again if s in later))
        if handed_on:
            plan.append(Thread(node.name, handed_on))
    return tuple(plan)


def _sources(node: Node) -> list[Node]:
    """The sources of a read or of a phase 1; none for every other node, merges among them."""
    if node.target is DEPTH_ATTENTION_BATCH:
        given = node.args[0]
        assert isinstance(given, list | tuple)
        return [s for s in given if isinstance(s, Node)] if have_values(given) else []
    call = as_depth_read(node)
    return call.sources if call is not None and not call.merge and have_values(call.sources) else []


def _hand_on(
    node: Node, sources: Sequence[Node], taken: Sequence[Node], names: set[str], latest: dict[Node, Node]
) -> None:
    call = as_depth_read(node)
    assert call is not None and call.output is not None
    threaded = replace(call, head=(list(taken), *call.head[1:]))
    outputs = 1 if call.epilogue.delta is None else 2
    again = list(sources[:-1] if call.epilogue.delta is not None else sources)
    with node.graph.inserting_before(node):
        made, call_node = _insert(threaded, [known(s) for s in again])
        for place, source in enumerate(again):
            if source.name in names:
                value = known(source)
                args = (call_node, outputs + place)
                latest[source] = insert_call(node.graph, operator.getitem, args, like=node, value=value)
    old = [call.output]
    if call.epilogue.delta is not None:
        old += [u for u in node.users if u.args[1:] == (1,)]
    for before, after in zip(old, made, strict=False):
        after.meta.update({k: v for k, v in before.meta.items() if k not in ("val", "example_value")})
        before.replace_all_uses_with(after)
    for gone in (*old, node):
        if not gone._erased and not gone.users:
            node.graph.erase_node(gone)


def _insert(call: DepthReadCall, again: Sequence[object]) -> tuple[list[Node], Node]:
    values = [*call.values(), *again]
    target = DEPTH_ATTENTION_THREADED
    made = insert_outputs(
        call.node.graph, target, call.arguments, like=call.node, values=values, taken=len(call.values())
    )
    return made, made[0].all_input_nodes[0]
