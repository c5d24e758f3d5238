"""Model to traced graphs: `torch.export` for a module, or a graph that somebody else traced."""

import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from attnres_fx.capture.isolated_run import (
    Mode,
    checkpoint_watch,
    fast_path_off,
    in_mode,
    mirror,
    run_untouched,
    shared_copy,
)
from attnres_fx.capture.signature import CallSignature, InputShape, constants_in, signature_of
from attnres_fx.capture.sizes import Guards, free_sizes, input_shapes, refused_ones, sizes_of, take_guards, without_ones
from attnres_fx.errors import ArgumentError, AttnResError, CaptureError
from attnres_fx.passes.graph.operations import trains
from attnres_fx.passes.normalize.normalization import propagate_values_

log = logging.getLogger(__name__)


@dataclass
class CapturedGraph:
    """One mode of a model as a graph with flat inputs and outputs.

    gm: ours to change; its tensors are the model's own. out_spec: pytree of the outputs, None where the
    graph returns them in their structure. shapes: one entry an input. ranges: sizes of each symbol.
    guards: checks the flat inputs for what the tracer took for granted.
    """

    gm: GraphModule
    out_spec: Any
    shapes: tuple[InputShape | None, ...]
    ranges: dict[str, tuple[int, int | None]]
    guards: Guards | None = None


@dataclass
class Captured:
    """All graphs of a model.

    graphs: by mode. failures: by mode, why there is none. root: the modules that hold the model's
    parameters and buffers, ours. in_spec: pytree of (args, kwargs), None where the graph takes them as
    they are. notes: what a user should know.
    """

    graphs: dict[Mode, CapturedGraph]
    failures: dict[Mode, str]
    root: nn.Module
    signature: CallSignature
    in_spec: Any
    training: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def capture(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    *,
    dynamic_shapes: Any = None,
    modes: Sequence[Mode] = ("train", "eval"),
) -> Captured:
    """Trace a model in the modes asked for, its own first; a graph module is taken as it is.

    Raises CaptureError where the model's own mode, and every other, cannot be traced.
    """
    if isinstance(args, Tensor) or not isinstance(args, Sequence):
        raise ArgumentError(
            f"args must be a tuple of example arguments; it is a {type(args).__name__}. Write (x,) for a single one."
        )
    args, kwargs = tuple(args), dict(kwargs or {})
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module cannot be captured: pass the nn.Module it was made from.")
    if isinstance(model, ExportedProgram):
        return _from_exported(model, args, kwargs)
    if isinstance(model, GraphModule):
        return _from_graph_module(model, args, kwargs)
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: pass an nn.Module, a torch.fx.GraphModule or an ExportedProgram."
        )
    return _from_module(model, args, kwargs, dynamic_shapes, modes)


# --- an nn.Module ------------------------------------------------------------------------------------


def _from_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    modes: Sequence[Mode],
) -> Captured:
    own: Mode = "train" if model.training else "eval"
    notes: list[str] = []
    bound = _bind_cache_off(model, args, kwargs)
    if bound:
        notes.append("use_cache=False is bound: a cache object cannot be captured")
    kwargs = {**kwargs, **bound}
    example = without_ones(model, args, kwargs) if dynamic_shapes is None else (args, kwargs)
    # Strides of an example would become guards, and they change no value.
    example = pytree.tree_map(lambda x: x.contiguous() if isinstance(x, Tensor) else x, example)
    graphs: dict[Mode, CapturedGraph] = {}
    failures: dict[Mode, str] = {}
    in_spec = None
    for mode in sorted({*modes, own}, key=lambda m: m != own):
        if mode not in modes:
            continue
        try:
            program = _export(model, mode, example[0], example[1], dynamic_shapes, notes)
        except CaptureError as error:
            failures[mode] = str(error)
            continue
        graphs[mode] = _graph_of(program)
        refused = refused_ones(model, graphs[mode].gm, graphs[mode].shapes, example[0], example[1], mode)
        for symbol in refused.keys() & graphs[mode].ranges.keys():
            graphs[mode].ranges[symbol] = (2, graphs[mode].ranges[symbol][1])
            notes.append(f"{refused[symbol]} must be 2 or more: at 1 the graph does not compute what the model does")
        in_spec = program.call_spec.in_spec
    if not graphs:
        raise CaptureError(failures[own])
    signature = signature_of(model.forward, args, kwargs, tuple(bound))
    return Captured(
        graphs, failures, mirror(model), signature, in_spec, own == "train", args, kwargs, sorted(set(notes))
    )


