"""Model to traced graphs, whatever was given: a module, a graph module or an exported program."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from attnres_fx.capture.captured import Captured
from attnres_fx.capture.captured_module import Hooks, capture_module
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.traced_graph import capture_graph_module, capture_program
from attnres_fx.errors import ArgumentError, CaptureError


def capture(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    *,
    dynamic_shapes: Any = None,
    modes: Sequence[Mode] = ("train", "eval"),
    first_only: bool = False,
    in_aten: bool = False,
    hooks: Hooks = "traced",
    python_runs: bool = False,
) -> Captured:
    """Trace a model in the modes asked for, its own first; a graph module is taken as it is.

    Args:
        model: the model, or a graph that was traced from one.
        args: example arguments by position: tensors of any dtype, and what is no tensor and so becomes part of the
            graph.
        kwargs: example arguments by keyword.
        dynamic_shapes: which sizes are free, as for `torch.export.export`; by default the first two dimensions of
            each tensor, or as many of them as the tracer accepts.
        modes: for an `nn.Module`, the modes to trace.
        first_only: for an `nn.Module`, whether to stop at the first mode that could be traced.
        in_aten: for an `nn.Module`, whether its graphs shall be of aten operations, for those who only look at them.
        hooks: for an `nn.Module`, what becomes of the hooks on it: see `capture_module`.
        python_runs: for an `nn.Module`, whether its own Python will run at every call.

    Returns:
        The graphs by mode, and how they are called. The model is as it was, and its tensors are shared.

    Raises:
        ArgumentError: `args` is no sequence, or `kwargs` no dict.
        CaptureError: no mode could be traced.
    """
    _require_example(args, kwargs)
    _require_model(model)
    args, kwargs = tuple(args), dict(kwargs or {})
    if isinstance(model, ExportedProgram):
        return capture_program(model, args, kwargs)
    if isinstance(model, GraphModule):
        return capture_graph_module(model, args, kwargs)
    return capture_module(
        model,
        args,
        kwargs,
        dynamic_shapes,
        modes,
        first_only=first_only,
        in_aten=in_aten,
        hooks=hooks,
        python_runs=python_runs,
    )


def _require_example(args: Any, kwargs: Any) -> None:
    if isinstance(args, Tensor) or not isinstance(args, Sequence):
        raise ArgumentError(
            f"args must be a tuple of example arguments; it is a {type(args).__name__}. Write (x,) for a single one."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ArgumentError(f"kwargs must be a dict of example arguments by name; it is a {type(kwargs).__name__}.")


def _require_model(model: Any) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module cannot be captured: pass the nn.Module it was made from.")
    if isinstance(model, type):
        raise CaptureError(f"cannot capture the class {model.__name__}: pass an object of it, {model.__name__}(...).")
    if not isinstance(model, nn.Module | ExportedProgram):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: pass an nn.Module, a torch.fx.GraphModule or an ExportedProgram."
        )
