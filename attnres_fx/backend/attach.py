"""`attach` and `detach`: an AttnRes model that keeps its Python API, rewritten by the compile backend.

`attach` registers the queries and gains on the model and lets its `forward` hand them to the graph. From then on
the model runs compiled, or raises.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.fx import GraphModule

from attnres_fx.backend.attachment import (
    ATTRIBUTE,
    AttachedParameters,
    is_attached,
    read_key,
    require_attached,
    unwrapped,
)
from attnres_fx.capture.capture import capture
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.errors import AlreadyConvertedError, AttachError, ConfigError
from attnres_fx.ops.marker import PARAMETERS
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes import analyze_, plan_depth_reads
from attnres_fx.passes.rewrite.parameters import make_parameters
from attnres_fx.passes.streams.selection import select_streams

__all__ = ["attach", "detach", "plain"]


def attach(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: AttnResConfig | None = None,
) -> AttnResParameters:
    """Register `model.attnres`, the queries and gains of an AttnRes form of a model, in place.

    The model then runs under `torch.compile(model, backend="attnres")` and raises EagerCallError elsewhere. Its new
    parameters are found by optimizers and `state_dict`; its own names do not change.

    Args:
        model: A module with code of its own. It is captured once, in its current mode, to find its reads.
        args: Positional example arguments.
        kwargs: Keyword example arguments.
        config: Variant, blocks and output mode; `AttnResConfig()` by default.

    Returns:
        `model.attnres`: for every read a query [D], a key gain [D] and, in post-norm streams of mode `"sum"`, a gate
        [], in the dtype and on the device of the stream.

    Raises:
        AttachError: The model is attached already, or is not an `nn.Module` with code of its own.
        AlreadyConvertedError: It is a converted model.
        AttnResError: As `convert` raises where a model cannot be rewritten.
    """
    config = AttnResConfig() if config is None else config
    _check_attachable(model, config)
    mode: Mode = "train" if model.training else "eval"
    captured = capture(model, args, kwargs, modes=(mode,))
    gm = next(iter(captured.graphs.values())).gm
    streams = analyze_(gm)
    selected = select_streams(streams, config, type(model).__name__)
    plan = plan_depth_reads(streams, selected, config)
    parameters = make_parameters(gm.graph, captured.root, plan, config)
    keys = [read_key(read) for read in plan.reads]
    attached = AttachedParameters(parameters, keys)
    model.add_module(ATTRIBUTE, attached)
    model.__class__ = _attached_class(cast(Any, type(model)))
    return attached


def detach(model: nn.Module) -> None:
    """Remove `model.attnres` again, in place: the model is what it was before `attach`.

    Args:
        model: An attached model, or what `torch.compile` returned for one.

    Raises:
        AttachError: It is not attached, or its class was changed since.
    """
    require_attached(model)
    model = unwrapped(model)
    base = vars(type(model)).get("_attnres_base")
    if base is None:
        raise AttachError(f"the class of this {type(model).__name__} was changed after attach: undo that first.")
    model.__class__ = base
    delattr(model, ATTRIBUTE)
    model._compiled_call_impl = None


@contextlib.contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """Run an attached model's original function on purpose, uncompiled, inside this context.

    Args:
        model: An attached model, or what `torch.compile` returned for one.

    Yields:
        The model itself.

    Raises:
        AttachError: It is not attached.
    """
    attached = require_attached(model)
    model = unwrapped(model)
    compiled, before = model._compiled_call_impl, attached.plain
    attached.plain, model._compiled_call_impl = True, None
    try:
        yield model
    finally:
        attached.plain = before
        if is_attached(model):
            model._compiled_call_impl = compiled


def _check_attachable(model: Any, config: Any) -> None:
    if not isinstance(config, AttnResConfig):
        raise ConfigError(f"config must be an AttnResConfig; it is a {type(config).__name__}.")
    if isinstance(model, ConvertedModel):
        raise AlreadyConvertedError("the model is converted already: attach the original, or torch.compile this.")
    if not isinstance(model, nn.Module) or isinstance(model, GraphModule):
        raise AttachError(
            f"attach takes an nn.Module with code of its own, not a {type(model).__name__}: convert() takes graphs."
        )
    if isinstance(model._modules.get(ATTRIBUTE), AttachedParameters):
        raise AttachError(f"{type(model).__name__} is attached already: detach(model) first, to attach it anew.")
    if hasattr(model, ATTRIBUTE):
        raise AttachError(
            f"{type(model).__name__} has an attribute {ATTRIBUTE!r} of its own, where attach would put its."
        )
    if "forward" in vars(model):
        raise AttachError(
            f"the forward of this {type(model).__name__} is replaced on the instance: attach the model before whatever "
            f"wraps it."
        )


@functools.cache
def _attached_class(base: Any) -> Any:
    """A class that differs from a model's own in its forward alone, so that copies and pickles have it too."""
    original = base.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = self.attnres
        if not attached.plain:
            PARAMETERS(attached.tensors(), attached.about)
        return original(self, *args, **kwargs)

    def reduce(self: Any, _: Any) -> Any:
        return _new_instance, (base,), self.__getstate__()

    members = {"forward": forward, "_attnres_base": base, "__reduce_ex__": reduce}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**names, **members})


def _new_instance(base: type[nn.Module]) -> Any:
    attached = _attached_class(cast(Any, base))
    return attached.__new__(attached)
