"""The class of a converted model: it runs programs, and is the original's."""

import functools
import inspect
from typing import Any

from torch import nn

from attnres_fx.capture.signature import CallSignature


def derived_class(kind: type, base: type[nn.Module] | None, signature: CallSignature) -> type:
    """A class that runs programs, and is the original's; its `forward` shows its arguments to whoever inspects it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    if base is not None:
        shown = inspect.signature(base.forward)
        forward = functools.wraps(base.forward)(forward)
        forward.__signature__ = shown  # type: ignore[attr-defined]
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        return type(base.__name__, (kind, base), {"forward": forward, **names})
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    shown = signature.to_inspect()
    forward.__signature__ = shown.replace(parameters=[own, *shown.parameters.values()])  # type: ignore[attr-defined]
    forward.__doc__ = f"The original's forward, with the arguments it was captured with: {signature}."
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
