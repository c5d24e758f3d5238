"""A graph that somebody else traced, as a capture: an export, its module, or a symbolic trace."""

from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from attnres_fx.capture.captured import Captured, CapturedGraph, flatten_arguments_, graph_of_export
from attnres_fx.capture.isolated_run import Mode, shared_copy
from attnres_fx.capture.root_hooks import copy_hooks_
from attnres_fx.capture.signature import CallSignature, child_specs, constants_in
from attnres_fx.capture.sizes import input_shapes
from attnres_fx.passes.graph.operations import trains
from attnres_fx.passes.normalize.normalization import propagate_values_


def capture_program(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """An export as a capture, on a copy of its modules; its own example where none is passed."""
    if not args and not kwargs and program.example_inputs is not None:
        args, kwargs = program.example_inputs
    graph = graph_of_export(program)
    what = "an exported program"
    return _captured_export(what, graph, shared_copy(graph.gm), program.call_spec.in_spec, tuple(args), dict(kwargs))


def capture_graph_module(model: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """A copy of a graph module as a capture: the module of an export, or a symbolic trace."""
    gm = shared_copy(model)
    if not (hasattr(model, "_in_spec") and hasattr(model, "_out_spec")):
        copy_hooks_(model, gm)  # a copy of a graph module comes without; those of an export check its arguments
        return _captured_trace(gm, args, kwargs)
    guards = flatten_arguments_(gm)
    graph = CapturedGraph(gm, model._out_spec, input_shapes(gm), {}, guards, typed=True)
    return _captured_export("an exported graph", graph, gm, model._in_spec, args, kwargs)


def _captured_export(
    what: str, graph: CapturedGraph, root: nn.Module, in_spec: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Captured:
    mode = _mode_of(graph.gm) or "eval"
    names, keywords = _argument_names(in_spec, graph.gm)
    constants = constants_in({**dict(zip(names, args, strict=False)), **kwargs})
    return Captured(
        graphs={mode: graph},
        failures={_other(mode): f"{what} holds one mode; convert the nn.Module to get both"},
        root=root,
        signature=CallSignature(names, names, keywords, constants),
        in_spec=in_spec,
        training=mode == "train",
        args=args,
        kwargs=kwargs,
    )


def _argument_names(in_spec: Any, gm: GraphModule) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of positional and keyword arguments of a captured tree, positional ones by their placeholder."""
    placeholders = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    positional, keyword = child_specs(in_spec)
    names, at = [], 0
    for i, spec in enumerate(child_specs(positional)):
        single = spec.num_leaves == 1 and at < len(placeholders)
        names.append(placeholders[at] if single else f"args_{i}")
        at += spec.num_leaves
    return tuple(names), tuple(keyword.context or ())


def _captured_trace(gm: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    signature = _trace_signature(gm)
    if args or kwargs:
        args, kwargs = signature.bind(args, kwargs)
    propagate_values_(gm, args)
    mode = _mode_of(gm)
    graph = CapturedGraph(gm, None, tuple(None for _ in signature.args), {})
    if mode is None:  # nothing in it depends on the mode
        return Captured({"train": graph, "eval": graph}, {}, gm, signature, None, gm.training, args, kwargs)
    missing = f"the graph was traced in {mode} mode; trace it in the other one, or convert the nn.Module"
    return Captured({mode: graph}, {_other(mode): missing}, gm, signature, None, mode == "train", args, kwargs)


def _trace_signature(gm: GraphModule) -> CallSignature:
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    names = tuple(str(n.target).lstrip("*") for n in placeholders)
    defaults = {str(n.target): n.args[0] for n in placeholders if n.args}
    return CallSignature(names, names, (), {n: v for n, v in defaults.items() if not isinstance(v, Tensor)})


def _mode_of(gm: GraphModule) -> Mode | None:
    """The mode a graph was traced in, as far as its nodes tell."""
    baked = {trains(n) for n in gm.graph.nodes} - {None}
    return None if not baked else "train" if True in baked else "eval"


def _other(mode: Mode) -> Mode:
    return "eval" if mode == "train" else "train"
