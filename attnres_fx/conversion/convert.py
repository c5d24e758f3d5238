"""`convert`: a traced residual transformer becomes an AttnRes model."""

import functools
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from attnres_fx.capture.capture import capture
from attnres_fx.capture.captured import Captured
from attnres_fx.capture.isolated_run import Mode, outside_inference_mode
from attnres_fx.capture.module_clone import uncompiled
from attnres_fx.config import RewriteConfig
from attnres_fx.conversion.around_forward import branches_of_root, methods_that_add
from attnres_fx.conversion.assembly import converted_model
from attnres_fx.conversion.conversion import ADDED, Conversion
from attnres_fx.conversion.conversion_call import ConversionCall
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.deferred import DeferredMode, without_tensors
from attnres_fx.conversion.edits import refuse_around_forward, refuse_forwards
from attnres_fx.conversion.loading import pickled_as_file
from attnres_fx.conversion.own_python import OwnPython
from attnres_fx.conversion.progress import Progress
from attnres_fx.conversion.recapturing import Recapturing
from attnres_fx.conversion.reconfiguring import Reconfiguring
from attnres_fx.conversion.report import ConversionReport, shortened
from attnres_fx.conversion.rewriting import modules_that_add, require_same_reads, rewrite_, same_streams
from attnres_fx.conversion.source_model import Model, checked_config, model_name, refuse_converted
from attnres_fx.conversion.taken_names import refuse_taken_names, yielded
from attnres_fx.conversion.verify import Check, check_conversion, require_known
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes import (
    Lowering,
    ReadPlan,
    Replacement,
    StreamSet,
    analyze_,
    checked_lowering,
    topology_of,
)
from attnres_fx.passes.rewrite.parameters import make_parameters
from attnres_fx.passes.streams.selection import select_streams, why_left

log = logging.getLogger(__name__)


@outside_inference_mode()  # what is made here is trained later, whatever mode it is made in
def convert(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: RewriteConfig | None = None,
    dynamic_shapes: Any = None,
    check: Check = True,
    lowering: Lowering | None = None,
) -> ConvertedModel:
    """Replace the residual streams of a model by attention over depth: `converted = convert(model, (x,))`.

    Args:
        model: An `nn.Module` (captured through Dynamo), a `GraphModule` or an `ExportedProgram`; it is left as
            it is.
        args: Example arguments of one call, as a tuple; other batch sizes and lengths work where the model's code
            allows them.
        kwargs: Example keyword arguments, as a dict.
        config: What the streams become: an `AttnResConfig` (variant, blocks, output mode), the default, or a
            `HyperConnectionsConfig`.
        dynamic_shapes: As `torch.export.export` takes them; by default batch and sequence are free.
        check: Run original and result twice in each mode, at zero queries and from one random state, and compare
            outputs, gradients, buffers, and another batch and length where they are free (output `"sum"`).
            `"outputs"` compares outputs alone; False runs nothing. The mode that the model is not in is captured and
            compared when it is first needed: by `train()`, `eval()`, `save`, or a plan.
        lowering: What is folded into the reads when the model runs, `Lowering()` by default; reports, `graph_module`
            and files keep the reads as they were put in.

    Returns:
        A model that shares the original's weights and keeps their names; what it adds is under `attnres`, in the
        dtype most of the weights have. Source: arXiv 2603.15031, section 3.

    Raises:
        ConfigError: `config` or `lowering` has the wrong type, or an option that does not exist.
        AlreadyConvertedError: The model reads through depth attention already.
        ArgumentError: `args`, `kwargs` or `dynamic_shapes` are of the wrong kind.
        CaptureError: The model cannot be traced.
        ExampleError: The model itself fails on the example, when the result is compared with it.
        NoStreamError: It has no residual stream.
        NotAdditiveError: A stream is not a sum of its sublayers' outputs.
        StreamWidthError: The features of a stream are in no one dimension of fixed size.
        StreamNameError: `config.streams` names a stream that does not exist.
        ScheduleError: The blocks of the config do not fit a stream.
        RewriteError: Two graphs of a symbolic trace do not have the same reads.
        CheckError: The result does not compute what the original computes.
    """
    config = checked_config(config)
    lowering = checked_lowering(lowering)
    require_known(check)
    model = uncompiled(model)
    refuse_converted(model)
    if isinstance(model, nn.Module) and not isinstance(model, GraphModule):
        refuse_taken_names(model, ConvertedModel, ADDED)
    with Progress(model_name(model)) as progress:
        progress.step("capturing it")
        captured = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, first_only=True, hooks="around")
        tree = without_tensors(captured.root)
        progress.step("finding and rewriting its streams")
        converted = _converted(model, captured, config, lowering)
        progress.step("comparing it with the original")
        check_conversion(model, converted, captured, check)
    if captured.cloned:
        conversion = converted._attnres_conversion
        placement, example = conversion.placement, (captured.args, captured.kwargs)
        call = ConversionCall(*example, config, dynamic_shapes, check, lowering, placement)
        conversion.deferred = {mode: DeferredMode(mode, call, tree) for mode in captured.untried}
        conversion.pickled = functools.partial(_pickled, call)
        conversion.reconfigure = Reconfiguring(call, tree, _pickled)
        refuse_forwards(converted, conversion.guarded)
        refuse_around_forward(converted, conversion.guarded, conversion.branches)
        conversion.guard_edits(converted, model if isinstance(model, nn.Module) else None)
    return converted


