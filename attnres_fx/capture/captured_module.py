"""An `nn.Module` to graphs: through Dynamo, or through `torch.export` where Dynamo refuses a model that it takes."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_fx.capture.captured import Captured, CapturedGraph
from attnres_fx.capture.dynamo_module import trace_module
from attnres_fx.capture.example_call import ExampleCall
from attnres_fx.capture.exported_module import export_module
from attnres_fx.capture.free_sizes import free_dimensions, marked_dimensions
from attnres_fx.capture.isolated_run import Mode, run_untouched, set_mode_
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.capture.recorder import DynamoRefusal
from attnres_fx.capture.signature import signature_of
from attnres_fx.errors import CaptureError
from attnres_fx.passes.graph.example_sizes import remember_example_sizes


def capture_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    modes: Sequence[Mode],
    *,
    as_called: bool = False,
    first_only: bool = False,
    in_aten: bool = False,
) -> Captured:
    """The graphs of a module in the modes asked for, its own first.

    With `as_called` the example is a call: its sizes of 1 are what is wanted, and a graph that leaves other sizes free
    is not tried at 1. With `first_only` the first mode that can be captured is enough. With `in_aten` the graphs are
    exported, for those who only look at them: they hold the values of a call, and not all of its backward.
    """
    refuse_prepared(model)
    own: Mode = "train" if model.training else "eval"
    notes: list[str] = []
    bound = _bind_cache_off(model, args, kwargs)
    if bound:
        notes.append("use_cache=False is bound: a cache object cannot be captured")
    kwargs = {**kwargs, **bound}
    call = ExampleCall(model, args, kwargs, dynamic_shapes, as_called)
    graphs: dict[Mode, CapturedGraph] = {}
    failures: dict[Mode, str] = {}
    for mode in sorted(modes, key=lambda m: m != own):
        if graphs and first_only:
            break
        try:
            graphs[mode] = export_module(call, mode, notes) if in_aten else _captured(call, mode, notes)
            _note_sizes_of(call, graphs[mode])
        except CaptureError as error:
            failures[mode] = str(error)
    if not graphs:
        raise CaptureError(next(iter(failures.values())))
    signature = signature_of(model.forward, args, kwargs, tuple(bound))
    root, _ = clone_tree(model)
    in_spec = pytree.tree_structure((args, kwargs))
    notes = sorted(set(notes))
    untried = tuple(m for m in modes if m not in graphs and m not in failures)
    training = own == "train"
    return Captured(graphs, failures, root, signature, in_spec, training, args, kwargs, notes, True, untried)


def _note_sizes_of(call: ExampleCall, graph: CapturedGraph) -> None:
    """Say what the graph's sizes were in the example itself, which may have been traced with two rows."""
    sizes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in call.leaves]
    graph.shapes = tuple(s and replace(s, example=own) for s, own in zip(graph.shapes, sizes, strict=True))
    remember_example_sizes(graph.gm, sizes)


def _captured(call: ExampleCall, mode: Mode, notes: list[str]) -> CapturedGraph:
    """One mode through Dynamo, or exported where Dynamo refuses the model."""
    try:
        graph = _traced(call.to_trace(), mode, notes)
    except DynamoRefusal as error:
        graph = export_module(call, mode, notes, error.reason)
        graph.flags = _flags(call.model, mode)
        notes.append(
            f"captured by torch.export, because Dynamo refuses the model ({_first_line(error)}): such a graph holds "
            f"the values of a call and its derivatives by the chain rule, and no custom backward, hook or checkpoint"
        )
    if graph.unkept:
        listed = ", ".join(dict.fromkeys(str(c).split(":")[0] for c in graph.unkept))
        notes.append(f"{listed}: a first call sets it once; the graph makes what depends on it at every call")
    return graph


def _flags(model: nn.Module, mode: Mode) -> tuple[tuple[str, bool], ...]:
    """Every submodule's `training` flag in a mode: an export does not say which ones it read."""
    clone, _ = clone_tree(model)
    set_mode_(clone, mode)
    return tuple((path, module.training) for path, module in clone.named_modules() if path)


def _traced(call: ExampleCall, mode: Mode, notes: list[str]) -> CapturedGraph:
    """Through Dynamo, giving up freedom of sizes only as far as it must."""
    if call.dynamic_shapes is not None:
        return trace_module(call, mode, marked_dimensions(call.model, call.args, call.kwargs, call.dynamic_shapes))
    free = free_dimensions(call.leaves, 2)
    try:
        return trace_module(call, mode, free)
    except DynamoRefusal as error:
        if not any(free.values()):
            raise
        why = _first_line(error)
    fixed = trace_module(call, mode, {})  # raises where it was not for the sizes
    try:
        graph = trace_module(call, mode, free_dimensions(call.leaves, 1))
    except DynamoRefusal:
        notes.append(f"the sizes of all arguments are fixed: {why}")
        return fixed
    notes.append(f"only the first dimension of each argument is free: {why}")
    return graph


def _first_line(error: BaseException) -> str:
    """What an error of the tracer says, short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200].rsplit(' ', 1)[0]} …"


def refuse_prepared(model: nn.Module) -> None:
    """Raise CaptureError for a model that another library has changed in a way that no tracer sees through."""
    for path, module in model.named_modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            raise CaptureError(
                f"{path or type(model).__name__} is sharded by FSDP (fully_shard): its parameters are gathered by "
                f"hooks that no tracer follows. Attach or convert the model first, and shard it afterwards."
            )


def _bind_cache_off(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
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
