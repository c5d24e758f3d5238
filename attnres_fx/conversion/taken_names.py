"""Names that a model has and its conversion wants: the model keeps what it can, and the rest is refused by name."""

import functools
import inspect
from typing import Any

from torch import nn

from attnres_fx.errors import RewriteError

#: Names of a converted model's own that nothing in the library needs to reach by attribute: a model's own stand there.
YIELDING = ("save", "mode", "programs", "failures", "signature", "in_spec", "lowering", "typed")

_STORES = ("_parameters", "_buffers", "_modules")


def refuse_taken_names(model: nn.Module, kind: type[nn.Module], added: tuple[str, ...]) -> None:
    """Raise RewriteError where something of a model has a name that the conversion needs.

    Args:
        model: A module with code of its own.
        kind: The class that runs programs.
        added: The children that a conversion adds.
    """
    own = {name for k in kind.__mro__ if k not in nn.Module.__mro__ for name in vars(k)}
    own = {name for name in own if not name.startswith("__")}
    needed = sorted((own | set(added)) - set(dir(nn.Module)) - set(YIELDING))
    for name in needed:
        if what := _what_has(model, name):
            raise RewriteError(
                f"{type(model).__name__} has {what} named {name!r}, and its conversion would have its own there: "
                f"rename it, or convert a module that holds the model and calls it in forward."
            )


def yielded(model: nn.Module) -> tuple[str, ...]:
    """Names of a converted model's own that a model has itself, and keeps."""
    return tuple(name for name in YIELDING if _what_has(model, name))


def as_the_model_has(base: type[nn.Module], name: str) -> Any:
    """What a derived class has at a name that the model keeps: the class's own, or what the instance holds."""
    if hasattr(base, name):
        return inspect.getattr_static(base, name)
    get, put, delete = (functools.partial(do, name) for do in (_get, _set, _delete))
    return property(get, put, delete)


def _what_has(model: nn.Module, name: str) -> str:
    for store, what in zip(_STORES, ("a parameter", "a buffer", "a submodule"), strict=True):
        if name in model.__dict__.get(store, ()):  # a TorchScript module keeps its own elsewhere
            return what
    if name in model.__dict__:
        return "an attribute"
    if hasattr(type(model), name):
        return "a method" if callable(getattr(type(model), name)) else "a class attribute"
    return ""


def _get(name: str, model: nn.Module) -> Any:
    for held in (model.__dict__, *(model.__dict__[store] for store in _STORES)):
        if name in held:
            return held[name]
    raise AttributeError(f"{type(model).__name__!r} object has no attribute {name!r}")


def _set(name: str, model: nn.Module, value: Any) -> None:
    model.__dict__[name] = value


def _delete(name: str, model: nn.Module) -> None:
    del model.__dict__[name]
