"""A captured graph as a program on a converted model's own tensors."""

from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from attnres_fx.capture.captured import CapturedGraph
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.signature import CallSignature
from attnres_fx.conversion.captured_program import CapturedProgram, current_autocast
from attnres_fx.passes.rewrite.execution import Replacement

#: The child of a converted model that holds constants of its graphs.
CONSTANTS = "_captured"


def captured_program(
    model: Any,
    mode: Mode,
    captured: CapturedGraph,
    replacements: tuple[Replacement, ...],
    signature: CallSignature,
    in_spec: Any,
    training: bool,
) -> CapturedProgram:
    """A captured and rewritten graph as a program of a converted model.

    Args:
        model: The ConvertedModel.
        mode: That the graph was captured in.
        captured: The graph; its attributes are renamed to where the model keeps them.
        replacements: The reads that were put in.
        signature: The arguments of a call.
        in_spec: Pytree of (args, kwargs), None where the graph takes them as they are.
        training: Whether gradients will be taken.

    Returns:
        The program; the graph is now its own.
    """
    gm = captured.gm
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = adopt_attribute(model, gm, str(node.target), mode)
    program = model._program(gm.graph, training)
    follows_autocast = not captured.typed and model._attnres_conversion.own is not None
    return CapturedProgram(
        graph=program.graph,
        call=program.call,
        lowered=program.lowered,
        out_spec=captured.out_spec,
        shapes=captured.shapes,
        ranges=captured.ranges,
        replacements=replacements,
        guards=captured.guards,
        writes=captured.writes,
        watched=captured.watched,
        unkept=captured.unkept,
        signature=signature,
        in_spec=in_spec,
        lost=captured.lost,
        flags=captured.flags or (),
        autocast=current_autocast() if follows_autocast else None,
        assumed=captured.assumed,
    )


def adopt_attribute(root: nn.Module, gm: GraphModule, target: str, mode: Mode) -> str:
    """Where a converted model keeps an attribute of a captured graph; constants get a place of their own.

    Args:
        root: The converted model.
        gm: The captured graph.
        target: Path of the attribute on the graph.
        mode: That the graph was captured in.

    Returns:
        The attribute's path on the converted model.
    """
    value = attrgetter(target)(gm)
    try:
        current = attrgetter(target)(root)
    except AttributeError:
        current = None
    if current is value or (isinstance(current, nn.Module) and isinstance(value, nn.Module)):
        return target
    if CONSTANTS not in root._modules:
        root.add_module(CONSTANTS, nn.Module())
    store = root._modules[CONSTANTS]
    assert store is not None
    name = f"{mode}_{target.replace('.', '_')}"
    while getattr(store, name, value) is not value:
        name += "_"
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        store.register_buffer(name, value, persistent=False)
    else:
        setattr(store, name, value)
    return f"{CONSTANTS}.{name}"
