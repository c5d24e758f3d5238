"""What a capture returns: a model's graphs by mode, and how it is called."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from attnres_fx.capture.assumed import Assumed
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.side_effects import PythonChange, TensorWrite
from attnres_fx.capture.signature import CallSignature, InputShape
from attnres_fx.capture.sizes import Guards, input_shapes, sizes_of, take_guards
from attnres_fx.capture.watched import WatchedValue


@dataclass
class CapturedGraph:
    """One mode of a model as a graph with flat inputs and outputs.

    Attributes:
        gm: the graph, free to be changed; its tensors are the model's own.
        out_spec: pytree of the outputs, None where the graph returns them in their structure.
        shapes: one entry per input, None where it is no tensor.
        ranges: the least and the greatest size of each symbol, None where there is no greatest.
        guards: checks the flat inputs for what the tracer took for granted.
        writes: the outputs after those of `out_spec`, and where each call stores them.
        watched: values of the model that became part of the graph.
        unkept: what a first call changes of the model's Python state and calls of the graph do not.
        lost: what of the model's backward the graph does not hold, in words.
        flags: the `training` flags of submodules that the trace read, by path; None where that is not known.
        typed: whether the graph has dtypes and devices of the example written into it, as an exported one has.
        assumed: what holds of the calls that the graph is right for.
    """

    gm: GraphModule
    out_spec: Any
    shapes: tuple[InputShape | None, ...]
    ranges: dict[str, tuple[int, int | None]]
    guards: Guards | None = None
    writes: tuple[TensorWrite, ...] = ()
    watched: tuple[WatchedValue, ...] = ()
    unkept: tuple[PythonChange, ...] = ()
    lost: tuple[str, ...] = ()
    typed: bool = False
    assumed: Assumed = field(default_factory=Assumed)
    flags: tuple[tuple[str, bool], ...] | None = None


@dataclass
class Captured:
    """All graphs of a model, and how they are called.

    Attributes:
        graphs: by mode; modes may share one.
        failures: by mode, why there is no graph.
        root: modules of their own that hold the model's parameters and buffers.
        cloned: whether `root` is a clone of the model, with its classes and attributes.
        signature: the arguments of a call.
        in_spec: pytree of (args, kwargs), None where the graph takes them as they are.
        training: whether the model was in train mode.
        args: example arguments by position.
        kwargs: example arguments by keyword, with those that the capture bound.
        notes: what a user should know.
        untried: the modes that were left out because one was enough.
        hooks_around: whether the forward hooks on the model itself are no part of the graphs, and fire around them.
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
    cloned: bool = False
    untried: tuple[Mode, ...] = ()
    hooks_around: bool = False


def flatten_arguments_(gm: GraphModule) -> Guards | None:
    """Make the module of an export take flat inputs and return flat outputs, in place.

    Args:
        gm: what `ExportedProgram.module()` returns.

    Returns:
        The check of the flat inputs that it held, None where it held none.
    """
    guards = take_guards(gm)
    gm.graph.set_codegen(CodeGen())
    gm.recompile()
    return guards


def flat_module(program: ExportedProgram) -> tuple[GraphModule, Guards | None]:
    """An export as a graph module with flat inputs and outputs, and the check of its inputs."""
    gm = program.module()
    assert isinstance(gm, GraphModule)
    return gm, flatten_arguments_(gm)


def graph_of_export(program: ExportedProgram) -> CapturedGraph:
    """An export as a captured graph."""
    gm, guards = flat_module(program)
    ranges = {str(symbol): sizes_of(bounds) for symbol, bounds in program.range_constraints.items()}
    return CapturedGraph(gm, program.call_spec.out_spec, input_shapes(gm), ranges, guards, typed=True)
