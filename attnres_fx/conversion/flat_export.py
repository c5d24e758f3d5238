"""A converted graph exported once more, with flat inputs and outputs and in aten operations, and its reads there."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from attnres_fx.capture.captured import CapturedGraph, flat_module
from attnres_fx.capture.restore import A_CHECKPOINT, what_backward_holds
from attnres_fx.capture.signature import InputShape
from attnres_fx.capture.size_guards import SizeGuards
from attnres_fx.capture.transform_regions import outline_transforms_pass
from attnres_fx.errors import CaptureError, SaveError
from attnres_fx.passes.graph.example_sizes import remember_example_sizes
from attnres_fx.passes.graph.nodes import plain_size
from attnres_fx.passes.rewrite.execution import Replacement
from attnres_fx.passes.rewrite.topology import read_operators


def export_flat(root: nn.Module, captured: CapturedGraph) -> torch.export.ExportedProgram:
    """A graph as `torch.export` traces it again, flat inputs and outputs, in aten operations.

    Raises:
        SaveError: it cannot be traced.
    """
    flat = _FlatModel(root, captured)
    example, free = zip(*(_example(n, s) for n, s in _inputs(captured)), strict=True)
    errors = []
    for shapes in (tuple(free), None):
        try:
            return torch.export.export(flat, tuple(example), strict=False, dynamic_shapes=shapes)
        except Exception as error:
            errors.append(error)
    raise SaveError(f"the converted graph could not be exported again: {errors[0]}") from errors[0]


def flat_aten(root: nn.Module, captured: CapturedGraph) -> tuple[GraphModule, Any]:
    """A graph in aten operations, which say what they read and write, and the pytree of its outputs.

    Args:
        root: The modules that hold its tensors.
        captured: Of torch functions, or a symbolic trace.

    Raises:
        CaptureError: Its outputs depend on more than aten operations hold.
        SaveError: It cannot be exported.
    """
    if captured.writes:
        raise CaptureError(
            f"a call of the model stores a tensor in {captured.writes[0].place}, which is no buffer that is written to "
            f"in place: stages would lose it. Write to a buffer (buffer.copy_(value)) instead."
        )
    held = [what for what in what_backward_holds(captured.gm) if what != A_CHECKPOINT]
    if held:
        raise CaptureError(
            f"the graph holds {' and '.join(held)}, which aten operations cannot express: stages would lose its "
            f"gradients. Pipelines take models without one."
        )
    exported = export_flat(root, captured)
    gm, _ = flat_module(exported)
    remember_example_sizes(gm, [s.example if s else () for s in captured.shapes])
    outline_transforms_pass(gm)
    return gm, captured.out_spec or exported.call_spec.out_spec


def _inputs(captured: CapturedGraph) -> list[tuple[Any, InputShape | None]]:
    nodes = [n for n in captured.gm.graph.nodes if n.op == "placeholder"]
    return list(zip(nodes, captured.shapes, strict=True))


def _example(node: Any, shape: InputShape | None) -> tuple[Any, Any]:
    """A stand-in for one input, and which of its sizes are free."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, Tensor):
        return value, None
    plain = [plain_size(s) for s in value.shape]
    sizes = [s if isinstance(s, int) else s.node.hint for s in plain]
    free = {i: Dim.AUTO for i, s in enumerate(plain) if not isinstance(s, int)}
    if shape is None:
        free = {i: Dim.AUTO for i, s in enumerate(sizes[:2]) if s > 1}
    return torch.zeros(sizes, dtype=value.dtype, device=value.device), free or None


def in_graph_order(gm: GraphModule, replacements: Sequence[Replacement]) -> list[Replacement]:
    """The reads of a graph in the order of their nodes."""
    order = {n.name: i for i, n in enumerate(gm.graph.nodes)}
    return sorted(replacements, key=lambda r: order[r.node])


def reads_of_export(gm: GraphModule, replacements: Sequence[Replacement]) -> tuple[Replacement, ...]:
    """The reads of a graph that was exported again, in order; their nodes get the names that they had before."""
    nodes = [n for n in gm.graph.nodes if n.target in read_operators()]
    reads = []
    for node, read in zip(nodes, replacements, strict=True):
        node._rename(read.node)  # a plan knows what crosses a cut by its name
        sources = tuple(s.name for s in node.args[0])
        reads.append(dataclasses.replace(read, node=node.name, source_nodes=sources))
    return tuple(reads)


class _FlatModel(nn.Module):
    """A graph as a module: the model's tensors under their own names, flat inputs and outputs."""

    def __init__(self, root: nn.Module, captured: CapturedGraph) -> None:
        super().__init__()
        for store in ("_parameters", "_buffers", "_modules"):
            getattr(self, store).update(getattr(root, store))
        self._non_persistent_buffers_set |= root._non_persistent_buffers_set
        self.training = root.training
        call, guards = type(captured.gm).forward, captured.guards
        if isinstance(guards, SizeGuards):  # they are data, and go beside the export
            guards = None

        def forward(*leaves: Any) -> Any:
            if guards is not None:
                guards(*leaves)
            return call(self, *leaves)

        # Named, so that what the loaded graph says of its inputs can be understood.
        names = [n.name for n, _ in _inputs(captured)]
        ordered = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        forward.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
        self.forward = forward
