"""One graph from Dynamo by documented means: a backend that records it and returns stand-ins instead of running it.

The module is not run. Dynamo's own code calls the recorded graph with the objects it found, and builds the module's
output from what it gets back; tensors are told apart by identity (`bound_graph`).
"""

import contextlib
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from attnres_fx.capture.consulted import noted_questions, traced_code
from attnres_fx.capture.guard_places import Guarded, guarded
from attnres_fx.capture.outside_state import OutsideState
from attnres_fx.capture.quiet import quiet_tracer
from attnres_fx.capture.written_objects import written_objects
from attnres_fx.errors import AttnResError, CaptureError
from attnres_fx.passes.graph.nodes import describe, value_of

#: Captures and what they patch belong to the process: one at a time.
CAPTURE_LOCK = threading.RLock()


class DynamoRefusal(Exception):
    """Dynamo does not take a model.

    Attributes:
        reason: What it raised.
    """

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass
class Recording:
    """What Dynamo recorded of one call.

    Attributes:
        module: What was called.
        gm: Its graph of torch functions; every tensor it takes is a placeholder.
        inputs: What its placeholders were given, in order.
        outputs: The stand-ins it returned, in order.
        result: The module's output, built from the stand-ins.
        watched: What Dynamo took for granted.
        lasting: The source of each tensor that was there before the call, by its id.
        outside: What the objects held that Dynamo's code wrote to.
        codes: The code that was traced.
        sources: What Dynamo calls the origin of each input, in order; empty where it does not say.
        asked: What the module asked of the call that changes no value (`consulted`).
    """

    module: nn.Module
    gm: GraphModule
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    result: Any
    watched: tuple[Guarded, ...]
    lasting: dict[int, str]
    outside: OutsideState
    codes: tuple[types.CodeType, ...]
    sources: tuple[str, ...]
    asked: frozenset[str]


@dataclass
class _Recorder:
    graphs: list[GraphModule] = field(default_factory=list)
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    outside: OutsideState = field(default_factory=lambda: OutsideState(()))
    codes: tuple[types.CodeType, ...] = ()
    sources: tuple[str, ...] = ()

    def __call__(self, gm: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        self.codes = traced_code()
        self.sources = tuple(_source(n) for n in gm.graph.nodes if n.op == "placeholder")
        self.outside = OutsideState(written_objects())
        returned = next(n for n in gm.graph.nodes if n.op == "output").args[0]

        def stand_in(*inputs: Any) -> tuple[Any, ...]:
            self.inputs = inputs
            self.outputs = tuple(_stand_in(n) for n in returned)  # type: ignore[union-attr]
            return self.outputs

        return stand_in


def record(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], gradients: bool = True) -> Recording:
    """Let Dynamo trace one call of a module.

    Args:
        module: The module; Dynamo's code writes to its attributes what the call would write.
        args: Positional arguments, whose free sizes are marked.
        kwargs: Keyword arguments.
        gradients: Whether gradients are on.

    Raises:
        DynamoRefusal: Dynamo, or the module's own code, raised; or there is not one graph.
    """
    recorder = _Recorder()
    watched: list[Guarded] = []
    lasting: dict[int, str] = {}

    def note(guards: Sequence[Any]) -> list[bool]:
        watched.extend(map(guarded, guards))
        lasting.update({id(g.value): str(g.name) for g in guards if g.has_value and isinstance(g.value, Tensor)})
        return [False] * len(guards)  # the code runs once, here: nothing has to be checked before it runs again

    call = torch.compile(_entry(), backend=recorder, fullgraph=True, dynamic=False, options={"guard_filter_fn": note})
    with isolated_dynamo(), torch.set_grad_enabled(gradients), noted_questions() as asked:
        try:
            result = call(module, tuple(args), dict(kwargs))
        except AttnResError:
            recorder.outside.restore_()
            raise
        except Exception as error:  # Dynamo's own, or the module's
            recorder.outside.restore_()
            if recorder.outputs and "item() cannot be called on meta" in str(error):
                raise CaptureError(
                    _number_from_data("an output of the model, or what a call leaves in an attribute,")
                ) from None
            raise DynamoRefusal(error) from error
    if len(recorder.graphs) != 1:
        what = "no graph: is it switched off (TORCHDYNAMO_DISABLE)?" if not recorder.graphs else "several graphs."
        raise DynamoRefusal(RuntimeError(f"Dynamo traced {what}"))
    gm, inputs, outputs = recorder.graphs[0], recorder.inputs, recorder.outputs
    noted = tuple(dict.fromkeys(watched))
    told = (recorder.outside, recorder.codes, recorder.sources, frozenset(asked))
    return Recording(module, gm, inputs, outputs, result, noted, lasting, *told)


def _entry() -> Callable[..., Any]:
    """A function with a code object of its own, so that no capture counts towards another's limit of recompilations."""

    def attnres_capture(module: Any, args: Any, kwargs: Any) -> Any:
        return module(*args, **kwargs)

    code = attnres_capture.__code__
    return types.FunctionType(code.replace(co_name=code.co_name), attnres_capture.__globals__)


def _source(node: Node) -> str:
    name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    return str(name() if callable(name) else name)


def _stand_in(node: Any) -> Any:
    """A tensor without data in the shape of a graph's output, or the plain value it stands for."""
    if not isinstance(node, Node):
        return node
    value = value_of(node)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) and value.node.hint is None:
        raise CaptureError(_number_from_data(describe(node)))
    if isinstance(value, Tensor):
        sizes = [s if isinstance(s, int) else s.node.hint for s in value.shape]
        if None in sizes:
            raise RuntimeError(f"the size of an output ({', '.join(map(str, value.shape))}) depends on the data")
        made = torch.empty(sizes, dtype=value.dtype, device="meta")
        return made.requires_grad_(value.requires_grad) if made.is_floating_point() or made.is_complex() else made
    return _Size(value.node.hint) if isinstance(value, torch.SymInt) else value


def _number_from_data(what: str) -> str:
    return (
        f"{what} is a Python number that is read from a tensor (.item(), .tolist(), float(x)), which no graph "
        f"holds: return or keep the tensor itself (loss.detach()), and read it outside of forward."
    )


class _Size(int):
    """A size that a graph returns, told from other numbers by identity."""


@contextlib.contextmanager
def isolated_dynamo() -> Iterator[None]:
    """Dynamo as it comes, whatever the process set, and nothing left behind by what it raises."""
    level = functorch_depth()
    with (
        CAPTURE_LOCK,
        quiet_tracer(),
        torch.inference_mode(mode=False),
        torch.compiler.set_stance("default"),
        torch._dynamo.config.patch(suppress_errors=False, disable=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            restore_functorch(level)


def functorch_depth() -> int:
    """How many functorch transforms are on."""
    level = torch._C._functorch.maybe_current_level()
    return 0 if level is None else int(level)


def restore_functorch(depth: int) -> None:
    """Leave the functorch transforms that an exception left on."""
    if functorch_depth() > depth:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
