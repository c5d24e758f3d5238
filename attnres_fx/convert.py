"""`convert`, `inspect`, `verify`, `depth_weights`: a traced residual transformer becomes an AttnRes model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from attnres_fx.capture import Captured, Mode, capture, run_untouched
from attnres_fx.config import AttnResConfig
from attnres_fx.converted import ConvertedModel
from attnres_fx.errors import (
    AlreadyConvertedError,
    CheckError,
    NoStreamError,
    NotAdditiveError,
    RewriteError,
    StreamWidthError,
)
from attnres_fx.parameters import AttnResParameters, DepthRead, attribute_name
from attnres_fx.passes import (
    DepthSchedule,
    Read,
    ReadParameters,
    Replacement,
    Stream,
    StreamSet,
    analyze_,
    insert_depth_attention_pass,
    plan_depth_reads,
    plan_schedule,
)
from attnres_fx.passes.graph_tools import fake_parameter, insert_attribute, tensor_of
from attnres_fx.report import ConversionReport, ConvertedStream, StreamReport

log = logging.getLogger(__name__)

Model = nn.Module | ExportedProgram


def inspect(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> StreamReport:
    """Find the residual streams of a model; changes nothing.

    model: an nn.Module, a GraphModule or an ExportedProgram. args, kwargs: example arguments.
    Returns a StreamReport: `print` it, or look at `.streams` and `.refusals`.
    Raises CaptureError where the model cannot be traced.
    """
    _refuse_converted(model)
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
) -> ConvertedModel:
    """Replace the residual streams of a model by attention over depth.

    model: an nn.Module (captured with `torch.export`), a GraphModule or an ExportedProgram; it is left as
        it is. args, kwargs: example arguments; other batch sizes and lengths work where they can.
    config: AttnResConfig(); dynamic_shapes: as `torch.export.export` takes them, by default batch and
        sequence are free. check: run original and result once at zero queries and compare (mode `"sum"`).
    Returns a ConvertedModel that shares the original's weights and keeps their names; what it adds is
    under `attnres`.

    Raises CaptureError, NoStreamError, NotAdditiveError, StreamWidthError, StreamNameError,
    ScheduleError, AlreadyConvertedError or CheckError.
    Source: arXiv 2603.15031, section 3.
    """
    config = config or AttnResConfig()
    _refuse_converted(model)
    captured = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    distinct = {id(g): (mode, g) for mode, g in captured.graphs.items()}
    found = {mode: analyze_(graph.gm) for mode, graph in distinct.values()}
    mode, streams = next(iter(found.items()))
    selected = _select(streams, config, _name(model))
    _require_same_reads(found, selected)
    schedules = {s.name: plan_schedule(s.num_sublayers, config) for s in selected}
    parameters = _make_parameters(captured, mode, streams, selected, config)
    rewritten = {m: _rewrite(captured, m, s, schedules, config, parameters) for m, s in found.items()}
    replacements = {m: rewritten[distinct[id(g)][0]] for m, g in captured.graphs.items()}
    report = _report(model, captured, streams, selected, schedules, config)
    converted = ConvertedModel(
        captured.root,
        parameters,
        {m: (g, replacements[m]) for m, g in captured.graphs.items()},
        captured.failures,
        captured.signature,
        captured.in_spec,
        report,
    )
    nn.Module.train(converted, _starting_mode(captured) == "train")
    if check:
        _self_check(model, converted, captured)
    return converted


def _starting_mode(captured: Captured) -> Mode:
    own: Mode = "train" if captured.training else "eval"
    if own in captured.graphs:
        return own
    other = next(iter(captured.graphs))
    log.warning("no %s graph (%s): the converted model starts in %s mode", own, captured.failures.get(own), other)
    return other


def _refuse_converted(model: Any) -> None:
    if isinstance(model, ConvertedModel):
        raise AlreadyConvertedError(
            "the model is a ConvertedModel already: convert the original again, with another config if you like."
        )


def _name(model: Any) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else "ExportedProgram"


def _select(streams: StreamSet, config: AttnResConfig, name: str) -> tuple[Stream, ...]:
    for refusal in streams.refusals:
        if refusal.stops_conversion:
            kind = NotAdditiveError if refusal.kind == "not additive" else StreamWidthError
            raise kind(f"{name}: at {refusal.place}, {refusal.reason}. {refusal.advice}")
    selected = streams.select(config.streams)
    if selected:
        return selected
    raise NoStreamError(_no_stream_message(streams, name))


def _no_stream_message(streams: StreamSet, name: str) -> str:
    why = "; ".join(f"{r.place}: {r.reason}" for r in streams.refusals)
    return (
        f"{name} has no residual stream: no addition x + f(x) was found in which f does more than elementwise "
        f"work on x." + (f" What came near: {why}." if why else "") + " See attnres_fx.inspect(model, args, kwargs)."
    )


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


def _make_parameters(
    captured: Captured, mode: Mode, streams: StreamSet, selected: Sequence[Stream], config: AttnResConfig
) -> AttnResParameters:
    by_name = {n.name: n for n in captured.graphs[mode].gm.graph.nodes}
    gated = config.output == "sum"
    reads = [(s, r) for s in selected for r in s.depth_reads]
    reads.sort(key=lambda pair: streams.sums.order[by_name[pair[1].site]])
    made = []
    for stream, read in reads:
        value = tensor_of(by_name[read.site])
        assert value is not None
        dtype = _parameter_dtype(captured.root) or value.dtype
        made.append(
            DepthRead(
                read.name,
                stream.width,
                gated=gated and stream.post_norm,
                dtype=dtype,
                device=_device(value, captured),
            )
        )
    return AttnResParameters(made, config)


def _parameter_dtype(root: nn.Module) -> torch.dtype | None:
    """The dtype most of the model's floating-point weights have."""
    counts: dict[torch.dtype, int] = {}
    for parameter in root.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda d: counts[d], default=None)


