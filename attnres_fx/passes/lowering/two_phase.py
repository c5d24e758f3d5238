"""Compute what the reads of a block share once: one batched read of the completed sources, then a merge a read.

Before (block variant, the reads of one block):
    r1 = depth_attention([v0, b1], q1, k1, eps, 2)
    r2 = depth_attention([v0, b1, p1], q2, k2, eps, 3)
    p2 = p1 + v2
    r3 = depth_attention([v0, b1, p2], q3, k3, eps, 3)
After:
    m1, m2, m3, l1, l2, l3 = depth_attention_batch([v0, b1], [q1, q2, q3], [k1, k2, k3], eps)
    r1 = m1 * 2
    r2 = depth_attention_merge(m2, l2, p1, q2, k2, eps, 3, ...)[0]
    p2 = p1 + v2
    r3 = depth_attention_merge(m3, l3, p2, q3, k3, eps, 3, ...)[0]

Exact. Source: arXiv 2603.15031, section 4 (two-phase computation).
"""

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from attnres_fx.ops.epilogue import Epilogue
from attnres_fx.ops.kernels import batches
from attnres_fx.ops.operator import DEPTH_ATTENTION
from attnres_fx.ops.phases import DEPTH_ATTENTION_BATCH, DEPTH_ATTENTION_MERGE
from attnres_fx.passes.graph.additions import match_addition
from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import fake_like, nodes_without_gradients, tensor_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, op_name, writes_in_place
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.lowering.block_cost import MEMORY_SHARE, BlockReads, PhaseChoice, choose_phases
from attnres_fx.passes.lowering.fuse_partial_sums import foldable
from attnres_fx.passes.lowering.read_calls import (
    OPERATORS,
    as_depth_read,
    available,
    have_values,
    insert_outputs,
    known_tensor,
    move_before,
)
from attnres_fx.passes.lowering.saved_estimate import saved_activations_between

log = logging.getLogger("attnres_fx.passes")


@dataclass(frozen=True)
class PhasePlan:
    """The reads of one block and the form they get.

    Args:
        reads: The nodes of the reads, by name.
        completed: The sources that they share, by name.
        choice: The form, and what it costs.
    """

    reads: tuple[str, ...]
    completed: tuple[str, ...]
    choice: PhaseChoice


def two_phase_pass(
    gm: GraphModule,
    *,
    choose: Literal["auto", True] = "auto",
    training: bool = True,
    memory_share: float = MEMORY_SHARE,
) -> PassResult:
    """Rewrite, in place, the blocks for which two phases are chosen.

    Args:
        gm: A module with values on the nodes of its graph. One that holds fused reads already is left as it is.
        choose: `"auto"` for the cheaper form of each block, True for two phases wherever reads share sources.
        training, memory_share: As for `choose_phases`.

    Returns:
        The module; `replaced` holds a PhasePlan for each block.
    """
    plans = plan_phases(gm, choose=choose, training=training, memory_share=memory_share)
    nodes = {n.name: n for n in gm.graph.nodes}
    removed: list[str] = []
    for plan in plans:
        row = known_tensor(nodes[plan.completed[0]])
        size = int(row.shape[-1]) * row.element_size()
        log.info("two_phase_pass: block of %s with %s", plan.reads[0], plan.choice.to_text(size))
        if plan.choice.two_phase:
            _rewrite(gm, [nodes[name] for name in plan.reads], len(plan.completed))
            removed += plan.reads
    return PassResult(gm, bool(removed), plans, tuple(removed))


def plan_phases(
    gm: GraphModule,
    *,
    choose: Literal["auto", True] = "auto",
    training: bool = True,
    memory_share: float = MEMORY_SHARE,
) -> tuple[PhasePlan, ...]:
    """What `two_phase_pass` would do, as data.

    Args:
        gm: A module with values on the nodes of its graph; it is left as it is.
        choose: As for `two_phase_pass`, and so are `training` and `memory_share`.
        training: Whether backward counts too.
        memory_share: How much phase-1 outputs may keep, as a share of what the block keeps anyway.

    Returns:
        A PhasePlan for each block whose reads share sources; none where the graph holds fused reads already.
    """
    if any(n.target in OPERATORS - {DEPTH_ATTENTION} for n in gm.graph.nodes):
        return ()
    plans = []
    for completed, reads in _blocks(gm):
        block = _counted(completed, reads)
        choice = choose_phases(block, training=training, memory_share=memory_share)
        if choose is True:
            choice = PhaseChoice(True, block, choice.per_read, choice.phased, choice.live, "asked for")
        elif choice.two_phase and any("recompute" in r.meta for r in reads):
            why = "the reads are recomputed in backward"
            choice = PhaseChoice(False, block, choice.per_read, choice.phased, choice.live, why)
        plans.append(PhasePlan(tuple(r.name for r in reads), tuple(s.name for s in completed), choice))
    return tuple(plans)


# --- finding blocks ----------------------------------------------------------------------------------


