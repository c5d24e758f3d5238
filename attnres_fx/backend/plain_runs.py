"""Which attached models run their original function, in this thread and in this task."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.fx import GraphModule

from attnres_fx.backend.attachment import AttachedParameters, require_attached, unwrapped
from attnres_fx.errors import EagerCallError
from attnres_fx.ops.marker import PARAMETERS

_PLAIN: "ContextVar[frozenset[AttachedParameters]]" = ContextVar("attnres_fx_plain", default=frozenset())


def runs_plain(attached: AttachedParameters) -> bool:
    """Whether the model with these parameters runs its original function here."""
    return attached in _PLAIN.get()


@contextlib.contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """Run an attached model's original function on purpose, uncompiled, inside this context.

    It is for this thread and, in asynchronous code, for this task: others go on to run the AttnRes form.

    Args:
        model: An attached model, or what `torch.compile` returned for one.

    Yields:
        The model itself. What `torch.compile` returned for it is still the compiled form and raises here.

    Raises:
        AttachError: It is not attached.
    """
    attached = require_attached(model)
    token = _PLAIN.set(_PLAIN.get() | {attached})
    try:
        yield unwrapped(model)
    finally:
        _PLAIN.reset(token)


def refusing_plain(compiled: Callable[..., Any], gm: GraphModule) -> Callable[..., Any]:
    """A compiled graph of an attached model that raises inside `plain(model)`.

    Args:
        compiled: What runs.
        gm: The graph it was made from, as Dynamo handed it over.
    """
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    taken = {t for n in gm.graph.nodes if n.target is PARAMETERS for t in n.args[0]}
    places = [i for i, n in enumerate(inputs) if n in taken]

    def run(*args: Any) -> Any:
        models = _PLAIN.get()
        if models:
            given = {id(args[i]) for i in places}
            if any(id(t) in given for m in models for t in m.parameters()):
                raise EagerCallError(
                    "a compiled form of this model was called inside attnres_fx.plain(model), and would compute "
                    "attention over depth: call what plain yields, `with attnres_fx.plain(model) as original:`."
                )
        return compiled(*args)

    return run
