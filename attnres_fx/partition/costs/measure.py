"""Costs of a converted model's sublayers, measured on its graph: no weights, nothing run on data."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch.fx import GraphModule, Node

from attnres_fx.partition.costs.activations import input_bytes, saved_bytes
from attnres_fx.partition.costs.flops import Flops, count_flops
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


class StreamRun(Protocol):
    """One stream's sublayers in the chain: `first` and the `count - 1` after it."""

    @property
    def name(self) -> str: ...
    @property
    def first(self) -> int: ...
    @property
    def count(self) -> int: ...


class UnitChain(Protocol):
    """Who computes what: unit -1 stands before the first sublayer, unit `num_sublayers` after the last."""

    @property
    def num_sublayers(self) -> int: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def streams(self) -> Sequence[StreamRun]: ...
    def members(self, unit: int) -> Sequence[Node]: ...


def measure_costs(
    gm: GraphModule, chain: UnitChain, *, recompute: bool = False, carried: Iterable[CarriedValue] = ()
) -> ModelCosts:
    """Costs of every unit of a chain, from the metadata of its nodes.

    gm: a converted model's graph in aten operations, on any device, `meta` too; symbolic sizes count as in the
    example it was captured with, which is one microbatch. recompute: sublayers (not what stands before and after
    them) keep their inputs alone and run forward once more in backward. carried: passed on as it is.

    Flops are counted as `attnres_fx.partition.flops` says, activations as `activations.saved_bytes` says; depth
    reads are in neither. Units of one structure are measured once. Parameters include those of the unit's reads.
    """
    facts = graph_facts(gm)
    places = range(-1, chain.num_sublayers + 1)
    members = {unit: list(chain.members(unit)) for unit in places}
    parameters, tied = _parameter_bytes(members, chain.num_sublayers)
    measured = _Measurements(facts)
    costs = {}
    for unit in places:
        inner = 0 <= unit < chain.num_sublayers
        name = chain.names[unit] if inner else _place(unit, chain.num_sublayers)
        flops, kept = measured.of(members[unit], name, recompute=recompute and inner)
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


class _Measurements:
    """Flops and kept bytes, once for each structure."""

    def __init__(self, facts: GraphFacts) -> None:
        self.facts = facts
        self.calls: dict[Any, Flops] = {}
        self.bodies: dict[Any, tuple[Flops, int]] = {}

    def of(self, nodes: Sequence[Node], name: str, *, recompute: bool) -> tuple[Flops, int]:
        body = extract_body(nodes, self.facts)
        key = body.key, recompute
        if key not in self.bodies:
            flops = count_flops(body.nodes, differentiable=self.facts.differentiable, memo=self.calls)
            if recompute:
                self.bodies[key] = flops + Flops(0, flops.forward), input_bytes(body)
            else:
                self.bodies[key] = flops, saved_bytes(body, name)
        return self.bodies[key]


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


def _value_bytes(members: dict[int, list[Node]], stream: StreamRun, num_sublayers: int) -> int:
    """One source of a stream: the largest that its reads take."""
    stop = stream.first + stream.count
    units = range(stream.first, stop + (stop == num_sublayers))  # the last read of all may stand before the head
    reads = [node for unit in units for node in members[unit] if is_read(node)]
    sources = [s for read in reads if read.args for s in _listed(read.args[0])]
    return max((bytes_of(held_value(s)) for s in sources), default=0)


def _listed(sources: Any) -> list[Node]:
    return [s for s in sources if isinstance(s, Node)] if isinstance(sources, list | tuple) else []