def _blocks(gm: GraphModule) -> Iterator[tuple[tuple[Node, ...], list[Node]]]:
    """Completed sources and reads of every block in which a partial sum grows, in graph order.

    Not those with a bias for each source, which would have to be taken apart with the sources.
    """
    frozen = nodes_without_gradients(gm.graph)
    calls = [c for n in gm.graph.nodes if n.target is DEPTH_ATTENTION and (c := as_depth_read(n)) is not None]
    reads = [c.node for c in calls if c.style.bias is None and have_values(c.sources)]
    seen_by: dict[Any, list[Node]] = defaultdict(list)

    def key(read: Node, shared: tuple[Node, ...]) -> Any:
        return shared, read.args[3], read in frozen, read.args[2] is None, read.args[5:]

    begins = {key(r, _sources(r)[:-1]) for r in reads}
    for read in reads:
        sources = _sources(read)
        # A read at a boundary begins a block: it sees completed sources only.
        shared = sources if key(read, sources) in begins else sources[:-1]
        if shared:
            seen_by[key(read, shared)].append(read)
    for (shared, *_), members in seen_by.items():
        kept = _together(gm, members)
        if len(kept) > 1 and _grows(shared, members, reads):
            yield shared, kept


def _sources(read: Node) -> tuple[Node, ...]:
    return tuple(read.args[0])  # type: ignore[arg-type]


def _grows(shared: tuple[Node, ...], members: list[Node], reads: list[Node]) -> bool:
    """Whether the last source of a read is a partial sum: added to, it stands after the same sources again."""
    count = len(shared) + 1
    later = {s[count - 1] for r in reads if len(s := _sources(r)) >= count and s[: count - 1] == shared}
    partials = {_sources(m)[-1] for m in members if len(_sources(m)) == count}
    return any(added in later for p in partials for added in _sums_from(p))


def _sums_from(node: Node) -> Iterator[Node]:
    for user in node.users:
        if match_addition(user) is not None:
            yield user
        elif has_trait(user, Trait.CAST):
            yield from (u for u in user.users if match_addition(u) is not None)


def _together(gm: GraphModule, members: list[Node]) -> list[Node]:
    """The members whose parameters are there at the first of them, with nothing written to any tensor in between."""
    first = members[0]
    barriers = [n for n in gm.graph.nodes if writes_in_place(n)]
    kept = []
    for read in members:
        parameters = [n for n in (read.args[1], read.args[2]) if isinstance(n, Node)]
        if any(first < b < read for b in barriers):
            continue
        if all(available(p, first) for p in parameters):
            kept.append(read)
    return kept


def _counted(completed: tuple[Node, ...], reads: list[Node]) -> BlockReads:
    count = len(completed)
    alone = [r for r in reads if len(_sources(r)) == count]
    merged = [r for r in reads if r not in alone]
    return BlockReads(
        completed=count,
        merged=len(merged),
        folded=sum(_folds(r) for r in merged),
        alone=len(alone),
        folded_alone=sum(_folds(r) for r in alone),
        saved=saved_activations_between(reads[0], reads[-1]) * len(reads) / max(len(reads) - 1, 1),
        batched=batches([known_tensor(s) for s in completed]),
    )


def _folds(read: Node) -> bool:
    call = as_depth_read(read)
    return call is not None and foldable(call) is not None


# --- rewriting ---------------------------------------------------------------------------------------


def _rewrite(gm: GraphModule, reads: list[Node], count: int) -> None:
    graph, first = gm.graph, reads[0]
    shared = list(_sources(first)[:count])
    for parameter in (p for r in reads for p in r.args[1:3]):
        if isinstance(parameter, Node):
            move_before(parameter, first)
    value = known_tensor(shared[0])
    out = fake_like(value, _promoted(shared))
    held = torch.float64 if out.dtype == torch.float64 else torch.float32
    row = fake_like(value, held)[..., 0]
    gains = [r.args[2] for r in reads if r.args[2] is not None]
    args = (shared, [r.args[1] for r in reads], gains, first.args[3], *first.args[5:])
    with graph.inserting_before(first):
        values = [out] * len(reads) + [row] * len(reads)
        outputs = insert_outputs(graph, DEPTH_ATTENTION_BATCH, args, like=first, values=values)
    unused = []
    for read, mixed, lse in zip(reads, outputs[: len(reads)], outputs[len(reads) :], strict=True):
        alone = len(_sources(read)) == count
        result = _scaled(read, mixed) if alone else _merged(read, mixed, lse)
        unused += [lse] if alone else []
        result.meta.update({k: v for k, v in read.meta.items() if k not in ("val", "example_value")})
        read.replace_all_uses_with(result)
        graph.erase_node(read)
    for node in unused:
        graph.erase_node(node)


def _promoted(nodes: list[Node]) -> torch.dtype:
    dtype = known_tensor(nodes[0]).dtype
    for node in nodes[1:]:
        dtype = torch.promote_types(dtype, known_tensor(node).dtype)
    return dtype


def _scaled(read: Node, mixed: Node) -> Node:
    gain = read.args[4]
    if gain == 1.0:
        return mixed
    with read.graph.inserting_before(read):
        return emit(read.graph, "mul", (mixed, gain), like=read, value=tensor_of(mixed), dialect=_dialect_node(read))


def _dialect_node(read: Node) -> Node:
    """A node that shows which dialect the graph is written in; a read does not, since it is one operator in all."""
    own = (n for n in read.graph.nodes if n.op == "call_function" and n.target not in OPERATORS)
    return next((n for n in own if op_name(n) not in ("getitem", "getattr")), read)


def _merged(read: Node, mixed: Node, lse: Node) -> Node:
    _, query, key_weight, eps, gain, *style = read.args
    partial = _sources(read)[-1]
    value = fake_like(known_tensor(mixed), _promoted([mixed, partial]))
    args = (mixed, lse, partial, query, key_weight, eps, gain, *Epilogue().to_arguments(), *style)
    with read.graph.inserting_before(read):
        return insert_outputs(read.graph, DEPTH_ATTENTION_MERGE, args, like=read, values=[value])[0]
