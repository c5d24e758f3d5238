"""The forward and backward hooks on a model itself: part of its graph where a graph can hold them."""

import copy
import functools
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.capture.signature import has_own_call

_FORWARD = ("_forward_hooks", "_forward_pre_hooks")
_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
#: Containers inside containers that a hook may write to.
_DEEPEST = 4


def take_forward_hooks_(model: nn.Module) -> dict[str, Any]:
    """Take the forward hooks off a model itself, in place.

    Returns:
        What `model.__dict__` is to be updated with to put them back.
    """
    return _taken_(model, (*_FORWARD, *_OPTIONS))


def take_backward_hooks_(model: nn.Module) -> dict[str, Any]:
    """Take the backward hooks off a model itself, in place, as `take_forward_hooks_` does."""
    return _taken_(model, _BACKWARD)


def copy_hooks_(source: nn.Module, target: nn.Module) -> None:
    """Put the hooks on one model itself on another too, in place."""
    for name in (*_FORWARD, *_OPTIONS, *_BACKWARD, "_is_full_backward_hook"):
        target.__dict__[name] = copy.copy(source.__dict__.get(name))


def _taken_(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    taken = {name: model.__dict__[name] for name in names}
    model.__dict__.update({name: type(held)() for name, held in taken.items()})
    return taken


def without_hooks(model: nn.Module, *, forward: bool) -> nn.Module:
    """A clone of a model without backward hooks on the model itself, where they can fire around its graph.

    Args:
        model: Left as it is.
        forward: Whether to leave its forward hooks away too.
    """
    if has_own_call(model) or not (forward or any(model.__dict__[name] for name in _BACKWARD)):
        return model
    clone, _ = clone_tree(model)
    if forward:
        take_forward_hooks_(clone)
    take_backward_hooks_(clone)
    return clone


def hook_state(model: nn.Module) -> dict[str, Any]:
    """What the forward hooks on a model itself hold outside of it, by the hook's name: to be compared."""
    hooks = [hook for name in _FORWARD for hook in model.__dict__[name].values()]
    return {f"{_name_of(hook)} ({i + 1})": _contents(hook, 0) for i, hook in enumerate(hooks)}


def _name_of(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))


def _contents(value: Any, depth: int) -> Any:
    """What a hook, or a container that it holds, consists of: numbers and text by value, the rest by identity."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if depth >= _DEEPEST or isinstance(value, nn.Module | type | types.ModuleType):
        return id(value)
    return id(value), tuple(_contents(v, depth + 1) for v in _held(value))


def _held(value: Any) -> Iterable[Any]:
    kind = type(value)
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(value)
    if kind is types.MethodType:
        return (value.__func__, value.__self__)
    if kind is functools.partial:
        return (value.func, *value.args, *value.keywords.values())
    if kind is types.FunctionType:
        named = (value.__globals__.get(n) for n in value.__code__.co_names)
        plain = (v for v in named if not callable(v) and not isinstance(v, types.ModuleType))
        return (*map(_cell, value.__closure__ or ()), *plain, *(value.__defaults__ or ()))
    return tuple(getattr(value, "__dict__", {}).values()) if not hasattr(value, "__array__") else ()


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