def _export(
    model: nn.Module, mode: Mode, args: Any, kwargs: Any, dynamic_shapes: Any, notes: list[str]
) -> ExportedProgram:
    """Export in one mode, giving up freedom of sizes only as far as it must."""
    attempts = _attempts(model, args, kwargs, dynamic_shapes)
    errors: list[Exception] = []
    for shapes, what_is_lost in attempts:
        with (
            in_mode(model, mode),
            fast_path_off(),
            checkpoint_watch() as checkpointed,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            try:
                program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            except AttnResError:
                raise
            except Exception as error:  # the tracer lets anything the model raises through
                errors.append(error)
                continue
        if what_is_lost:
            notes.append(what_is_lost)
        if checkpointed and mode == "train":
            warnings.warn(
                "the model checkpoints activations, which torch.export does not keep: the converted model saves "
                "them all. The compile backend keeps checkpointing.",
                stacklevel=4,
            )
        return program
    raise CaptureError(_capture_message(model, mode, errors[-1])) from errors[-1]


def _capture_message(model: nn.Module, mode: Mode, error: Exception) -> str:
    cause = " ".join(str(error).split()) or type(error).__name__
    return (
        f"{type(model).__name__} could not be captured in {mode} mode: {type(error).__name__}: {cause[:600]}. "
        f"Try torch.export.export(model, args, kwargs, strict=False) alone to see the whole trace; then remove "
        f"the data-dependent code it names, pass other example arguments, capture a part of the model, or trace "
        f"it yourself (torch.fx.symbolic_trace, torch.export) and convert the graph."
    )


def _attempts(model: nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any) -> list[tuple[Any, str]]:
    if dynamic_shapes is not None:
        return [(dynamic_shapes, "")]
    free = [free_sizes(model, args, kwargs, limit) for limit in (2, 1)]
    attempts = [(free[0], ""), (free[1], "only the first dimension of each argument is free"), (None, "")]
    attempts[-1] = (None, "the sizes of all arguments are fixed")
    kept: list[tuple[Any, str]] = []
    for attempt in attempts:
        if attempt[0] not in [k[0] for k in kept]:
            kept.append(attempt)
    return kept


def _bind_cache_off(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """`use_cache=False` where the model returns an object pytree does not know and takes that argument."""
    parameters = inspect.signature(model.forward).parameters
    names = list(parameters)
    named = "use_cache" in parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "use_cache" in kwargs or not (named or takes_any) or (named and names.index("use_cache") < len(args)):
        return {}
    try:
        if _is_plain(run_untouched(model, args, kwargs, "eval")):
            return {}
        off = {**kwargs, "use_cache": False}
        return {"use_cache": False} if named or _is_plain(run_untouched(model, args, off, "eval")) else {}
    except Exception:
        return {}  # whatever is wrong, the capture says it better


def _is_plain(output: Any) -> bool:
    known = (Tensor, int, float, bool, str, type(None))
    return all(isinstance(leaf, known) for leaf in pytree.tree_leaves(output))


def _graph_of(program: ExportedProgram) -> CapturedGraph:
    gm = program.module()
    assert isinstance(gm, GraphModule)
    guards = take_guards(gm)
    gm.graph.set_codegen(CodeGen())
    gm.recompile()
    ranges = {str(symbol): sizes_of(bounds) for symbol, bounds in program.range_constraints.items()}
    return CapturedGraph(gm, program.call_spec.out_spec, input_shapes(gm), ranges, guards)


# --- a graph somebody else traced --------------------------------------------------------------------


def _from_exported(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    if not args and not kwargs and program.example_inputs is not None:
        args, kwargs = program.example_inputs
    graph = _graph_of(program)
    mode = _mode_of(graph.gm) or "eval"
    names, keywords = _names_in(program.call_spec.in_spec, graph.gm)
    signature = CallSignature(names, names, keywords, _given_constants(names, args, kwargs))
    root = shared_copy(graph.gm)
    return Captured(
        graphs={mode: graph},
        failures={_other(mode): "an exported program holds one mode; convert the nn.Module to get both"},
        root=root,
        signature=signature,
        in_spec=program.call_spec.in_spec,
        training=mode == "train",
        args=tuple(args),
        kwargs=dict(kwargs),
    )


def _given_constants(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return constants_in({**dict(zip(names, args, strict=False)), **kwargs})


def _names_in(in_spec: Any, gm: GraphModule) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of positional and keyword arguments of a captured tree, positional ones by their placeholder."""
    placeholders = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    positional, keyword = in_spec.children() if callable(getattr(in_spec, "children", None)) else in_spec.children_specs
    names, at = [], 0
    specs = positional.children() if callable(getattr(positional, "children", None)) else positional.children_specs
    for i, spec in enumerate(specs):
        single = spec.num_leaves == 1 and at < len(placeholders)
        names.append(placeholders[at] if single else f"args_{i}")
        at += spec.num_leaves
    return tuple(names), tuple(keyword.context or ())


def _from_graph_module(model: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    if hasattr(model, "_in_spec") and hasattr(model, "_out_spec"):
        return _from_exported_module(model, args, kwargs)
    gm = shared_copy(model)
    names = tuple(str(n.target).lstrip("*") for n in gm.graph.nodes if n.op == "placeholder")
    defaults = {str(n.target): n.args[0] for n in gm.graph.nodes if n.op == "placeholder" and n.args}
    signature = CallSignature(names, names, (), {n: v for n, v in defaults.items() if not isinstance(v, Tensor)})
    if args or kwargs:
        args, kwargs = signature.bind(args, kwargs)
    propagate_values_(gm, args)
    mode = _mode_of(gm)
    modes: tuple[Mode, ...] = (mode,) if mode else ("train", "eval")
    graph = CapturedGraph(gm, None, tuple(None for _ in names), {})
    failures: dict[Mode, str] = (
        {_other(mode): f"the graph was traced in {mode} mode; trace it in the other one, or convert the nn.Module"}
        if mode
        else {}
    )
    training = mode == "train" if mode else model.training
    return Captured(dict.fromkeys(modes, graph), failures, gm, signature, None, training, args, kwargs)


def _from_exported_module(model: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    gm = shared_copy(model)
    guards = take_guards(gm)
    in_spec, out_spec = model._in_spec, model._out_spec
    gm.graph.set_codegen(CodeGen())
    gm.recompile()
    mode = _mode_of(gm) or "eval"
    names, keywords = _names_in(in_spec, gm)
    return Captured(
        graphs={mode: CapturedGraph(gm, out_spec, input_shapes(gm), {}, guards)},
        failures={_other(mode): "an exported graph holds one mode; convert the nn.Module to get both"},
        root=gm,
        signature=CallSignature(names, names, keywords, _given_constants(names, args, kwargs)),
        in_spec=in_spec,
        training=mode == "train",
        args=args,
        kwargs=kwargs,
    )


def _mode_of(gm: GraphModule) -> Mode | None:
    """The mode a graph was traced in, as far as its nodes tell."""
    baked = {trains(n) for n in gm.graph.nodes} - {None}
    return None if not baked else "train" if True in baked else "eval"


def _other(mode: Mode) -> Mode:
    return "eval" if mode == "train" else "train"
