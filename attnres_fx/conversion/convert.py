"""`convert` and `inspect`: a traced residual transformer becomes an AttnRes model."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from attnres_fx.capture.capture import capture
from attnres_fx.capture.captured import Captured
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.report import ConversionReport, StreamReport
from attnres_fx.conversion.verify import check_conversion
from attnres_fx.errors import (
    AlreadyConvertedError,
    ConfigError,
    RewriteError,
)
from attnres_fx.parameters import AttnResParameters, attribute_name
from attnres_fx.passes import (
    DepthReadPlan,
    Lowering,
    ReadParameters,
    ReadPlan,
    Replacement,
    Stream,
    StreamSet,
    analyze_,
    checked_lowering,
    insert_depth_attention_pass,
    plan_depth_reads,
    run_pass,
)
from attnres_fx.passes.graph.nodes import fake_parameter, insert_attribute, tensor_of
from attnres_fx.passes.lowering.read_calls import OPERATORS
from attnres_fx.passes.rewrite.parameters import make_parameters
from attnres_fx.passes.streams.selection import select_streams

log = logging.getLogger(__name__)

Model = nn.Module | ExportedProgram


def inspect(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> StreamReport:
    """Find the residual streams of a model; the model is left as it is.

    Args:
        model: An `nn.Module`, a `GraphModule` or an `ExportedProgram`.
        args: Example arguments.
        kwargs: Example keyword arguments.
        dynamic_shapes: As `torch.export.export` takes them; by default batch and sequence are free.

    Returns:
        A report: print it, or look at `.streams` and `.refusals`.

    Raises:
        AlreadyConvertedError: The model reads through depth attention already.
        CaptureError: The model cannot be traced.
    """
    refuse_converted(model)
    mode: Mode = "train" if getattr(model, "training", False) else "eval"
    captured = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, modes=(mode,))
    found = analyze_(next(iter(captured.graphs.values())).gm)
    return StreamReport(_name(model), found.streams, found.refusals, tuple(captured.notes))


def convert(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: AttnResConfig | None = None,
    dynamic_shapes: Any = None,
    check: bool = True,
    lowering: Lowering | None = None,
) -> ConvertedModel:
    """Replace the residual streams of a model by attention over depth.

    Args:
        model: An `nn.Module` (captured with `torch.export`), a `GraphModule` or an `ExportedProgram`; it is left as
            it is.
        args: Example arguments; other batch sizes and lengths work where they can.
        kwargs: Example keyword arguments.
        config: Variant, blocks and output mode; `AttnResConfig()` by default.
        dynamic_shapes: As `torch.export.export` takes them; by default batch and sequence are free.
        check: Run original and result once at zero queries, and compare (output `"sum"`).
        lowering: What is folded into the reads when the model runs, `Lowering()` by default; reports, `graph_module`
            and files keep the reads as they were put in.

    Returns:
        A model that shares the original's weights and keeps their names; what it adds is under `attnres`, in the
        dtype most of the weights have. Source: arXiv 2603.15031, section 3.

    Raises:
        ConfigError: `config` or `lowering` is no such thing.
        AlreadyConvertedError: The model reads through depth attention already.
        CaptureError: The model cannot be traced.
        NoStreamError: It has no residual stream.
        NotAdditiveError: A stream is not a sum of its sublayers' outputs.
        StreamWidthError: The features of a stream are not in a last dimension of fixed size.
        StreamNameError: `config.streams` names a stream that does not exist.
        ScheduleError: The blocks of the config do not fit a stream.
        RewriteError: The train and the eval graph do not have the same reads.
        CheckError: The result does not compute what the original computes.
    """
    config = config or AttnResConfig()
    if not isinstance(config, AttnResConfig):
        raise ConfigError(f"config must be an AttnResConfig; it is a {type(config).__name__}.")
    lowering = checked_lowering(lowering)
    refuse_converted(model)
    captured = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    analyses = _analyze(captured)
    plans = _plan(analyses, config, _name(model))
    parameters, replacements = _rewrite(captured, analyses, plans, config)
    report = _report(model, captured, next(iter(analyses.values())), next(iter(plans.values())), config)
    converted = ConvertedModel(
        captured.root,
        parameters,
        {m: (g, replacements[id(g)]) for m, g in captured.graphs.items()},
        captured.failures,
        captured.signature,
        captured.in_spec,
        report,
        lowering,
    )
    nn.Module.train(converted, _starting_mode(captured) == "train")
    if check:
        check_conversion(model, converted, captured)
    return converted


def _analyze(captured: Captured) -> dict[Mode, StreamSet]:
    """The streams of each graph, by its first mode: modes may share a graph."""
    first_mode: dict[int, Mode] = {}
    for mode, graph in captured.graphs.items():
        first_mode.setdefault(id(graph), mode)
    return {mode: analyze_(captured.graphs[mode].gm) for mode in first_mode.values()}


def _plan(analyses: Mapping[Mode, StreamSet], config: AttnResConfig, model: str) -> dict[Mode, ReadPlan]:
    selected = select_streams(next(iter(analyses.values())), config, model)
    _require_same_reads(analyses, selected)
    return {m: plan_depth_reads(s, _same_streams(s, selected), config) for m, s in analyses.items()}


def _rewrite(
    captured: Captured, analyses: Mapping[Mode, StreamSet], plans: Mapping[Mode, ReadPlan], config: AttnResConfig
) -> tuple[AttnResParameters, dict[int, tuple[Replacement, ...]]]:
    """New parameters, which the graphs of all modes share, and the replacements in each graph, by its id."""
    mode, plan = next(iter(plans.items()))
    parameters = make_parameters(captured.graphs[mode].gm.graph, captured.root, plan, config)
    graphs = {m: captured.graphs[m] for m in plans}
    return parameters, {id(g): rewrite_(g.gm, analyses[m], plans[m], parameters) for m, g in graphs.items()}


def _starting_mode(captured: Captured) -> Mode:
    own: Mode = "train" if captured.training else "eval"
    if own in captured.graphs:
        return own
    other = next(iter(captured.graphs))
    log.warning("no %s graph (%s): the converted model starts in %s mode", own, captured.failures.get(own), other)
    return other


def refuse_converted(model: Any) -> None:
    graph = model.graph if isinstance(model, GraphModule | ExportedProgram) else None
    holds_reads = graph is not None and any(n.target in OPERATORS for n in graph.nodes)
    if isinstance(model, ConvertedModel) or holds_reads:
        raise AlreadyConvertedError(
            "the model reads through depth attention already: convert the original again, with another config "
            "if you like."
        )
    if isinstance(getattr(model, "attnres", None), AttnResParameters) and not isinstance(model, GraphModule):
        raise AlreadyConvertedError(
            f"{type(model).__name__} is attached for the compile backend: detach(model) first, to convert it."
        )


def _name(model: Any) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else "ExportedProgram"


def _same_streams(streams: StreamSet, selected: Sequence[Stream]) -> tuple[Stream, ...]:
    """The selected streams as another mode's graph has them."""
    names = {s.name for s in selected}
    return tuple(s for s in streams.streams if s.name in names)


