"""A chain of sublayers, divided among virtual stages: which stage computes what, and which values leave it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from attnres_fx.errors import PlanError
from attnres_fx.partition.split.chain import Chain
from attnres_fx.partition.split.input_sizes import Symbols, symbols_of
from attnres_fx.partition.split.routes import StageValue
from attnres_fx.partition.split.value_bytes import size_in_bytes
from attnres_fx.passes.graph.mutation_order import Writes
from attnres_fx.passes.graph.nodes import describe, nodes_without_gradients, tensor_of, value_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, op_name


@dataclass(frozen=True, eq=False)
class Split:
    """One mode's graph divided among virtual stages.

    Attributes:
        gm: holds what the graph takes its attributes from.
        chain: the graph in order of its sublayers.
        starts: first sublayer of every virtual stage.
        stage: the virtual stage of each node.
        values: what leaves a stage, in graph order.
        nodes: the node of each value, by name.
        repeated: by stage, views and casts that it makes again from a value it has.
    """

    gm: GraphModule
    chain: Chain
    starts: tuple[int, ...]
    stage: Mapping[Node, int]
    values: tuple[StageValue, ...]
    nodes: Mapping[str, Node]
    repeated: Mapping[int, frozenset[Node]]

    @property
    def num_stages(self) -> int:
        return len(self.starts)

    @property
    def symbols(self) -> Symbols:
        return symbols_of(self.chain.graph)


def split_chain(gm: GraphModule, chain: Chain, starts: Sequence[int], labels: Mapping[str, str]) -> Split:
    """Divide a chain at the sublayers where stages after the first begin.

    Args:
        gm: holds what the graph takes its attributes from.
        chain: the graph in order of its sublayers.
        starts: first sublayer of every virtual stage, the first 0.
        labels: what nodes are to a reader, by name.

    Raises:
        PlanError: a value that cannot travel, or a buffer that two stages share and one writes.
    """
    stage = {n: _stage_of(u, starts, chain.num_sublayers) for n, u in chain.unit.items()}
    used = _later_stages(chain.graph, stage, last=len(starts) - 1)
    repeated = _repeated(chain.graph, stage, used)
    cut = [n for n in chain.graph.nodes if used.get(n)]
    for node in cut:
        _require_tensor(node, stage[node], min(used[node]))
    _refuse_shared_state(gm, chain, stage)
    with_gradient = _with_gradient(gm, chain.writes)
    values = tuple(
        StageValue(
            n.name,
            stage[n],
            tuple(sorted(used[n])),
            size_in_bytes(n),
            n in with_gradient,
            labels.get(n.name, n.name),
        )
        for n in cut
    )
    return Split(gm, chain, tuple(starts), stage, values, {n.name: n for n in cut}, repeated)


def _later_stages(graph: Graph, stage: Mapping[Node, int], last: int) -> dict[Node, set[int]]:
    """The later stages that use each node."""
    later: dict[Node, set[int]] = {}
    for node in graph.nodes:
        if node in stage:
            at = {last if u.op == "output" else stage[u] for u in node.users if u.op == "output" or u in stage}
            later[node] = {t for t in at if t > stage[node]}
    return later


def _require_tensor(node: Node, produced: int, used: int) -> None:
    if not isinstance(value_of(node), torch.Tensor):
        raise PlanError(
            f"{describe(node)} is made in virtual stage {produced} and needed in {used}, but it is no tensor "
            f"({type(value_of(node)).__name__}), and only tensors travel: move the stage boundary, or compute it "
            f"from the model's inputs."
        )


def refuse_empty_stages(split: Split) -> None:
    """Raises PlanError where a stage would compute nothing: streams that wait for each other can leave one so."""
    filled = set(split.stage.values())
    for c, start in enumerate(split.starts):
        if c not in filled:
            raise PlanError(
                f"virtual stage {c} would be empty: what sublayer {start} ({split.chain.names[start]}) computes waits "
                f"for a later one. Give `starts` that join it to a neighbour, or fewer stages."
            )


def _stage_of(unit: int, starts: Sequence[int], count: int) -> int:
    unit = min(max(unit, 0), count - 1)
    return sum(s <= unit for s in starts) - 1


def _repeated(graph: Graph, stage: Mapping[Node, int], used: dict[Node, set[int]]) -> dict[int, frozenset[Node]]:
    """Views and casts of values that travel anyway are made again where they are needed, not sent beside them.

    Takes what they save out of `used`.
    """
    repeated: dict[int, set[Node]] = {}
    for node in graph.nodes:  # a view of a view follows what it views
        base = viewed_value(node)
        if base is None or base not in stage or not used.get(node):
            continue
        for at in sorted(used[node]):
            has_base = at in used[base] or base in repeated.get(at, ())
            if has_base and all(i is base or i not in stage or stage[i] == at for i in node.all_input_nodes):
                used[node].discard(at)
                repeated.setdefault(at, set()).add(node)
    return {at: frozenset(nodes) for at, nodes in repeated.items()}


def viewed_value(node: Node) -> Node | None:
    """What a view or a cast is of."""
    shows = has_trait(node, Trait.CAST | Trait.RESHAPE | Trait.TOKEN_MOVE) or op_name(node) == "detach"
    if not shows or not node.args:
        return None
    base = node.args[0]
    return base if isinstance(base, Node) and tensor_of(base) is not None and tensor_of(node) is not None else None


def _refuse_shared_state(gm: GraphModule, chain: Chain, stage: Mapping[Node, int]) -> None:
    """A buffer that one stage writes and another uses would be two buffers."""
    written: dict[str, set[int]] = {}
    held: dict[str, set[int]] = {}
    for node, at in stage.items():
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                held.setdefault(str(source.target), set()).add(at)
        for owner in chain.writes.targets.get(node, ()):
            if owner.op == "get_attr":
                written.setdefault(str(owner.target), set()).add(at)
    for name in written:
        if len(held[name]) > 1:
            raise PlanError(
                f"the buffer {name!r} is written in virtual stage {min(written[name])} and used in "
                f"{', '.join(map(str, sorted(held[name])))}: one stage must hold it. Choose boundaries that keep them "
                f"together."
            )


def _with_gradient(gm: GraphModule, writes: Writes) -> frozenset[Node]:
    """Nodes through which gradients flow, if all parameters take one."""
    frozen = nodes_without_gradients(gm.graph)
    with_gradient: set[Node] = set()
    while True:
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                if isinstance(attrgetter(str(node.target))(gm), nn.Parameter):
                    with_gradient.add(node)
            elif node not in frozen and _takes_gradients(node) and any(i in with_gradient for i in writes.inputs(node)):
                with_gradient.add(node)
        # What a gradient flows into by a write has one, and so has all that looks at it.
        written = {
            o for w, owners in writes.targets.items() if w in with_gradient for o in owners if _takes_gradients(o)
        }
        if written <= with_gradient:
            return frozenset(with_gradient)
        with_gradient |= written


def _takes_gradients(node: Node) -> bool:
    value = value_of(node)
    tensors = [v for v in (value if isinstance(value, tuple | list) else (value,)) if isinstance(v, torch.Tensor)]
    return op_name(node) != "detach" and any(v.is_floating_point() or v.is_complex() for v in tensors)
