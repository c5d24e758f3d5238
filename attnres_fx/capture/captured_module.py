"""An `nn.Module` to graphs: through Dynamo, or through `torch.export` where Dynamo refuses a model that it takes."""

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_fx.capture.captured import Captured, CapturedGraph
from attnres_fx.capture.dynamo_module import trace_module
from attnres_fx.capture.exported_module import export_module
from attnres_fx.capture.free_sizes import free_dimensions, marked_dimensions, with_two_rows
from attnres_fx.capture.isolated_run import Mode, run_untouched
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.capture.recorder import DynamoRefusal
from attnres_fx.capture.signature import signature_of
from attnres_fx.errors import CaptureError


def capture_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    modes: Sequence[Mode],
    *,
    as_called: bool = False,
    in_aten: bool = False,
) -> Captured:
    """The graphs of a module in the modes asked for, its own first.

    With `as_called` the example is a call: its sizes of 1 are what is wanted, and a graph that leaves other sizes free
    is not tried at 1. With `in_aten` the graphs are exported, for those who only look at them: they hold the values of
    a call, and not all of its backward.
    """
    own: Mode = "train" if model.training else "eval"
    notes: list[str] = []
    refuse_prepared(model)
    bound = _bind_cache_off(model, args, kwargs)
    if bound:
        notes.append("use_cache=False is bound: a cache object cannot be captured")
    kwargs = {**kwargs, **bound}
    graphs: dict[Mode, CapturedGraph] = {}
    failures: dict[Mode, str] = {}
    in_spec = pytree.tree_structure((args, kwargs))
    for mode in sorted({*modes, own}, key=lambda m: m != own):
        if mode in modes:
            try:
                if in_aten:
                    graphs[mode] = export_module(model, args, kwargs, mode, dynamic_shapes, notes)
                else:
                    graphs[mode] = _captured(model, args, kwargs, mode, dynamic_shapes, notes, as_called)
            except CaptureError as error:
                failures[mode] = str(error)
    if not graphs:
        raise CaptureError(failures[own])
    signature = signature_of(model.forward, args, kwargs, tuple(bound))
    notes = sorted(set(notes))
    root, _ = clone_tree(model)
    training = own == "train"
    return Captured(graphs, failures, root, signature, in_spec, training, args, kwargs, notes, cloned=True)


def _captured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: Mode,
    dynamic_shapes: Any,
    notes: list[str],
    as_called: bool,
) -> CapturedGraph:
    """One mode, giving up freedom of sizes only as far as it must."""
    try:
        return _traced(model, args, kwargs, mode, dynamic_shapes, notes, as_called)
    except DynamoRefusal as error:
        refused = error.reason
    graph = export_module(model, args, kwargs, mode, dynamic_shapes, notes, refused, as_called=as_called)
    notes.append(
        f"captured by torch.export, because Dynamo refuses the model ({_first_line(refused)}): such a graph holds the "
        f"values of a call and its derivatives by the chain rule, and no custom backward, hook or checkpoint"
    )
    return graph


def _traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mode: Mode,
    dynamic_shapes: Any,
    notes: list[str],
    as_called: bool,
) -> CapturedGraph:
    if dynamic_shapes is not None:
        return trace_module(model, args, kwargs, mode, marked_dimensions(model, args, kwargs, dynamic_shapes))
    if not as_called:
        args, kwargs = with_two_rows(args, kwargs)
    leaves = pytree.tree_leaves((args, kwargs))
    with contextlib.ExitStack() as stack:
        try:
            return trace_module(model, args, kwargs, mode, free_dimensions(leaves, 2))
        except DynamoRefusal as error:
            if not any(free_dimensions(leaves, 2).values()):
                raise
            first = error
        stack.close()
    fixed = trace_module(model, args, kwargs, mode, {})  # raises where it was not for the sizes
    why = _first_line(first)
    try:
        graph = trace_module(model, args, kwargs, mode, free_dimensions(leaves, 1))
        notes.append(f"only the first dimension of each argument is free: {why}")
        return graph
    except DynamoRefusal:
        notes.append(f"the sizes of all arguments are fixed: {why}")
        return fixed


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