def _require_same_reads(found: Mapping[Mode, StreamSet], selected: Sequence[Stream]) -> None:
    wanted = {s.name: [(r.name, r.position, len(r.extras)) for r in s.depth_reads] for s in selected}
    for mode, streams in found.items():
        have = {
            s.name: [(r.name, r.position, len(r.extras)) for r in s.depth_reads]
            for s in streams.streams
            if s.name in wanted
        }
        if have != wanted:
            names = {r[0] for reads in have.values() for r in reads} ^ {
                r[0] for reads in wanted.values() for r in reads
            }
            raise RewriteError(
                f"the train and the eval graph do not have the same reads ({', '.join(sorted(names)) or 'order'} "
                f"in one only, seen in {mode} mode). Dropout on the stream itself does this: move it onto the "
                f"branch, set its probability to 0, or convert a graph of one mode."
            )


def rewrite_(
    gm: GraphModule, streams: StreamSet, plan: ReadPlan, parameters: AttnResParameters
) -> tuple[Replacement, ...]:
    """Execute a read plan on an analysed graph with these parameters, in place."""
    gm.add_module("attnres", parameters)
    result = run_pass(
        insert_depth_attention_pass,
        gm,
        streams=streams,
        plan=plan,
        eps=parameters.config.eps,
        fetch=lambda read, like: _fetch(gm.graph, parameters, read, like),
    )
    return result.replaced


def _fetch(graph: Graph, parameters: AttnResParameters, read: DepthReadPlan, like: Node) -> ReadParameters:
    module = parameters.reads[read.read]
    value = tensor_of(like)
    assert value is not None

    def attribute(name: str) -> Node:
        held = getattr(module, name)
        fake = fake_parameter(value, tuple(held.shape), held.dtype)
        return insert_attribute(graph, f"attnres.reads.{attribute_name(read.read)}.{name}", like=like, value=fake)

    gate = attribute("gate") if module.gate is not None else None
    return ReadParameters(attribute("query"), attribute("key_weight"), gate)


def _report(
    model: Model,
    captured: Captured,
    streams: StreamSet,
    plan: ReadPlan,
    config: AttnResConfig,
) -> ConversionReport:
    notes = [*captured.notes, *(f"no {m} graph: {_shortened(why)}" for m, why in captured.failures.items())]
    done = {s.stream.name for s in plan.streams}
    left = [(s, _why_left(s, config)) for s in streams.streams if s.name not in done]
    return ConversionReport(
        model=_name(model),
        config=config,
        streams=plan.streams,
        left=tuple(left),
        refusals=streams.refusals,
        modes=tuple(sorted(captured.graphs)),
        notes=tuple(notes),
    )


def _shortened(text: str, length: int = 160) -> str:
    return text if len(text) <= length else f"{text[:length].rsplit(' ', 1)[0]} …"


def _why_left(stream: Stream, config: AttnResConfig) -> str:
    if stream.nested_in is not None and config.streams == "main":
        return f"inside a sublayer of {stream.nested_in!r}; streams='all' converts it too"
    return f"not named in streams={config.streams!r}"
