"""A converted model's graphs as chains of sublayers, and as stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.signature import CallSignature
from attnres_fx.conversion.captured_program import CapturedProgram, flat_arguments
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.flat_export import flat_aten, in_graph_order, reads_of_export
from attnres_fx.partition.split.chain import Chain, ChainRead, ChainStream, drop_assertions_pass, find_chain
from attnres_fx.partition.split.input_sizes import ask_inputs_for_sizes_pass
from attnres_fx.partition.split.split_chain import Split, refuse_empty_stages, split_chain
from attnres_fx.partition.split.stage import Stage
from attnres_fx.partition.split.stage_graphs import StageGraph, stage_graphs, sublayer_graphs
from attnres_fx.partition.split.stages import Stages
from attnres_fx.passes import Replacement, Stream
from attnres_fx.passes.graph.result import run_pass
from attnres_fx.passes.lowering.lower import Lowering


@dataclass(frozen=True, eq=False)
class ChainedGraph:
    """One mode's graph in order of its sublayers.

    Args:
        gm: The graph, and what it takes its attributes from.
        chain: Which node belongs to which sublayer.
        labels: What the sources of its reads are, by node name.
        out_spec: Structure of the outputs, which are flat.
    """

    gm: GraphModule
    chain: Chain
    labels: Mapping[str, str]
    out_spec: Any = None


def chain_graph(
    gm: GraphModule,
    streams: Sequence[Stream],
    replacements: Sequence[Replacement],
) -> ChainedGraph:
    """Order a converted graph, changing it where sizes are asked of tensors that live in one stage only.

    Args:
        gm: The graph, in aten operations; changed in place.
        streams: Those that were rewritten.
        replacements: The reads of this graph.
    """
    for each in (drop_assertions_pass, ask_inputs_for_sizes_pass):
        run_pass(each, gm)
    order = {n.name: i for i, n in enumerate(gm.graph.nodes)}
    main = [s for s in streams if s.nested_in is None]
    begins = {s.name: min(order[r.node] for r in replacements if r.stream == s.name) for s in main}
    main.sort(key=lambda s: begins[s.name])
    runs, at = [], 0
    for stream in main:
        runs.append(ChainStream(stream.name, at, stream.num_sublayers, _sublayer_names(stream)))
        at += stream.num_sublayers
    reads = [r for s in main for r in _chain_reads(s, replacements)]
    labels = {
        node: label if len(main) == 1 else f"{r.stream}:{label}" for r in replacements for label, node in r.sources
    }
    return ChainedGraph(gm, find_chain(gm, runs, reads), labels)


def _sublayer_names(stream: Stream) -> tuple[str, ...]:
    """Each sublayer by the read that opens it."""
    at = {r.position: r.name for r in reversed(stream.reads)}
    return tuple(at.get(i, f"{stream.name}[{i}]") for i in range(stream.num_sublayers))


def _chain_reads(stream: Stream, replacements: Sequence[Replacement]) -> list[ChainRead]:
    own = [r for r in replacements if r.stream == stream.name]
    # On a post-norm stream the block hands on what the norm after its last read makes of it.
    handed_on = {label: node for r in reversed(own) for label, node in r.sources} if stream.post_norm else {}
    reads = []
    for placed in own:
        summary = placed.plan.summary
        holder = None if summary is None else handed_on.get(str(summary), placed.node)
        reads.append(ChainRead(placed.node, stream.name, placed.plan.position, holder))
    return reads


def chains_of(converted: ConvertedModel, modes: Sequence[Mode] | None = None) -> dict[Mode, ChainedGraph]:
    """The graphs of a converted model, in order.

    Args:
        converted: The model.
        modes: Whose graphs; by default all that can be captured.
    """
    streams = [s.stream for s in converted.report.streams]
    by_program: dict[int, ChainedGraph] = {}  # modes may share a program
    by_mode: dict[Mode, ChainedGraph] = {}
    programs = converted.every_program() if modes is None else {m: converted.program_of(m) for m in modes}
    for mode, program in programs.items():
        if id(program) not in by_program:
            gm, replacements, out_spec = _in_aten(converted, mode)
            name_as_the_model_does(gm, converted)
            chained = chain_graph(gm, streams, replacements)
            by_program[id(program)] = replace(chained, out_spec=out_spec)
        by_mode[mode] = by_program[id(program)]
    return by_mode


def name_as_the_model_does(gm: GraphModule, model: nn.Module) -> None:
    """Give a parameter that has several names the one the model lists it under."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            node.target = first.get(id(attrgetter(str(node.target))(gm)), node.target)


