"""An attached model as a converted one, for what looks into a graph."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attnres_fx.backend.attached_class import detach_class_
from attnres_fx.backend.attachment import ATTRIBUTE, require_attached, unwrapped
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.conversion.convert import convert
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.errors import AttachError


def converted_form(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> ConvertedModel:
    """A converted model on the weights, queries and gains of an attached one, in its mode; that one is left as it is.

    Args:
        model: An attached model, or what `torch.compile` returned for one.
        args: Positional example arguments.
        kwargs: Keyword example arguments.

    Raises:
        AttachError: It is not attached, or has other reads now.
        AttnResError: As `convert` raises.
    """
    attached = require_attached(model)
    model = unwrapped(model)
    clone, _ = clone_tree(model)
    for part in (clone, *attached.parts_of(clone)):
        detach_class_(part)
    del clone._modules[ATTRIBUTE]
    converted = convert(clone, args, kwargs, config=attached.config, check=False)
    reads = converted.attnres.reads
    if len(reads) != len(attached.reads):
        raise AttachError(
            f"{type(model).__name__} has {len(reads)} reads now and was attached with {len(attached.reads)}: detach "
            f"it and attach it anew."
        )
    for read, own in zip(reads, attached.reads, strict=True):
        for name, tensor in own.tensors().items():
            setattr(read, name, tensor)
    return converted.train(model.training)
