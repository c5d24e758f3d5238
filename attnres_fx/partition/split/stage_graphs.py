"""A converted graph, cut into one module per virtual stage.

    stages[0]:  ids -> v_0, v_1            (embedding, sublayers 0 and 1)
    stages[1]:  v_0, v_1 -> v_2, v_3       (sublayers 2 and 3)
    stages[2]:  v_0, …, v_3, ids -> logits (the rest, and the head)

Each holds its own parameters alone, under their original names, takes the values that earlier stages made and gives
out those that later ones need. What depends on the model's inputs alone is made again wherever it is needed.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from attnres_fx.errors import PlanError
from attnres_fx.partition.split.chain import Chain, is_mode_switch, size_in_bytes
from attnres_fx.partition.split.input_sizes import Symbols, symbols_of
from attnres_fx.partition.split.routes import StageRoute, StageValue, route_values
from attnres_fx.passes.graph.mutation_order import Writes
from attnres_fx.passes.graph.nodes import describe, nodes_without_gradients, tensor_of, value_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, op_name
from attnres_fx.passes.normalize.inline_regions import getattr_path


@dataclass(frozen=True, eq=False)
class Split:
    """How one mode's graph is divided.

    values: what leaves a stage, in graph order, with the node of each. repeated: cheap nodes that stages make again
    from a value they have, by stage.
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

    starts: first sublayer of every virtual stage, the first 0. labels: what nodes are to a reader, by name.
    Raises PlanError for a value that cannot travel, or a buffer that two stages share and one writes.
    """
    stage = {n: _stage_of(u, starts, chain.num_sublayers) for n, u in chain.unit.items()}
    last = len(starts) - 1
    used: dict[Node, set[int]] = {}
    for node in chain.graph.nodes:
        if node in stage:
            at = {last if u.op == "output" else stage[u] for u in node.users if u.op == "output" or u in stage}
            used[node] = {t for t in at if t > stage[node]}
    repeated = _repeated(chain.graph, stage, used)
    crossing = [n for n in chain.graph.nodes if used.get(n)]
    for node in crossing:
        if not isinstance(value_of(node), torch.Tensor):
            raise PlanError(
                f"{describe(node)} is made in virtual stage {stage[node]} and needed in {min(used[node])}, but it is "
                f"no tensor ({type(value_of(node)).__name__}), and only tensors travel: move the stage boundary, or "
                f"compute it from the model's inputs."
            )
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
        for n in crossing
    )
    return Split(gm, chain, tuple(starts), stage, values, {n.name: n for n in crossing}, repeated)


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
    found: dict[int, set[Node]] = {}
    for node in graph.nodes:  # a view of a view follows what it views
        base = _viewed(node)
        if base is None or base not in stage or not used.get(node):
            continue
        for at in sorted(used[node]):
            has_base = at in used[base] or base in found.get(at, ())
            if has_base and all(i is base or i not in stage or stage[i] == at for i in node.all_input_nodes):
                used[node].discard(at)
                found.setdefault(at, set()).add(node)
    return {at: frozenset(nodes) for at, nodes in found.items()}


def _viewed(node: Node) -> Node | None:
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
    found: set[Node] = set()
    while True:
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                if isinstance(getattr_path(gm, str(node.target)), nn.Parameter):
                    found.add(node)
            elif node not in frozen and _takes_gradients(node) and any(i in found for i in writes.inputs(node)):
                found.add(node)
        # What a gradient flows into by a write has one, and so has all that looks at it.
        written = {o for w, owners in writes.targets.items() if w in found for o in owners if _takes_gradients(o)}
        if written <= found:
            return frozenset(found)
        found |= written


def _takes_gradients(node: Node) -> bool:
    value = value_of(node)
    tensors = [v for v in (value if isinstance(value, tuple | list) else (value,)) if isinstance(v, torch.Tensor)]
    return op_name(node) != "detach" and any(v.is_floating_point() or v.is_complex() for v in tensors)


# --- one graph a stage ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StageGraph:
    """One stage in one mode.

    graph: takes the values of `route.takes`, then the model's flat inputs numbered in `inputs`; returns the values of
    `route.produced`, or in the last stage the model's flat outputs.
    """

    graph: Graph
    route: StageRoute
    inputs: tuple[int, ...]


def stage_graphs(split: Split, *, num_ranks: int, cache: bool = True) -> tuple[StageGraph, ...]:
    """Graphs of all virtual stages, in order."""
    virtual = split.num_stages // num_ranks
    routes = route_values(split.values, num_stages=num_ranks, virtual_stages=virtual, cache=cache)
    return tuple(_stage_graph(split, route) for route in routes)


def _stage_graph(split: Split, route: StageRoute) -> StageGraph:
    source = split.chain.graph
    is_last = route.stage == split.num_stages - 1
    output = next(n for n in source.nodes if n.op == "output")
    produced = [split.nodes[name] for name in route.produced]
    wanted = list(output.all_input_nodes) if is_last else produced
    own = {n for n, s in split.stage.items() if s == route.stage} | split.repeated.get(route.stage, frozenset())
    taken = {split.nodes[name] for name in route.takes}
    writes = split.chain.writes
    # What another stage has written is in what was received from it.
    done = {w for w in writes.targets if w not in own and w not in split.chain.floating}
    kept = _closure(writes, [*wanted, *(n for n in own if n in writes.targets)], stop=taken | done)
    graph = Graph()
    copies: dict[Node, Node] = {}
    for name in route.takes:
        node = split.nodes[name]
        copies[node] = graph.placeholder(name)
        copies[node].meta = dict(node.meta)
    placeholders = [n for n in source.nodes if n.op == "placeholder"]
    inputs = tuple(i for i, n in enumerate(placeholders) if n in kept)
    for i in inputs:
        copies[placeholders[i]] = graph.node_copy(placeholders[i])
    for node in source.nodes:
        if node.op not in ("placeholder", "output") and (node in kept or is_mode_switch(node)):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    _drop_empty_regions(graph)
    if is_last:
        graph.output(torch.fx.node.map_arg(output.args[0], copies.__getitem__))
    else:
        graph.output(tuple(_own_memory(graph, copies[n]) for n in produced))
    graph.lint()
    return StageGraph(graph, route, inputs)


def sublayer_graphs(split: Split, graphs: Sequence[StageGraph]) -> tuple[tuple[StageGraph, ...], ...]:
    """Each stage's graph as one graph for each of its sublayers, which take values from those before them.

    The stage itself where that cannot be.
    """
    chain = split.chain
    every = split_chain(split.gm, chain, range(chain.num_sublayers), {})
    every = replace(every, nodes={**every.nodes, **split.nodes})
    routes = route_values(every.values, num_stages=chain.num_sublayers)
    return tuple(_sublayer_graphs_of(split, graph, every, routes) for graph in graphs)


def _sublayer_graphs_of(
    split: Split, graph: StageGraph, every: Split, routes: Sequence[StageRoute]
) -> tuple[StageGraph, ...]:
    stage = graph.route.stage
    stop = (*split.starts[1:], split.chain.num_sublayers)[stage]
    parts, known = [], set(graph.route.takes)
    for unit in range(split.starts[stage], stop):
        taken = [_known_base(every.nodes[name], known) for name in routes[unit].takes]
        if None in taken:
            return (graph,)
        part = _stage_graph(every, replace(routes[unit], takes=tuple(dict.fromkeys(map(str, taken)))))
        known |= set(part.route.produced)
        parts.append(part)
    return tuple(parts) if set(graph.route.produced) <= known else (graph,)


def _known_base(node: Node, known: set[str]) -> str | None:
    """The node, or what it is a view of, that is among the known values."""
    at: Node | None = node
    while at is not None and at.name not in known:
        at = _viewed(at)
    return at.name if at is not None else None


def _closure(writes: Writes, nodes: Iterable[Node], stop: set[Node]) -> set[Node]:
    found: set[Node] = set()
    stack = [n for n in nodes if n not in stop]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [i for i in writes.inputs(node) if i not in stop]
    return found


def _drop_empty_regions(graph: Graph) -> None:
    """Remove switches of a mode between which nothing is left."""
    while any(_drop_switch(graph, first, second) for first, second in itertools.pairwise(graph.nodes)):
        pass
    for node in reversed(graph.nodes):
        if is_mode_switch(node) and not node.users and node.target is torch.is_grad_enabled:
            graph.erase_node(node)


def _drop_switch(graph: Graph, first: Node, second: Node) -> bool:
    if not (is_mode_switch(first) and is_mode_switch(second)):
        return False
    if first.target is second.target and not first.users:  # the second overwrites what the first set
        graph.erase_node(first)
        return True
    if first in second.all_input_nodes:  # entered and left, or asked and put back
        graph.erase_node(second)
        if first.target is not torch.is_grad_enabled:
            graph.erase_node(first)
        return True
    return False


def _own_memory(graph: Graph, node: Node) -> Node:
    """The node, or a copy of it where it shares memory with something else."""
    schema = getattr(node.target, "_schema", None)
    shares = schema is None or any(a.alias_info is not None for a in schema.arguments)
    if node.op == "call_function" and not shares and "getitem" not in op_name(node):
        return node
    copied = graph.call_function(torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    copied.meta = dict(node.meta)
    return copied
