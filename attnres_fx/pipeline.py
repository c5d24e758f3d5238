"""`plan` and `build_stages`: where to cut a model for a pipeline, and the modules between the cuts."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule

from attnres_fx.capture import Captured, CapturedGraph, capture
from attnres_fx.chains import ChainedGraph, chain_graph
from attnres_fx.config import AttnResConfig
from attnres_fx.convert import Model, rewrite_
from attnres_fx.partition.model_costs import CarriedValue
from attnres_fx.partition.stages import split_chain
from attnres_fx.passes import DepthSchedule, analyze_, plan_schedule
from attnres_fx.selection import make_parameters, select_streams

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Planned:
    """A model as the planner sees it. rechain: the chained graph for other blocks; None where they are pinned."""

    name: str
    config: AttnResConfig
    graph: ChainedGraph
    schedules: dict[str, DepthSchedule]
    original: "_Original | None"


class _Original:
    """One mode of a model that is not converted yet, rewritten for whatever blocks are asked."""

    def __init__(self, model: Model, args: Sequence[Any], kwargs: Mapping[str, Any] | None, config: AttnResConfig):
        self.name = type(model).__name__
        self.config = config
        self.captured = _captured(model, args, kwargs)
        self.mode, graph = next(iter(self.captured.graphs.items()))
        self.pristine: CapturedGraph = graph

    def rewritten(self, schedules: Mapping[str, DepthSchedule] | None = None) -> tuple[ChainedGraph, dict[str, Any]]:
        """The graph with depth attention for these blocks, by default those of the config, and its schedules."""
        gm = _copied(self.pristine.gm)
        found = analyze_(gm)
        selected = select_streams(found, self.config, self.name)
        chosen = {s.name: plan_schedule(s.num_sublayers, self.config) for s in selected}
        chosen |= {n: s for n, s in (schedules or {}).items() if n in chosen}
        parameters = make_parameters(gm.graph, self.captured.root, found, selected, self.config)
        replacements = rewrite_(gm, found, chosen, self.config, parameters)
        return chain_graph(gm, selected, chosen, replacements), chosen


def _captured(model: Model, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Captured:
    """One mode: the train graph where there is one, since that is what a pipeline trains."""
    for modes in (("train",), ("eval",)):
        try:
            return capture(model, args, kwargs, modes=modes)  # type: ignore[arg-type]
        except Exception:
            if modes == ("eval",):
                raise
    raise AssertionError


def _copied(gm: GraphModule) -> GraphModule:
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return GraphModule(gm, graph)


def carried_values(chained: ChainedGraph) -> tuple[CarriedValue, ...]:
    """What sublayers hand to later ones besides the sources of their streams."""
    count = chained.chain.num_sublayers
    every = split_chain(chained.gm, chained.chain, range(count), chained.labels)
    return tuple(
        CarriedValue(v.name, v.bytes, v.produced, v.used, v.differentiable)
        for v in every.values
        if v.name not in chained.labels
    )