def _in_aten(converted: ConvertedModel, mode: Mode) -> tuple[GraphModule, tuple[Replacement, ...], Any]:
    """A graph in aten operations, which say what they read and write, its reads, and its outputs' structure."""
    program = converted.program_of(mode)
    if converted._attnres_conversion.typed:
        return converted.graph_module(mode), program.replacements, program.out_spec
    captured = converted.captured(mode)
    gm, out_spec = flat_aten(converted, captured)
    reads = reads_of_export(gm, in_graph_order(captured.gm, program.replacements))
    return gm, reads, out_spec


@dataclass(frozen=True, eq=False)
class CutGraph:
    """One mode's graph as graphs of its virtual stages.

    Args:
        split: Which stage computes what.
        stages: One graph a stage.
        sublayers: For each stage the graphs of its sublayers, where these are run again in backward; else empty.
    """

    split: Split
    stages: tuple[StageGraph, ...]
    sublayers: tuple[tuple[StageGraph, ...], ...] = ()


def _cut(chained: ChainedGraph, starts: Sequence[int], *, num_ranks: int, cache: bool, recompute: bool) -> CutGraph:
    split = split_chain(chained.gm, chained.chain, starts, chained.labels)
    refuse_empty_stages(split)
    stages = stage_graphs(split, num_ranks=num_ranks, cache=cache)
    return CutGraph(split, stages, sublayer_graphs(split, stages) if recompute else ())


def stages_of(
    converted: ConvertedModel,
    starts: Sequence[int],
    *,
    num_stages: int,
    virtual_stages: int,
    cache: bool,
    lowering: Lowering | None,
    recompute: bool = False,
    chains: Mapping[Mode, ChainedGraph] | None = None,
) -> Stages:
    """A converted model, cut into stages.

    Args:
        converted: The model.
        starts: First sublayer of every virtual stage.
        num_stages: Ranks P.
        virtual_stages: Stages on each rank, V.
        cache: Whether ranks keep the values they have seen.
        lowering: Of each stage; the model's own by default.
        recompute: Whether sublayers keep only their inputs and run again in backward.
        chains: `chains_of(converted)`, where the caller has it.

    Raises:
        PlanError: A stage would be empty, or hold what cannot be cut there.
    """
    chains = chains_of(converted) if chains is None else chains
    cuts: dict[ChainedGraph, CutGraph] = {}  # modes that share one graph share its cut
    for chained in chains.values():
        if chained not in cuts:
            cuts[chained] = _cut(chained, starts, num_ranks=num_stages, cache=cache, recompute=recompute)
    by_mode = {mode: cuts[chained] for mode, chained in chains.items()}
    roots = [converted, *(c.gm for c in chains.values())]
    stages = [
        Stage(
            roots,
            i,
            {m: c.stages[i] for m, c in by_mode.items()},
            lowering or converted._attnres_conversion.lowering,
            {m: c.sublayers[i] for m, c in by_mode.items() if c.sublayers},
        )
        for i in range(len(starts))
    ]
    specs = {m: c.out_spec for m, c in chains.items()}
    conversion = converted._attnres_conversion
    convention = CallConvention(conversion.signature, conversion.in_spec, dict(conversion.programs), specs)
    return Stages(
        stages,
        {m: c.split for m, c in by_mode.items()},
        num_stages=num_stages,
        virtual_stages=virtual_stages,
        cache=cache,
        made_for=converted.attnres.made_for,
        leaves=convention.leaves,
        flatten=convention.flatten,
        unflatten=convention.unflatten,
    )


@dataclass(frozen=True)
class CallConvention:
    """How a converted model is called, without the model: the programs hold no tensors.

    Args:
        signature: The arguments of a call.
        in_spec: Pytree of (args, kwargs), None where the graphs take them as they are.
        programs: By mode.
        out_specs: By mode, the structure of what the model returns.
    """

    signature: CallSignature
    in_spec: Any
    programs: Mapping[Mode, CapturedProgram]
    out_specs: Mapping[Mode, Any]

    def leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat inputs, whether they fit or not."""
        return pytree.tree_leaves(self.signature.bind(args, dict(kwargs)))

    def flatten(self, mode: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        if self.in_spec is None:
            return self.leaves(args, kwargs)
        return flat_arguments(self.programs[mode], args, kwargs)

    def unflatten(self, mode: Mode, outputs: Any) -> Any:
        return pytree.tree_unflatten(outputs, self.out_specs[mode])