def _pickled(call: ConversionCall, model: ConvertedModel) -> tuple[Any, ...]:
    """What a pickle calls to make the model again; a file's content where the original cannot be pickled."""
    original = model.original(hooks=True)
    call = call.for_model(model)
    call = replace(
        call, kwargs={n: v for n, v in call.kwargs.items() if n not in model._attnres_conversion.signature.bound}
    )
    try:
        pickle.dumps((without_tensors(original), call))
    except Exception:  # whatever an object raises that refuses to be pickled
        return pickled_as_file(model)
    return _unpickled, (original, call, model.attnres, model.report)


def _unpickled(
    original: nn.Module, call: ConversionCall, attnres: AttnResParameters, report: ConversionReport
) -> ConvertedModel:
    """The original of a pickle converted again, with the parameters that the pickled model had."""
    args, kwargs, config = call.args, call.kwargs, call.config
    shapes, lowering = call.dynamic_shapes, call.lowering
    converted = convert(original, args, kwargs, config=config, dynamic_shapes=shapes, check=False, lowering=lowering)
    converted._modules["attnres"] = attnres
    for note in report.notes:
        converted.report.add_note(note)
    if report.difference is not None:
        converted.report.note_difference(report.difference)
    return converted


def _converted(model: Model, captured: Captured, config: RewriteConfig, lowering: Lowering) -> ConvertedModel:
    """The captured model rewritten, in the mode it was in where that was captured; nothing is run."""
    analyses = _analyze(captured)
    plans = _plan(analyses, config, model_name(model))
    mode, plan = next(iter(plans.items()))
    gm = captured.graphs[mode].gm
    guarded = modules_that_add(captured.root, gm, plan)
    methods = methods_that_add(captured.root, gm, plan)
    branches = branches_of_root(captured.root, gm, plan)
    parameters, replacements = _rewrite(captured, analyses, plans, config)
    report = _report(model, captured, analyses[mode], plan, config)
    typed = any(graph.typed for graph in captured.graphs.values())
    conversion = Conversion(report, captured.failures, lowering, typed, pickled=pickled_as_file)
    graphs = {m: (g, replacements[id(g)]) for m, g in captured.graphs.items()}
    if captured.cloned:
        conversion.own = OwnPython.taken_off_(captured.root, methods, hooks=not captured.hooks_around)
        conversion.guarded = {p: captured.root.get_submodule(p).__dict__.get("forward") for p in guarded}
        conversion.branches = branches
        conversion.recapture = Recapturing(config)
    converted = converted_model(captured.root, parameters, graphs, captured.signature, captured.in_spec, conversion)
    starting = _starting_mode(captured)
    if not captured.cloned:  # the modules that a trace calls keep their own flags
        converted.training = starting == "train"
    elif starting != ("train" if captured.training else "eval"):
        nn.Module.train(converted, starting == "train")
    return converted


def _analyze(captured: Captured) -> dict[Mode, StreamSet]:
    """The streams of each graph, by its first mode: modes may share a graph."""
    first_mode: dict[int, Mode] = {}
    for mode, graph in captured.graphs.items():
        first_mode.setdefault(id(graph), mode)
    return {mode: analyze_(captured.graphs[mode].gm) for mode in first_mode.values()}


def _plan(analyses: Mapping[Mode, StreamSet], config: RewriteConfig, model: str) -> dict[Mode, ReadPlan]:
    selected = select_streams(next(iter(analyses.values())), config, model)
    require_same_reads(analyses, selected)
    return {m: topology_of(config).plan(s, same_streams(s, selected), config) for m, s in analyses.items()}


def _rewrite(
    captured: Captured, analyses: Mapping[Mode, StreamSet], plans: Mapping[Mode, ReadPlan], config: RewriteConfig
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


def _report(
    model: Model,
    captured: Captured,
    streams: StreamSet,
    plan: ReadPlan,
    config: RewriteConfig,
) -> ConversionReport:
    notes = [*captured.notes, *(f"no {m} graph: {shortened(why)}" for m, why in captured.failures.items())]
    if captured.cloned and (kept := yielded(captured.root)):
        notes.append(
            f"the model keeps its own {', '.join(kept)}: the library's is reached through its class "
            f"(ConvertedModel.save(converted, path))"
        )
    done = {s.stream.name for s in plan.streams}
    left = [(s, why_left(s, config)) for s in streams.streams if s.name not in done]
    return ConversionReport(
        model=model_name(model),
        config=config,
        streams=plan.streams,
        left=tuple(left),
        refusals=streams.refusals,
        modes=tuple(sorted(captured.graphs)),
        deferred=captured.untried,
        notes=tuple(notes),
    )
