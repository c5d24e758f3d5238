"""An `nn.Module` to graphs, by `torch.export` in each mode."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnres_fx.capture.captured import Captured, CapturedGraph, graph_of_export
from attnres_fx.capture.isolated_run import Mode, checkpoint_watch, fast_path_off, in_mode, mirror, run_untouched
from attnres_fx.capture.signature import signature_of
from attnres_fx.capture.sizes import free_sizes, refused_ones, without_ones
from attnres_fx.errors import AttnResError, CaptureError


def capture_module(
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
        graphs[mode] = graph_of_export(program)
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
