"""Converted models from files, and pickles that hold a file."""

import dataclasses
import io
from typing import Any

import torch
from torch import nn

from attnres_fx.conversion.adopted_graph import captured_program
from attnres_fx.conversion.assembly import converted_model
from attnres_fx.conversion.conversion import Conversion
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.files import load_parts
from attnres_fx.conversion.stored.container import reading


def load(path: Any, *, map_location: Any = None) -> ConvertedModel:
    """Read a model that `ConvertedModel.save` wrote.

    Args:
        path: A path, or a binary file to read from.
        map_location: A device for everything, or a mapping from devices of the file to others; by default tensors
            go to the devices they were on.

    Returns:
        The model, in the mode in which it was written.

    Raises:
        SaveError: The file is damaged, holds no converted model, or has another format; the first thing that does not
            fit is named.
    """
    parts = load_parts(path, map_location=map_location)
    with reading(path, "ConvertedModel.save"):
        typed = any(program.graph.typed for program in parts.programs)
        conversion = Conversion(parts.report, dict(parts.failures), parts.lowering, typed, pickled=pickled_as_file)
        first = parts.programs[0]
        converted = converted_model(parts.root, parts.attnres, {}, first.signature, first.in_spec, conversion)
        converted.__dict__.update({n: v for n, v in vars(parts.root).items() if isinstance(v, torch.Tensor)})
        for program in parts.programs:
            trains = "train" in program.modes
            made = captured_program(
                converted, program.modes[0], program.graph, program.reads, program.signature, program.in_spec, trains
            )
            conversion.add(program.modes, dataclasses.replace(made, autocast=program.autocast))
        nn.Module.train(converted, parts.training)
    return converted


def pickled_as_file(model: ConvertedModel) -> tuple[Any, ...]:
    """What a pickle calls to load a model whose original cannot be converted again: it holds what `save` writes."""
    file = io.BytesIO()
    ConvertedModel.save(model, file)
    return _from_bytes, (file.getvalue(),)


def _from_bytes(data: bytes) -> ConvertedModel:
    """The model of a pickle."""
    return load(io.BytesIO(data))
