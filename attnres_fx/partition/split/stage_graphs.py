"""A converted graph, cut into one module per virtual stage.

    stages[0]:  ids -> v_0, v_1            (embedding, sublayers 0 and 1)
    stages[1]:  v_0, v_1 -> v_2, v_3       (sublayers 2 and 3)
    stages[2]:  v_0, …, v_3, ids -> logits (the rest, and the head)

Each holds its own parameters alone, under their original names, takes the values that earlier stages made and gives
out those that later ones need. What depends on the model's inputs alone is made again wherever it is needed.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from attnres_fx.partition.split.chain import is_mode_switch
from attnres_fx.partition.split.routes import StageRoute, route_values
from attnres_fx.partition.split.split_chain import Split, split_chain, viewed_value
from attnres_fx.passes.graph.mutation_order import Writes
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import has_trait, op_name


@dataclass(frozen=True, eq=False)
class StageGraph:
    """One stage in one mode.

    Args:
        graph: Takes the values of `route.takes`, then the model's flat inputs numbered in `inputs`; returns the values
            of `route.produced`, or in the last stage the model's flat outputs.
        route: Which values it takes and produces.
        inputs: Which of the model's flat inputs it takes.
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
    results = list(output.all_input_nodes) if is_last else produced
    needed = _needed(split, route, results)
    graph = Graph()
    copies, inputs = _copied_inputs(graph, split, route, needed)
    for node in source.nodes:
        if node.op not in ("placeholder", "output") and (node in needed or is_mode_switch(node)):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    _drop_empty_regions(graph)
    if is_last:
        graph.output(torch.fx.node.map_arg(output.args[0], copies.__getitem__))
    else:
        graph.output(tuple(_own_memory(graph, copies[n]) for n in produced))
    graph.lint()
    return StageGraph(graph, route, inputs)


def _needed(split: Split, route: StageRoute, results: Iterable[Node]) -> set[Node]:
    """What a stage computes: its results and its writes, back to the values it takes."""
    writes = split.chain.writes
    own = {n for n, s in split.stage.items() if s == route.stage} | split.repeated.get(route.stage, frozenset())
    taken = {split.nodes[name] for name in route.takes}
    # What another stage has written is in what was received from it.
    done = {w for w in writes.targets if w not in own and w not in split.chain.floating}
    return _closure(writes, [*results, *(n for n in own if n in writes.targets)], stop=taken | done)


def _copied_inputs(
    graph: Graph, split: Split, route: StageRoute, needed: set[Node]
) -> tuple[dict[Node, Node], tuple[int, ...]]:
    """The inputs of a stage's graph, by what they stand for: the values it takes, then the model's that it needs.

    The latter also by number.
    """
    copies: dict[Node, Node] = {}
    for name in route.takes:
        node = split.nodes[name]
        copies[node] = graph.placeholder(name)
        copies[node].meta = dict(node.meta)
    placeholders = [n for n in split.chain.graph.nodes if n.op == "placeholder"]
    inputs = tuple(i for i, n in enumerate(placeholders) if n in needed)
    for i in inputs:
        copies[placeholders[i]] = graph.node_copy(placeholders[i])
    return copies, inputs


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
        at = viewed_value(at)
    return at.name if at is not None else None


def _closure(writes: Writes, nodes: Iterable[Node], stop: set[Node]) -> set[Node]:
    closure: set[Node] = set()
    stack = [n for n in nodes if n not in stop]
    while stack:
        node = stack.pop()
        if node not in closure:
            closure.add(node)
            stack += [i for i in writes.inputs(node) if i not in stop]
    return closure


def _drop_empty_regions(graph: Graph) -> None:
    """Remove switches of a mode between which nothing is left."""
    while any(_drop_switch(graph, first, second) for first, second in itertools.pairwise(graph.nodes)):
        pass
    for node in reversed(graph.nodes):
        if is_mode_switch(node) and not node.users and has_trait(node, Trait.ASKS_MODE):
            graph.erase_node(node)


def _drop_switch(graph: Graph, first: Node, second: Node) -> bool:
    if not (is_mode_switch(first) and is_mode_switch(second)):
        return False
    if first.target is second.target and not first.users:  # the second overwrites what the first set
        graph.erase_node(first)
        return True
    if first in second.all_input_nodes:  # entered and left, or asked and put back
        graph.erase_node(second)
        if not has_trait(first, Trait.ASKS_MODE):
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
