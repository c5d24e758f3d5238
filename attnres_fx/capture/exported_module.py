"""An `nn.Module` to a graph by `torch.export`: for models that Dynamo refuses. It holds less than a Dynamo graph."""

import contextlib
import inspect
import random
import secrets
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from attnres_fx.capture.captured import CapturedGraph, graph_of_export
from attnres_fx.capture.example_call import ExampleCall
from attnres_fx.capture.free_sizes import free_dimensions
from attnres_fx.capture.isolated_run import Mode, fast_path_off, set_mode_
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.capture.quiet import quiet_tracer
from attnres_fx.capture.reachable_objects import left_as_it_was
from attnres_fx.capture.recorder import CAPTURE_LOCK, functorch_depth, restore_functorch
from attnres_fx.capture.side_effects import python_state_message
from attnres_fx.errors import AttnResError, CaptureError
from attnres_fx.shown import shortened

RANDOM = "draws of Python's random"
NUMPY = "draws of numpy's random"
SECRETS = "draws of Python's secrets"
SEED = "the seeding of torch's generator"
CLOCK = "the time of the call, or another number that Python makes anew at every call"
#: What an exported graph would hold as it was at the capture, and what to write instead.
_FROZEN = {
    **dict.fromkeys((RANDOM, NUMPY, SECRETS), "draw with torch (torch.rand)"),
    SEED: "seed before the call",
    CLOCK: "pass it as an argument",
}


def export_module(call: ExampleCall, mode: Mode, notes: list[str], refused: Exception | None = None) -> CapturedGraph:
    """Export in one mode, giving up freedom of sizes only as far as it must.

    Args:
        call: What is exported.
        mode: `"train"` or `"eval"`.
        notes: Gets what a user should know.
        refused: Why Dynamo did not take the model; None where only the values of a call are wanted.

    Raises:
        CaptureError: It cannot be exported either, or its backward would be lost.
    """
    errors: list[Exception] = []
    traced = call.to_trace()
    for shapes, what_is_lost in _attempts(traced):
        try:
            program, lost = _exported(traced, mode, shapes, by_dynamo=refused is None)
        except AttnResError:
            raise
        except Exception as error:  # the tracer lets anything the model raises through
            errors.append(error)
            continue
        if what_is_lost:
            notes.append(what_is_lost)
        graph = graph_of_export(program)
        if refused is not None and lost:
            _say_what_is_lost(call, mode, lost, notes, refused)
            graph.lost = tuple(sorted(lost))
        return graph
    raise CaptureError(_capture_message(call.model, mode, errors[-1], refused)) from refused


def _exported(call: ExampleCall, mode: Mode, shapes: Any, *, by_dynamo: bool) -> tuple[ExportedProgram, set[str]]:
    """The export of a clone, and what of the model it does not hold."""
    clone, _ = clone_tree(call.model)
    set_mode_(clone, mode)
    args, kwargs = pytree.tree_map(lambda x: x.contiguous() if isinstance(x, Tensor) else x, (call.args, call.kwargs))
    depth = functorch_depth()
    with (
        CAPTURE_LOCK,
        quiet_tracer(),
        fast_path_off(),
        lost_by_export() as lost,
        warnings.catch_warnings(),
        left_as_it_was(clone, args, kwargs) as state,
    ):
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(clone, args, kwargs, dynamic_shapes=shapes, strict=False)
            if CLOCK in lost and lost & _FROZEN.keys() - {CLOCK}:
                lost.discard(CLOCK)  # two exports differ by what is drawn; it is told when that is gone
            elif CLOCK in lost:
                again = torch.export.export(clone, args, kwargs, dynamic_shapes=shapes, strict=False)
                if str(again.graph) == str(program.graph):
                    lost.discard(CLOCK)  # it is measured and told, and no part of the result
            if state.changes():  # perhaps a first call sets it once
                with left_as_it_was(clone, args, kwargs) as later:
                    torch.export.export(clone, args, kwargs, dynamic_shapes=shapes, strict=False)
                    if changes := [c for c in later.changes() if not c.logged]:
                        raise CaptureError(python_state_message(call.name, changes, by_dynamo))
        finally:
            restore_functorch(depth)
    return program, lost | _backward_hooks(clone)


def _say_what_is_lost(call: ExampleCall, mode: Mode, lost: set[str], notes: list[str], refused: Exception) -> None:
    """Refuse a graph that would train wrongly, or draw the same numbers at every call; note it for others."""
    listed = " and ".join(sorted(lost))
    if mode == "train" or lost & _FROZEN.keys():
        instead = dict.fromkeys(_FROZEN.get(what, "rewrite what Dynamo refuses") for what in sorted(lost))
        raise CaptureError(
            f"{call.name} in {mode} mode: Dynamo cannot trace it ({_cause(refused)}), and torch.export would lose "
            f"{listed}: {', '.join(instead)}. ax.compile goes through Dynamo too."
        )
    notes.append(
        f"the eval graph has no gradients, because torch.export loses {listed}: rewrite what Dynamo refuses to "
        f"differentiate it"
    )


