"""An `nn.Module` to graphs: through Dynamo, or through `torch.export` where Dynamo refuses a model that it takes."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from attnres_fx.capture.assumed import aliases, constants_of
from attnres_fx.capture.captured import Captured, CapturedGraph
from attnres_fx.capture.dynamo_module import trace_module
from attnres_fx.capture.example_call import ExampleCall
from attnres_fx.capture.exported_module import export_module
from attnres_fx.capture.free_sizes import free_dimensions, marked_dimensions
from attnres_fx.capture.isolated_run import Mode, run_untouched, set_mode_
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.capture.recorder import DynamoRefusal
from attnres_fx.capture.root_hooks import hook_state, without_hooks
from attnres_fx.capture.signature import has_own_call, parameters_of_call, signature_of
from attnres_fx.errors import CaptureError
from attnres_fx.passes.graph.example_sizes import remember_example_sizes
from attnres_fx.shown import shortened

#: What becomes of the hooks on a model itself.
Hooks = Literal["traced", "stateless", "around"]


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
    hooks: Hooks = "traced",
    python_runs: bool = False,
) -> Captured:
    """The graphs of a module in the modes asked for, its own first.

    With `as_called` the example is a call: its sizes of 1 are what is wanted, and a graph that leaves other sizes free
    is not tried at 1. With `first_only` the first mode that can be captured is enough. With `in_aten` the graphs are
    exported, for those who only look at them: they hold the values of a call, and not all of its backward. With
    `python_runs` a graph is for those who look at it too, and Python state that a call changes is no CaptureError.

    Hooks on the model itself: `"traced"` takes them as a tracer does. With `"stateless"` forward hooks that write to
    Python of theirs are a CaptureError. With `"around"` such hooks, and backward hooks, are left out: they stay on
    `root`, and are to fire around the graph.
    """
    refuse_prepared(model)
    _refuse_names_of_graphs(model)
    own: Mode = "train" if model.training else "eval"
    bound = _bind_cache_off(model, args, kwargs)
    kwargs = {**kwargs, **bound}
    call = ExampleCall(model, args, kwargs, dynamic_shapes, as_called, python_runs)
    order = tuple(sorted(modes, key=lambda m: m != own))
    if hooks == "traced":
        graphs, failures, notes, around = *_graphs(call, order, first_only, in_aten), False
    else:
        graphs, failures, notes, around = _graphs_beside_hooks(call, order, first_only, hooks == "around")
    if not graphs:
        raise CaptureError(next(iter(failures.values())))
    if bound:
        notes.append("use_cache=False is bound: a cache object cannot be captured")
    signature = signature_of(parameters_of_call(model), args, kwargs, tuple(bound))
    root, _ = clone_tree(model)
    in_spec = pytree.tree_structure((args, kwargs))
    notes = sorted(set(notes))
    untried = tuple(m for m in modes if m not in graphs and m not in failures)
    training = own == "train"
    return Captured(graphs, failures, root, signature, in_spec, training, args, kwargs, notes, True, untried, around)


def _graphs(
    call: ExampleCall, modes: Sequence[Mode], first_only: bool, in_aten: bool
) -> tuple[dict[Mode, CapturedGraph], dict[Mode, str], list[str]]:
    """The graph of each mode, why there is none of the others, and what a user should know."""
    graphs: dict[Mode, CapturedGraph] = {}
    failures: dict[Mode, str] = {}
    notes: list[str] = []
    for mode in modes:
        if graphs and first_only:
            break
        try:
            graphs[mode] = export_module(call, mode, notes) if in_aten else _captured(call, mode, notes)
            _note_sizes_of(call, graphs[mode])
        except CaptureError as error:
            failures[mode] = str(error)
    return graphs, failures, notes


def _graphs_beside_hooks(
    call: ExampleCall, modes: Sequence[Mode], first_only: bool, may_stay: bool
) -> tuple[dict[Mode, CapturedGraph], dict[Mode, str], list[str], bool]:
    """The same for a model whose hooks may fire around its graphs, and whether its forward hooks have to.

    Raises:
        CaptureError: Its forward hooks keep Python state, and may not stay.
    """
    model = call.model
    before = hook_state(model)
    traced = replace(call, model=without_hooks(model, forward=False)) if may_stay else call
    graphs, failures, notes = _graphs(traced, modes, first_only, False)
    after = hook_state(model)
    changed = [name for name in before if before[name] != after[name]]
    if not before or (not changed and not failures):
        return graphs, failures, notes, False
    if may_stay and not has_own_call(model):
        bare = replace(call, model=without_hooks(model, forward=True))
        again = _graphs(bare, modes, first_only, False)
        if changed or (again[0] and next(iter(again[0])) == modes[0]):
            return *again, True
    if changed:
        raise CaptureError(
            f"a hook on {call.name} itself, {changed[0]}, changes Python state, which a graph cannot hold: take it off "
            f"and register it on the converted model, where hooks on the root fire."
        )
    return graphs, failures, notes, False


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
    leaves = call.leaves
    graph.assumed = replace(graph.assumed, constants=constants_of(leaves), same=aliases(leaves))
    if graph.unkept:
        once, logged = ([c for c in graph.unkept if c.logged is kind] for kind in (False, True))
        for changes, what in (
            (once, "a first call sets it once; the graph makes what depends on it at every call"),
            (logged, "a call of the original adds to it, and a call of the graph does not"),
        ):
            if listed := ", ".join(dict.fromkeys(str(c).split(":")[0] for c in changes)):
                notes.append(f"{listed}: {what}")
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
    return shortened(text, 200)


def refuse_prepared(model: nn.Module) -> None:
    """Raise CaptureError for a model that another library has changed in a way that no tracer sees through."""
    for path, module in model.named_modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            raise CaptureError(
                f"{path or type(model).__name__} is sharded by FSDP (fully_shard): its parameters are gathered by "
                f"hooks that no tracer follows. Attach or convert the model first, and shard it afterwards."
            )


def _refuse_names_of_graphs(model: nn.Module) -> None:
    """Raise CaptureError where a model's tensor or submodule has a name that a module of a graph has for its own."""
    tensors = {n: v for n, v in model.__dict__.items() if isinstance(v, Tensor)}
    stores: Sequence[Mapping[str, Any]] = (model._parameters, model._buffers, model._modules, tensors)
    for what, store in zip(("parameter", "buffer", "submodule", "tensor"), stores, strict=True):
        for name in store:
            if name in _names_of_a_graph_module():
                raise CaptureError(
                    f"{type(model).__name__} has a {what} named {name!r}, and torch.fx.GraphModule, which holds the "
                    f"graph of a model, has that name for its own: rename it, or capture a module that holds the model "
                    f"and calls it in forward."
                )


@functools.cache
def _names_of_a_graph_module() -> frozenset[str]:
    return frozenset(set(dir(GraphModule(nn.Module(), Graph()))) - set(dir(nn.Module())))


def _bind_cache_off(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`use_cache=False` where the model returns an object pytree does not know and takes that argument."""
    parameters = parameters_of_call(model).parameters
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
