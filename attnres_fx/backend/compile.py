"""`compile`: attach a model and compile it with the `attnres` backend, in place."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attnres_fx.backend.attach import attach
from attnres_fx.backend.attachment import is_attached, require_attached
from attnres_fx.backend.dynamo_backend import attnres, checked_options
from attnres_fx.config import RewriteConfig
from attnres_fx.errors import AttachError, BackendError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes import Lowering

__all__ = ["attnres", "compile"]


def compile(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: RewriteConfig | None = None,
    inner: str = "inductor",
    mode: str | None = None,
    inductor: Mapping[str, Any] | None = None,
    fullgraph: bool = True,
    dynamic: bool | None = True,
    lowering: Lowering | None = None,
) -> AttnResParameters:
    """Attach a model, unless it is attached already, and compile it in place with the `attnres` backend.

    Calls, `generate` and trainers then run the AttnRes form.

    Args:
        model: As for `attach`.
        args: Positional example arguments.
        kwargs: Keyword example arguments.
        config: As for `attach`; of a model that is attached already, left out or the same.
        inner: The compiler behind the rewrite, a registered backend name.
        mode: Inductor's mode.
        inductor: Inductor's options.
        fullgraph: As for `torch.compile`.
        dynamic: As for `torch.compile`.
        lowering: What is folded into the reads; `Lowering()` by default.

    Returns:
        `model.attnres`, as `attach` does.

    Raises:
        BackendError: The model is compiled already, or an option is wrong.
        AttachError: It is attached with another config, and as `attach` raises.
    """
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise BackendError(
            f"{type(model).__name__} is compiled already. Compile a fresh model, or detach(model) and compile again."
        )
    options: dict[str, Any] = {"inner": inner}
    options |= {"mode": mode} if mode is not None else {}
    options |= {"inductor": dict(inductor)} if inductor is not None else {}
    options |= {"lowering": lowering} if lowering is not None else {}
    checked_options(options, None)
    if config is not None and is_attached(model) and require_attached(model).config != config:
        raise AttachError(
            f"{type(model).__name__} is attached with another config: detach(model) first, or leave config out."
        )
    attached = require_attached(model) if is_attached(model) else attach(model, args, kwargs, config=config)
    model.compile(backend="attnres", fullgraph=fullgraph, dynamic=dynamic, options=options)
    return attached