def _backward_hooks(model: nn.Module) -> set[str]:
    """The modules whose backward hooks an export would lose, in words."""
    return {
        f"the backward hook of {path or 'the model'}"
        for path, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    }


def _cause(error: Exception) -> str:
    """What a tracer's error says, short, with the line of the model's own code that it is about."""
    said, _, _ = str(error).partition("from user code:")
    frames = list(getattr(error, "real_stack", None) or ())
    line = f" At {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return (shortened(" ".join(said.split()), 600) or type(error).__name__) + line


def _capture_message(model: nn.Module, mode: Mode, error: Exception, refused: Exception | None) -> str:
    dynamo = f"Dynamo: {type(refused).__name__}: {_cause(refused)}. " if refused is not None else ""
    # What a model raises comes through as it is; the tracer's own errors have classes of their own.
    own = "Call the model itself with these arguments: if it fails too, give others. Otherwise: "
    own = own if type(error).__module__ == "builtins" else ""
    return (
        f"{type(model).__name__} could not be captured in {mode} mode. {dynamo}"
        f"torch.export: {type(error).__name__}: {_cause(error)}. "
        f"{own}Try torch.compile(model, fullgraph=True) alone to see the whole trace; then remove the data-dependent "
        f"code it names, pass other example arguments, capture a part of the model, or trace it yourself "
        f"(torch.fx.symbolic_trace, torch.export) and convert the graph."
    )


def _attempts(call: ExampleCall) -> list[tuple[Any, str]]:
    """What to leave free, and what is said of it; the most free first."""
    if call.dynamic_shapes is not None:
        return [(call.dynamic_shapes, "")]
    attempts = [
        (_free_sizes(call, 2), ""),
        (_free_sizes(call, 1), "only the first dimension of each argument is free"),
        (None, "the sizes of all arguments are fixed"),
    ]
    different: list[tuple[Any, str]] = []
    for attempt in attempts:
        if attempt[0] not in [d[0] for d in different]:
            different.append(attempt)
    if different[0][0] is None:
        different[0] = attempts[-1]
    return different


def _free_sizes(call: ExampleCall, limit: int) -> Any:
    """`Dim.AUTO` for the dimensions that may be free, by argument name; None where the arguments have no names."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    free = free_dimensions(leaves, limit)
    shapes = [dict.fromkeys(free.get(i, ()), Dim.AUTO) or None for i in range(len(leaves))]
    positional, named = pytree.tree_unflatten(shapes, spec)
    names = _forward_names(call.model, len(call.args))
    if not any(shapes) or len(names) < len(call.args):
        return None
    return {**dict(zip(names, positional, strict=True)), **named}


def _forward_names(model: nn.Module, count: int) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names[:count]


def _numpy_draws() -> list[str]:
    """The functions that draw from numpy's own generator."""
    draws = sys.modules.get("numpy.random")
    names = [n for n in dir(draws) if n.islower() and not n.startswith("_") and n != "get_state"]
    return [n for n in names if draws is not None and isinstance(getattr(draws, n), types.BuiltinMethodType)]


@contextlib.contextmanager
def lost_by_export() -> Iterator[set[str]]:
    """Notes what a model calls that an exported graph does not hold."""
    seen: set[str] = set()

    def watched(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.add(what)
            return original(*args, **kwargs)

        return call

    places: Sequence[tuple[Any, str, str]] = (
        (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", "checkpointing"),
        (torch.utils.checkpoint, "_infer_device_type", "checkpointing"),
        (Tensor, "register_hook", "a tensor hook"),
        (random, "random", RANDOM),
        (random, "uniform", RANDOM),
        *((random, name, RANDOM) for name in ("randint", "randrange", "choice", "shuffle", "gauss", "sample")),
        *((sys.modules["numpy.random"], name, NUMPY) for name in _numpy_draws()),
        *((secrets, name, SECRETS) for name in ("randbelow", "choice", "randbits", "token_bytes")),
        *((time, name, CLOCK) for name in ("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic")),
        (torch, "manual_seed", SEED),
        (torch, "seed", SEED),
    )
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places if hasattr(owner, name)]
    apply = torch.autograd.Function.__dict__["apply"]

    def watched_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(f"the backward of {cls.__name__}")
        return apply.__get__(None, cls)(*args, **kwargs)

    try:
        for (owner, name, what), (_, _, original) in zip(
            (p for p in places if hasattr(p[0], p[1])), originals, strict=True
        ):
            setattr(owner, name, watched(original, what))
        torch.autograd.Function.apply = classmethod(watched_apply)  # type: ignore[assignment, method-assign]
        yield seen
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
