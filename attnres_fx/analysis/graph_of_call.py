"""The graph that a call of a converted or attached model runs, on tensors that it may write to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from attnres_fx.backend.attachment import is_attached, require_attached, unwrapped
from attnres_fx.backend.converted_form import converted_form
from attnres_fx.capture.isolated_run import isolated_clone
from attnres_fx.conversion.calls import program_for
from attnres_fx.conversion.captured_program import CapturedProgram
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.errors import AttachError
from attnres_fx.passes.graph.copying import copy_graph
from attnres_fx.passes.graph.mutation_order import written_attributes
from attnres_fx.state_config import attention_config


@dataclass(frozen=True)
class GraphOfCall:
    """A graph with its reads as they were put in, and what to run it on.

    Attributes:
        converted: The model that it is a graph of.
        program: That the call fits.
        gm: Its graph on a clone, whose parameters have no gradients yet and whose buffers are copies.
        inputs: Flat inputs.
    """

    converted: ConvertedModel
    program: CapturedProgram
    gm: GraphModule
    inputs: list[Any]

    @property
    def devices(self) -> list[torch.device]:
        """Those that its random numbers may be drawn on."""
        return list({p.device for p in self.converted.parameters()})


def graph_of_call(converted: ConvertedModel, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> GraphOfCall:
    """The graph of a call in the mode that the model is in. Raises as the call itself does."""
    program, inputs = program_for(converted, tuple(args), dict(kwargs or {}))
    root = isolated_clone(converted, written_attributes(program.graph))
    return GraphOfCall(converted, program, GraphModule(root, copy_graph(program.graph)), inputs)


def with_reads(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, asker: str) -> ConvertedModel:
    """A model whose reads can be looked at: a converted one itself, an attached one captured on its own tensors.

    Args:
        model: Converted, or attached, compiled or not.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of it.
        asker: The function that asks, for the error.

    Raises:
        AttachError: It is neither.
        ConfigError: It has no attention over depth to look at.
    """
    model = unwrapped(model)
    if isinstance(model, ConvertedModel):
        attention_config(model.report.config, asker)
        return model
    if is_attached(model):
        attention_config(require_attached(model).config, asker)
    else:
        raise AttachError(
            f"{asker} takes a converted or an attached model, and {type(model).__name__} is neither: call "
            f"attnres_fx.convert(model, args, kwargs) first, and train what it returns."
        )
    return converted_form(model, args, kwargs)