def _device(value: Tensor, captured: Captured) -> torch.device:
    fake = any(isinstance(p, FakeTensor) for p in captured.root.parameters())
    return torch.device("meta") if fake else value.device


def _rewrite(
    captured: Captured,
    mode: Mode,
    streams: StreamSet,
    schedules: Mapping[str, DepthSchedule],
    config: AttnResConfig,
    parameters: AttnResParameters,
) -> tuple[Replacement, ...]:
    gm = captured.graphs[mode].gm
    gm.add_module("attnres", parameters)
    result = insert_depth_attention_pass(
        gm,
        streams=streams,
        schedules=schedules,
        output=config.output,
        eps=config.eps,
        fetch=lambda stream, read, like: _fetch(gm.graph, parameters, read, like),
    )
    return result.replaced


def _fetch(graph: Graph, parameters: AttnResParameters, read: Read, like: Node) -> ReadParameters:
    module = parameters.reads[read.name]
    value = tensor_of(like)
    assert value is not None

    def attribute(name: str) -> Node:
        held = getattr(module, name)
        fake = fake_parameter(value, tuple(held.shape), held.dtype)
        return insert_attribute(graph, f"attnres.reads.{attribute_name(read.name)}.{name}", like=like, value=fake)

    gate = attribute("gate") if module.gate is not None else None
    return ReadParameters(attribute("query"), attribute("key_weight"), gate)


def _report(
    model: Model,
    captured: Captured,
    streams: StreamSet,
    selected: Sequence[Stream],
    schedules: Mapping[str, DepthSchedule],
    config: AttnResConfig,
) -> ConversionReport:
    notes = [*captured.notes, *(f"no {m} graph: {why}" for m, why in captured.failures.items())]
    left = [(s, _why_left(s, config)) for s in streams.streams if s not in selected]
    done = [
        ConvertedStream(s, schedules[s.name], plan_depth_reads(s, schedules[s.name], config.output)) for s in selected
    ]
    return ConversionReport(
        model=_name(model),
        config=config,
        streams=tuple(done),
        left=tuple(left),
        refusals=streams.refusals,
        modes=tuple(sorted(captured.graphs)),
        notes=tuple(notes),
    )


def _why_left(stream: Stream, config: AttnResConfig) -> str:
    if stream.nested_in is not None and config.streams == "main":
        return f"inside a sublayer of {stream.nested_in!r}; streams='all' converts it too"
    return f"not named in streams={config.streams!r}"


# --- checking ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputDifference:
    """How far one output leaf is off: largest absolute difference, and that over the largest output."""

    name: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class VerifyReport:
    """Differences of a converted model's outputs from the original's, at zero queries, in one mode."""

    mode: str
    outputs: tuple[OutputDifference, ...]
    tolerance: float

    @property
    def worst(self) -> float:
        """Largest relative difference over all outputs."""
        return max((o.relative for o in self.outputs), default=0.0)

    @property
    def passed(self) -> bool:
        return self.worst <= self.tolerance

    def __str__(self) -> str:
        rows = [{"output": o.name, "absolute": o.absolute, "relative": o.relative} for o in self.outputs]
        verdict = "agree" if self.passed else "DIFFER"
        table = tabulate(rows, headers="keys", tablefmt="simple", floatfmt=".2e")
        return f"{self.mode} mode, zero queries: outputs {verdict} to {self.tolerance:.0e}\n\n{table}"


