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
    known_tensor,
)

#: Under `"auto"` only reads on such a device are threaded: its kernels add the gradients.
AUTO_DEVICE = "cuda"


@dataclass(frozen=True)
class Thread:
    """A read that hands on sources.

    Args:
        read: The node of the read.
        handed_on: The sources that a later read takes from it, by name.
    """

    read: str
    handed_on: tuple[str, ...]


def thread_gradients_pass(gm: GraphModule, *, choose: bool | Literal["auto"] = "auto") -> PassResult:
    """Thread sources through reads, in place.

    Args:
        gm: A module with values on the nodes of its graph.
        choose: True, or `"auto"` for reads on a CUDA device alone: its kernels add up gradients.

    Returns:
        The module; `replaced` holds a Thread for each read that hands sources on.
    """
    plan = plan_threads(gm, choose)
    threads = {t.read: t for t in plan}
    latest: dict[Node, Node] = {}  # by source: the view of it that the last read returned
    planned: dict[Node, str] = {}  # by output of a threaded read: the name of the output in whose place it is
    for node in list(gm.graph.nodes):
        sources = _sources(node)
        if not sources or not plan:
            continue
        views = [latest.get(s, s) for s in sources]
        if node.name in threads:
            handed_on = [s for s in sources if planned.get(s, s.name) in threads[node.name].handed_on]
            latest |= _thread(node, sources, views, handed_on, planned)
        else:
            node.args = (views, *node.args[1:])
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
        if call is None or node in frozen or not _may_return_sources(call, sources, choose):
            continue
        later = {s for _, sources_after in reads[place + 1 :] for s in sources_after}
        handed_on = tuple(dict.fromkeys(s.name for s in _returned(call, sources) if s in later))
        if handed_on:
            plan.append(Thread(node.name, handed_on))
    return tuple(plan)


def _may_return_sources(call: DepthReadCall, sources: Sequence[Node], choose: bool | Literal["auto"]) -> bool:
    # Under recomputation a view handed out of the region would run the read twice.
    if "recompute" in call.node.meta or call.output is None:
        return False
    return choose != "auto" or known_tensor(sources[0]).device.type == AUTO_DEVICE


def _returned(call: DepthReadCall, sources: Sequence[Node]) -> Sequence[Node]:
    """The sources that a threaded read returns: not the last one, where a delta is added to it."""
    return sources if call.epilogue.delta is None else sources[:-1]


def _sources(node: Node) -> list[Node]:
    """The sources of a read or of a phase 1; none for every other node, merges among them."""
    if node.target is DEPTH_ATTENTION_BATCH:
        sources = node.args[0]
        assert isinstance(sources, list | tuple)
        return [s for s in sources if isinstance(s, Node)] if have_values(sources) else []
    call = as_depth_read(node)
    return call.sources if call is not None and not call.merge and have_values(call.sources) else []


def _thread(
    node: Node, sources: Sequence[Node], views: Sequence[Node], handed_on: Sequence[Node], planned: dict[Node, str]
) -> dict[Node, Node]:
    """Put a threaded read in place of a read.

    Args:
        node: the read.
        sources: what it read before any read was threaded.
        views: what it reads now: the views that earlier reads return.
        handed_on: the sources that later reads take from this one.
        planned: gets the name that the plan knows each new output by.

    Returns:
        The views that stand for those sources from here on.
    """
    call = as_depth_read(node)
    assert call is not None
    outputs, returned = call.values(), _returned(call, sources)
    threaded_call = replace(call, head=(list(views), *call.head[1:]))
    latest: dict[Node, Node] = {}
    with node.graph.inserting_before(node):
        first, *partial = insert_outputs(
            node.graph,
            DEPTH_ATTENTION_THREADED,
            threaded_call.arguments,
            like=node,
            values=[*outputs, *(known_tensor(s) for s in returned)],
            taken=len(outputs),
        )
        (threaded_read,) = first.all_input_nodes
        for i, source in enumerate(returned, len(outputs)):
            if source in handed_on:
                view = insert_call(
                    node.graph, operator.getitem, (threaded_read, i), like=node, value=known_tensor(source)
                )
                latest[source] = view
    _replace_outputs(call, [first, *partial], planned)
    return latest


def _replace_outputs(call: DepthReadCall, outputs: Sequence[Node], planned: dict[Node, str]) -> None:
    """Let the users of a read, and of its partial sum, take these instead; erase what nobody uses any more."""
    assert call.output is not None
    old = [call.output]
    if call.epilogue.delta is not None:
        old += [u for u in call.node.users if u.args[1:] == (1,)]
    for before, after in zip(old, outputs, strict=False):
        after.meta.update({k: v for k, v in before.meta.items() if k not in ("val", "example_value")})
        before.replace_all_uses_with(after)
        planned[after] = before.name
    for unused in (*old, call.node):
        if not unused._erased and not unused.users:
            unused.graph.erase_node(unused)
