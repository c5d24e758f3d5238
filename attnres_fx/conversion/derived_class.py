"""The class of a converted model: it runs programs, and is the original's."""

import functools
import inspect
from typing import Any

from attnres_fx.capture.signature import CallSignature
from attnres_fx.conversion.around_forward import refusing
from attnres_fx.conversion.own_python import OwnPython
from attnres_fx.conversion.pretrained_folder import saving_methods
from attnres_fx.conversion.taken_names import as_the_model_has


def derived_class(kind: type, own: OwnPython | None, signature: CallSignature) -> type:
    """A class that runs programs, and is the original's; its `forward` shows its arguments to whoever inspects it."""
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    if own is not None:
        base = own.kind
        forward = functools.wraps(base.forward)(forward)
        forward.__signature__ = _with_first(itself, own.called)  # type: ignore[attr-defined]
        refused = {name: refusing(getattr(base, name)) for name in own.methods}
        kept = {name: as_the_model_has(base, name) for name in own.names}
        kept |= saving_methods(base)
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        return type(base.__name__, (kind, base), {**kept, **refused, "forward": forward, **names})
    forward.__signature__ = _with_first(itself, signature.to_inspect())  # type: ignore[attr-defined]
    forward.__doc__ = f"The original's forward, with the arguments it was captured with: {signature}."
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _with_first(itself: inspect.Parameter, shown: inspect.Signature) -> inspect.Signature:
    return shown.replace(parameters=[itself, *shown.parameters.values()])
