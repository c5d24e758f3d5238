"""A captured mode's program: its call, the arguments of a call as flat inputs, its graph as a capture."""

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from attnres_fx.capture.assumed import Assumed
from attnres_fx.capture.captured import CapturedGraph
from attnres_fx.capture.side_effects import PythonChange, TensorWrite
from attnres_fx.capture.signature import CallSignature, InputShape, check_shapes
from attnres_fx.capture.sizes import Guards
from attnres_fx.capture.watched import WatchedValue
from attnres_fx.conversion.graph_runner import GraphRunner, Program
from attnres_fx.conversion.without_gradients import refusing_backward
from attnres_fx.errors import ArgumentError
from attnres_fx.ops.dispatch import is_traced
from attnres_fx.passes.graph.copying import copy_graph
from attnres_fx.passes.rewrite.execution import Replacement

Autocast = tuple[tuple[str, torch.dtype | None], ...]


@dataclass(frozen=True, eq=False)
class CapturedProgram(Program):
    """A captured mode's program, and how it is called.

    Attributes:
        out_spec: Pytree of the result, None where the graph returns it in its structure.
        shapes: Of each input, None where it is no tensor.
        ranges: The least and the greatest size of each free size.
        replacements: The reads that were put in.
        guards: Checks the inputs for what the tracer took for granted.
        writes: Where a call stores the outputs that come after the result's.
        watched: Values of the model that are part of the graph.
        unkept: What a first call of the original sets and calls of the graph do not.
        signature: The arguments of a call.
        in_spec: Pytree of (args, kwargs), None where the graph takes them as they are.
        lost: What of the original's backward the graph does not hold; such a program runs without gradients.
        flags: The `training` flags of submodules that the graph holds, by path.
        autocast: The autocast that the graph was traced under, None where it means the same under any.
        assumed: What holds of the calls that the graph is right for.
    """

    out_spec: Any
    shapes: tuple[InputShape | None, ...]
    ranges: dict[str, tuple[int, int | None]]
    replacements: tuple[Replacement, ...]
    guards: Guards | None
    writes: tuple[TensorWrite, ...]
    watched: tuple[WatchedValue, ...]
    unkept: tuple[PythonChange, ...]
    signature: CallSignature
    in_spec: Any
    lost: tuple[str, ...]
    flags: tuple[tuple[str, bool], ...]
    autocast: Autocast | None
    assumed: Assumed

    @property
    def names(self) -> tuple[str, ...]:
        """Of its flat inputs."""
        return tuple(str(n.target) for n in self.graph.nodes if n.op == "placeholder")

    def other_flag(self, submodule: Callable[[str], nn.Module]) -> str:
        """The first `training` flag of a tree that is not the one in the graph, in words; empty where all are.

        Args:
            submodule: The module of the tree at a path.
        """
        for path, flag in self.flags:
            if submodule(path).training is not flag:
                return f"{path}.training is {not flag}, and was {flag} when the graph was captured"
        return ""


def current_autocast() -> Autocast:
    """The dtype that autocast casts to, by the type of device; None where it is off."""
    return tuple(
        (kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None) for kind in ("cpu", "cuda")
    )


def bar_ones(program: CapturedProgram, symbols: Collection[str]) -> None:
    """Let a program take these free sizes from 2 on: it was traced at larger ones, and 1 may take another path."""
    for symbol in symbols:
        if symbol in program.ranges:
            low, high = program.ranges[symbol]
            program.ranges[symbol] = (max(low, 2), high)


def flat_arguments(program: CapturedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call as the flat inputs of a program.

    Args:
        program: Of the mode that runs.
        args: Of the call, by position.
        kwargs: Of the call, by keyword.

    Returns:
        One value per input of the program, in order.

    Raises:
        ArgumentError: They do not fit what was captured.
    """
    bound_args, bound_kwargs = program.signature.bind(args, kwargs)
    if program.in_spec is None:
        return list(bound_args)
    leaves, spec = pytree.tree_flatten((bound_args, bound_kwargs))
    if len(leaves) == len(program.shapes):
        check_shapes(program.shapes, leaves, program.ranges)
    if len(leaves) != len(program.shapes) or spec != program.in_spec:
        raise ArgumentError(
            f"the arguments have another structure than the captured ones: {spec} against {program.in_spec}."
        )
    program.assumed.check(leaves, lambda: program.names)
    if program.guards is not None:
        _check_guards(program.guards, leaves)
    return leaves


def _check_guards(guards: Guards, leaves: list[Any]) -> None:
    if is_traced():  # guards of the tracer then, and its own words
        guards(*leaves)
        return
    try:
        guards(*leaves)
    except AssertionError as error:
        raise ArgumentError(f"the captured graph does not hold for arguments of these sizes: {error}.") from error


def run_program(program: CapturedProgram, root: nn.Module, inputs: list[Any]) -> Any:
    """The result of a program on the tensors of a module tree, which gets what the program writes."""
    with torch.no_grad() if program.lost else contextlib.nullcontext():
        outputs = program.run(root, *inputs)
    if program.out_spec is None:
        return outputs
    for write in program.writes:
        _store(root.get_submodule(write.module), write, outputs[write.output])
    returned = outputs[: program.out_spec.num_leaves]
    if program.lost and torch.is_grad_enabled() and not is_traced() and _trains(root, inputs):
        returned = refusing_backward(returned, _why_without_gradients(program, root))
    return pytree.tree_unflatten(returned, program.out_spec)


def _store(module: nn.Module, write: TensorWrite, value: torch.Tensor) -> None:
    if write.buffer and write.name not in module._buffers:  # a call of the original registers it
        module.register_buffer(write.name, value, persistent=write.persistent)
    else:
        setattr(module, write.name, value)


def _trains(root: nn.Module, inputs: list[Any]) -> bool:
    """Whether the original's result would have gradients."""
    given = (x for x in inputs if isinstance(x, torch.Tensor))
    return any(t.requires_grad for t in (*root.parameters(), *given))


def _why_without_gradients(program: CapturedProgram, root: Any) -> str:
    conversion = root._attnres_conversion
    train = conversion.failures.get("train")
    return (
        f"the graph of {conversion.report.model} that ran has no gradients: Dynamo refuses the model, and an exported "
        f"graph loses {' and '.join(program.lost)}. "
        + (f"So there is no train graph, and the model stays in eval mode ({train}) " if train else "")
        + "Take that out of the model and convert it again. Hooks on tensors (Tensor.register_hook), and backward "
        "hooks on the model itself, are kept."
    )


def captured_graph(root: GraphRunner, program: CapturedProgram) -> CapturedGraph:
    """A copy of a program's graph as a capture returns it, on the tensors of a converted model.

    Args:
        root: The converted model.
        program: One of its programs.

    Returns:
        The graph, free to be changed.
    """
    return CapturedGraph(
        GraphModule(root, copy_graph(program.graph)),
        program.out_spec,
        program.shapes,
        dict(program.ranges),
        program.guards,
        program.writes,
        program.watched,
        program.unkept,
        lost=program.lost,
        typed=root._state().typed,
        flags=program.flags,
        assumed=program.assumed,
    )
