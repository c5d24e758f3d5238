"""A captured mode's program, and the arguments of a call as its flat inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from attnres_fx.capture.signature import CallSignature, InputShape, check_shapes
from attnres_fx.capture.sizes import Guards
from attnres_fx.conversion.graph_runner import Program
from attnres_fx.errors import ArgumentError
from attnres_fx.passes.rewrite.depth_attention import Replacement


@dataclass(frozen=True, eq=False)
class CapturedProgram(Program):
    """A captured mode's program, and how it is called.

    Attributes:
        out_spec: pytree of the outputs, None where the graph returns them in their structure.
        shapes: one entry per input, None where it is no tensor.
        ranges: the least and the greatest size of each symbol, None where there is no greatest.
        replacements: the reads that were put in.
        guards: checks the flat inputs for what the tracer took for granted.
    """

    out_spec: Any
    shapes: tuple[InputShape | None, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    replacements: tuple[Replacement, ...]
    guards: Guards | None = None


def flat_arguments(
    program: CapturedProgram, signature: CallSignature, in_spec: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    """The arguments of a call as the flat inputs of a program.

    Args:
        program: of the mode that runs.
        signature: the arguments of a call.
        in_spec: pytree of (args, kwargs), None where the graph takes them as they are.
        args: of the call, by position.
        kwargs: of the call, by keyword.

    Raises:
        ArgumentError: they do not fit what was captured.
    """
    bound_args, bound_kwargs = signature.bind(args, kwargs)
    if in_spec is None:
        return list(bound_args)
    leaves, spec = pytree.tree_flatten((bound_args, bound_kwargs))
    if len(leaves) == len(program.shapes):
        check_shapes(program.shapes, leaves, program.ranges)
    if len(leaves) != len(program.shapes) or spec != in_spec:
        raise ArgumentError(f"the arguments have another structure than the captured ones: {spec} against {in_spec}.")
    if program.guards is not None:
        _check_guards(program.guards, leaves)
    return leaves


def _check_guards(guards: Guards, leaves: list[Any]) -> None:
    if torch.compiler.is_compiling():  # guards of the tracer then, and its own words
        guards(*leaves)
        return
    try:
        guards(*leaves)
    except AssertionError as error:
        raise ArgumentError(
            f"the captured graph does not hold for arguments of these sizes: {error}. Convert again with an "
            f"example of these sizes, or capture both and choose."
        ) from error
