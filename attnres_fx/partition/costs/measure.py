"""Costs of a converted model's sublayers, measured on its graph: no weights, nothing run on data."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from attnres_fx.partition.costs.activations import saved_bytes
from attnres_fx.partition.costs.flops import Flops, count_flops, projection_flops
from attnres_fx.partition.costs.model_costs import CarriedValue, ModelCosts, StreamCost, SublayerCost
from attnres_fx.partition.costs.unit_graph import (
    GraphFacts,
    bytes_of,
    extract_body,
    graph_facts,
    held_value,
    is_read,
    parameter_of,
)
from attnres_fx.partition.split.chain import Chain, ChainStream


def measure_costs(gm: GraphModule, chain: Chain, *, carried: Iterable[CarriedValue] = ()) -> ModelCosts:
    """Costs of every unit of a chain, from the metadata of its nodes.

    Flops are counted as `costs/flops.py` says, activations as `activations.saved_bytes` says; depth reads are in
    neither, but for the projection that makes a query from the input. Units of one structure are measured once.
    Parameters include those of the unit's reads.

    Args:
        gm: A converted model's graph in aten operations, on any device, `meta` too; symbolic sizes count as in the
            example it was captured with, which is one microbatch.
        chain: Which node belongs to which sublayer.
        carried: What travels besides the sources of the streams; passed on as it is.

    Returns:
        The costs, per microbatch.
    """
    facts = graph_facts(gm)
    places = range(-1, chain.num_sublayers + 1)
    members = {unit: list(chain.members(unit)) for unit in places}
    parameters, tied = _parameter_bytes(members, chain.num_sublayers)
    measured = _MeasuredUnits(facts)
    costs = {}
    for unit in places:
        inner = 0 <= unit < chain.num_sublayers
        name = chain.names[unit] if inner else _place(unit, chain.num_sublayers)
        flops, kept = measured.flops_and_bytes(members[unit], name)
        costs[unit] = SublayerCost(name, float(flops.forward), float(flops.backward), parameters[unit], kept)
    return ModelCosts(
        sublayers=tuple(costs[i] for i in range(chain.num_sublayers)),
        before=costs[-1],
        after=costs[chain.num_sublayers],
        streams=tuple(
            StreamCost(s.name, s.first, s.count, _value_bytes(members, s, chain.num_sublayers)) for s in chain.streams
        ),
        carried=tuple(carried),
        tied=tied,
    )


class _MeasuredUnits:
    """Operations and saved bytes of units, counted once for each structure."""

    def __init__(self, facts: GraphFacts) -> None:
        self.facts = facts
        self.calls: dict[Any, Flops] = {}
        self.by_structure: dict[Any, tuple[Flops, int]] = {}

    def flops_and_bytes(self, nodes: Sequence[Node], name: str) -> tuple[Flops, int]:
        body = extract_body(nodes, self.facts)
        if body.key not in self.by_structure:
            flops = count_flops(body.nodes, differentiable=self.facts.differentiable, memo=self.calls)
            self.by_structure[body.key] = flops, saved_bytes(body, name)
        flops, kept = self.by_structure[body.key]
        reads = (n for n in nodes if is_read(n))
        return sum((projection_flops(n, differentiable=self.facts.differentiable) for n in reads), flops), kept


def _place(unit: int, num_sublayers: int) -> str:
    return "before" if unit < 0 else "after" if unit == num_sublayers else str(unit)


def _parameter_bytes(
    members: dict[int, list[Node]], num_sublayers: int
) -> tuple[dict[int, int], tuple[tuple[int, tuple[str, ...]], ...]]:
    """Bytes of each unit's parameters, those of several at the first, and the groups of units that share some."""
    users: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for unit, nodes in members.items():
        for fetched in dict.fromkeys(i for node in nodes for i in (node, *node.all_input_nodes)):
            parameter = parameter_of(fetched)
            if parameter is not None:
                sizes[id(parameter)] = bytes_of(parameter)
                held = users.setdefault(id(parameter), [])
                held += [unit] if unit not in held else []
    own = dict.fromkeys(members, 0)
    shared: dict[tuple[int, ...], int] = {}
    for parameter_id, units in users.items():
        own[units[0]] += sizes[parameter_id]
        if len(units) > 1:
            shared[tuple(units)] = shared.get(tuple(units), 0) + sizes[parameter_id]
    tied = tuple((size, tuple(_place(u, num_sublayers) for u in units)) for units, size in shared.items())
    return own, tied


def _value_bytes(members: dict[int, list[Node]], stream: ChainStream, num_sublayers: int) -> int:
    """One source of a stream: the largest that its reads take."""
    stop = stream.first + stream.count
    units = range(stream.first, stop + (stop == num_sublayers))  # the last read of all may stand before the head
    reads = [node for unit in units for node in members[unit] if is_read(node)]
    sources = [s for read in reads if read.args for s in _listed(read.args[0])]
    return max((bytes_of(held_value(s)) for s in sources), default=0)


def _listed(sources: Any) -> list[Node]:
    return [s for s in sources if isinstance(s, Node)] if isinstance(sources, list | tuple) else []
