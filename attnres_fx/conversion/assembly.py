"""A converted model put together from a module tree, the added parameters, and rewritten graphs."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from attnres_fx.capture.captured import CapturedGraph
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.root_hooks import copy_hooks_
from attnres_fx.capture.signature import CallSignature
from attnres_fx.conversion.adopted_graph import captured_program
from attnres_fx.conversion.captured_program import CapturedProgram
from attnres_fx.conversion.conversion import ADDED, Conversion, placement_of
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.derived_class import derived_class
from attnres_fx.conversion.tensors_as_captured import TensorsAsCaptured
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes.rewrite.execution import Replacement


def converted_model(
    root: nn.Module,
    attnres: AttnResParameters,
    graphs: Mapping[Mode, tuple[CapturedGraph, tuple[Replacement, ...]]],
    signature: CallSignature,
    in_spec: Any,
    conversion: Conversion,
) -> ConvertedModel:
    """A converted model on the modules of a tree.

    Args:
        root: A clone of the original, which becomes the converted model where `conversion.own` says what it was; else
            modules whose tensors and hooks a new one takes over.
        attnres: The added parameters.
        graphs: By mode, with the reads of each; modes may share one.
        signature: The arguments of a call.
        in_spec: Pytree of (args, kwargs), None where the graphs take them as they are.
        conversion: Without programs.
    """
    model: Any
    if conversion.own is not None:
        model = root
    else:
        model = ConvertedModel()
        for store in ("_parameters", "_buffers", "_modules"):
            getattr(model, store).update(getattr(root, store))
        model._non_persistent_buffers_set |= root._non_persistent_buffers_set
        copy_hooks_(root, model)
    model.__class__ = derived_class(ConvertedModel, conversion.own, signature)
    model.__dict__["_attnres_conversion"] = conversion
    model._modules["attnres"] = attnres
    conversion.placement = placement_of(model)
    calls_modules = any(n.op == "call_module" for graph, _ in graphs.values() for n in graph.gm.graph.nodes)
    conversion.tensors = TensorsAsCaptured() if calls_modules else TensorsAsCaptured.of(model, ADDED)
    trained = {id(graph) for mode, (graph, _) in graphs.items() if mode == "train"}
    programs: dict[int, CapturedProgram] = {}
    for mode, (graph, reads) in graphs.items():
        if id(graph) not in programs:
            training = id(graph) in trained
            programs[id(graph)] = captured_program(model, mode, graph, reads, signature, in_spec, training)
        conversion.programs[mode] = programs[id(graph)]
    converted: ConvertedModel = model
    return converted