_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def verify(
    model: nn.Module,
    converted: ConvertedModel,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Run original and converted model once, with queries and gates at zero and key gains at one.

    Both run in the converted model's mode, without gradients, from one random state; neither is changed.
    Returns a VerifyReport: the worst differences, output by output. In mode `"mean"` outputs of a network
    with norms differ by what their eps makes of it, and `local` starts elsewhere (docs/semantics.md).
    """
    mode, kwargs = converted.mode, dict(kwargs or {})
    before = run_untouched(model, args, {**converted.signature.bound_values, **kwargs}, mode)
    after = _run_at_zero(converted, args, kwargs, mode)
    return _compare(before, after, mode)


def _run_at_zero(converted: ConvertedModel, args: Any, kwargs: Any, mode: Mode) -> Any:
    """Outputs with the added parameters at the values a fresh conversion gives them."""
    at_zero = _AtZero(converted)
    return run_untouched(at_zero, args, kwargs, mode)


class _AtZero(nn.Module):
    def __init__(self, converted: ConvertedModel) -> None:
        super().__init__()
        self.converted = converted
        nn.Module.train(self, converted.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fresh = {
            n: torch.ones_like(p) if n.endswith(".key_weight") else torch.zeros_like(p)
            for n, p in self.converted.named_parameters()
            if n.startswith("attnres.")
        }
        return torch.func.functional_call(self.converted, fresh, args, kwargs)


def _compare(before: Any, after: Any, mode: str) -> VerifyReport:
    pairs, _spec = pytree.tree_flatten_with_path(before)
    leaves = pytree.tree_leaves(after)
    if len(pairs) != len(leaves):
        raise CheckError(f"the converted model returns {len(leaves)} values and the original {len(pairs)}.")
    found, tolerance = [], 0.0
    for (path, x), y in zip(pairs, leaves, strict=True):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
            continue
        if not isinstance(y, Tensor) or x.shape != y.shape or x.dtype != y.dtype:
            raise CheckError(f"output {pytree.keystr(path)} is {_kind(x)} in the original and {_kind(y)} here.")
        found.append(_difference(pytree.keystr(path) or "output", x, y))
        tolerance = max(tolerance, _TOLERANCE.get(x.dtype, 8e-2))
    return VerifyReport(mode, tuple(found), tolerance or 1e-5)


def _kind(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _difference(name: str, x: Tensor, y: Tensor) -> OutputDifference:
    x, y = x.detach().double(), y.detach().double()
    finite = torch.isfinite(x)
    if not torch.equal(finite, torch.isfinite(y)):
        return OutputDifference(name, float("inf"), float("inf"))
    absolute = float(torch.where(finite, x - y, 0).abs().max())
    largest = float(torch.where(finite, x, 0).abs().max())
    return OutputDifference(name, absolute, absolute / largest if largest else absolute)


def _self_check(model: Model, converted: ConvertedModel, captured: Captured) -> None:
    """Raise CheckError where a fresh conversion does not compute what the original computes."""
    tensors = [*pytree.tree_leaves((captured.args, captured.kwargs)), *converted.parameters()]
    if any(isinstance(t, Tensor) and (t.is_meta or isinstance(t, FakeTensor)) for t in tensors):
        return
    if not captured.args and not captured.kwargs and converted.signature.args:
        return
    original = model.module() if isinstance(model, ExportedProgram) else model
    differences = []
    for mode in captured.graphs:
        before = run_untouched(original, captured.args, captured.kwargs, mode)
        with _temporarily(converted, mode):
            report = _compare(before, _run_at_zero(converted, captured.args, captured.kwargs, mode), mode)
        if converted.report.config.output == "sum" and not report.passed:
            raise CheckError(
                f"the converted model does not compute what the original computes:\n{report}\n"
                f"This is a defect of attnres_fx, or the capture lost something: compare with "
                f"torch.export.export(model, args, kwargs).module(). check=False skips this comparison."
            )
        differences.append(report.worst)
    object.__setattr__(converted.report, "difference", max(differences))


class _temporarily:
    def __init__(self, converted: ConvertedModel, mode: Mode) -> None:
        self.converted, self.mode = converted, mode
        self.before = converted.training

    def __enter__(self) -> None:
        nn.Module.train(self.converted, self.mode == "train")

    def __exit__(self, *_: object) -> None:
        nn.Module.train(self.converted, self.before)
