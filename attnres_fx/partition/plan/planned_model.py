"""The model that is planned for, as a chain of sublayers: an original rewritten for given blocks, or one converted."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from attnres_fx.capture.capture import capture
from attnres_fx.capture.captured import Captured
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.flat_export import flat_aten
from attnres_fx.conversion.rewriting import rewrite_
from attnres_fx.conversion.source_model import Model, refuse_converted
from attnres_fx.errors import CaptureError, ModeError
from attnres_fx.partition.costs.cut_bytes import BlockLayouts
from attnres_fx.partition.costs.model_costs import CarriedValue
from attnres_fx.partition.plan.fingerprint import ModelFingerprint, fingerprint_part
from attnres_fx.partition.split.chained_model import (
    ChainedGraph,
    chain_graph,
    chains_of,
    name_as_the_model_does,
)
from attnres_fx.partition.split.split_chain import split_chain
from attnres_fx.passes import DepthSchedule, analyze_, plan_depth_reads
from attnres_fx.passes.rewrite.parameters import make_parameters
from attnres_fx.passes.streams.selection import select_streams


class OriginalModel:
    """One mode of a model that is not converted yet, rewritten for whatever blocks are asked."""

    def __init__(self, model: Model, args: Sequence[Any], kwargs: Mapping[str, Any] | None, config: AttnResConfig):
        refuse_converted(model)
        self.name = type(model).__name__
        self.config = config
        self.captured = _captured(model, args, kwargs)
        self.pristine = _in_aten(self.captured)

    def rewritten(self, layouts: BlockLayouts | None = None) -> tuple[ChainedGraph, dict[str, DepthSchedule]]:
        """The graph with depth attention for these blocks, by default those of the config, and its blocks."""
        gm = _copied(self.pristine)
        name_as_the_model_does(gm, self.captured.root)
        streams = analyze_(gm)
        selected = select_streams(streams, self.config, self.name)
        plan = plan_depth_reads(streams, selected, self.config, block_layouts=layouts)
        parameters = make_parameters(gm.graph, self.captured.root, plan, self.config)
        replacements = rewrite_(gm, streams, plan, parameters)
        return chain_graph(gm, selected, replacements), {s.stream.name: s.schedule for s in plan.streams}


def _captured(model: Model, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Captured:
    """One mode: the train graph where there is one, since that is what a pipeline trains."""
    try:
        return capture(model, args, kwargs, modes=("train",), in_aten=True)
    except CaptureError as error:
        try:
            return capture(model, args, kwargs, modes=("eval",), in_aten=True)
        except (CaptureError, KeyError):
            raise error from error.__cause__


def _in_aten(captured: Captured) -> GraphModule:
    """The graph in aten operations: one of torch functions is exported, which opens its modules."""
    graph = next(iter(captured.graphs.values()))
    if graph.typed:
        return graph.gm
    captured.root.train(captured.training)
    gm, _ = flat_aten(captured.root, graph)
    return gm


def _copied(gm: GraphModule) -> GraphModule:
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return GraphModule(gm, graph)


def converted_chain(model: Any) -> tuple[ChainedGraph, dict[str, DepthSchedule]]:
    """The train graph where there is one, since that is what a pipeline trains, and the blocks of each stream."""
    try:
        model.program_of("train")
        mode: Mode = "train"
    except ModeError:
        mode = "eval"
    return chains_of(model, (mode,))[mode], {s.stream.name: s.schedule for s in model.report.streams}


def name_of(model: Any) -> str:
    return model.report.model if isinstance(model, ConvertedModel) else type(model).__name__


def fingerprint(name: str, chained: ChainedGraph) -> ModelFingerprint:
    """Names, shapes and dtypes of what every sublayer holds, without what a conversion adds."""
    chain = chained.chain
    parts = []
    for unit in range(-1, chain.num_sublayers + 1):
        held = {
            str(i.target): attrgetter(str(i.target))(chained.gm)
            for n in chain.members(unit)
            for i in n.all_input_nodes
            if i.op == "get_attr" and not str(i.target).startswith("attnres.")
        }
        own = [(n, t) for n, t in held.items() if isinstance(t, nn.Parameter)]
        label = chain.names[unit] if 0 <= unit < chain.num_sublayers else ("before" if unit < 0 else "after")
        parts.append(fingerprint_part(label, own))
    return ModelFingerprint(name, parts[0], tuple(parts[1:-1]), parts[-1])


def carried_values(chained: ChainedGraph) -> tuple[CarriedValue, ...]:
    """What sublayers hand to later ones besides the sources of their streams."""
    count = chained.chain.num_sublayers
    every = split_chain(chained.gm, chained.chain, range(count), chained.labels)
    return tuple(
        CarriedValue(v.name, v.bytes, v.produced, v.used, v.differentiable)
        for v in every.values
        if v.name not in chained.labels
    )
