"""Values that lead to modules or tensors of a tree, made to lead to what stands in their place."""

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

from attnres_fx.capture.held_values import Library

_PARTIALS = (functools.partial, Library)
_PLAINLY = (object.__new__, types.SimpleNamespace.__new__)
_DEEPEST = 6  # containers inside containers; deeper ones are shared with the original


class Followed:
    """Gives values with the modules and tensors of a tree replaced, in containers, functions and objects of their own.

    What does not lead to one of them is handed back as it is, but for lists, tuples, sets and dicts, which are copied.
    Of objects that are not called only those are followed that hold one themselves, or in a container. An object comes
    out as one, however many attributes hold it.

    Args:
        places: By the id of each module and tensor of the tree, what stands in its place.
    """

    def __init__(self, places: Mapping[int, Any]) -> None:
        self.places = places
        self.made: dict[int, tuple[Any, Any]] = {}
        self.known: dict[int, tuple[Any, bool]] = {}

    def __call__(self, value: Any) -> Any:
        """The value with everything replaced."""
        return self._followed(value, 0)

    def _followed(self, value: Any, depth: int) -> Any:
        if isinstance(value, nn.Module | Tensor):
            return self.places.get(id(value), value)
        if depth >= _DEEPEST:
            return value
        kind = type(value)
        if kind is list or kind is tuple:
            return kind(self._followed(v, depth + 1) for v in value)
        if kind is set:
            return set(value)
        if _is_dict(value):
            copied = value.copy()
            for key, held in value.items():
                copied[key] = self._followed(held, depth + 1)
            return copied
        if not self._leads(value, depth):
            return value
        return self._callable(value, lambda v: self._followed(v, depth + 1) if self._leads(v, depth + 1) else v)

    def _callable(self, value: Any, follow: Callable[[Any], Any]) -> Any:
        """The callable or object on what stands in the place of what it is bound to, closes over or holds."""
        kind = type(value)
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self._object(value.__self__, follow))
        if kind is types.FunctionType:
            cells = tuple(types.CellType(follow(c.cell_contents)) if _filled(c) else c for c in value.__closure__ or ())
            made: Any = types.FunctionType(value.__code__, _globals(value, follow), value.__name__, None, cells or None)
            made.__defaults__, made.__kwdefaults__ = follow(value.__defaults__), follow(value.__kwdefaults__)
            made.__dict__.update({n: follow(v) for n, v in value.__dict__.items()})
            return made
        if kind in _PARTIALS:
            keywords = {k: follow(v) for k, v in value.keywords.items()}
            made = kind(follow(value.func), *map(follow, value.args), **keywords)
            made.__dict__.update({n: follow(v) for n, v in value.__dict__.items()})
            return made
        if kind is _WrappedHook:
            return _WrappedHook(follow(value.hook), follow(value.module()) if value.with_module else None)  # type: ignore[no-untyped-call]
        return self._object(value, follow)

    def _object(self, value: Any, follow: Callable[[Any], Any]) -> Any:
        if not _is_plain_object(value):
            return follow(value)
        if id(value) not in self.made:
            kind: Any = type(value)
            made = kind.__new__(kind)
            self.made[id(value)] = (value, made)  # first: what it holds may hold it
            made.__dict__.update({n: follow(v) for n, v in value.__dict__.items()})
        return self.made[id(value)][1]

    def _leads(self, value: Any, depth: int) -> bool:
        """Whether a value leads to a module or a tensor of the tree."""
        if isinstance(value, nn.Module | Tensor):
            return id(value) in self.places
        if depth >= _DEEPEST:
            return False
        if not callable(value) and _is_plain_object(value):
            return self._holds(value)
        return any(self._leads(v, depth + 1) for v in _parts(value))

    def _holds(self, value: Any) -> bool:
        """Whether an object that is not called holds one itself, or in a container."""
        if id(value) not in self.known:
            held = [*value.__dict__.values()]
            inside = [x for v in held for x in _contents(v)]
            found = any(isinstance(x, nn.Module | Tensor) and id(x) in self.places for x in (*held, *inside))
            self.known[id(value)] = (value, found)
        return self.known[id(value)][1]


def _contents(value: Any) -> Iterable[Any]:
    if type(value) in (list, tuple):
        return tuple(value)
    return tuple(value.values()) if _is_dict(value) else ()


def _parts(value: Any) -> Iterable[Any]:
    """What a container or a callable holds."""
    kind = type(value)
    if kind in (list, tuple) or _is_dict(value):
        return _contents(value)
    if kind is types.MethodType:
        owner = value.__self__
        return tuple(owner.__dict__.values()) if _is_plain_object(owner) else (owner,)
    if kind is types.FunctionType:
        cells = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
        used = _bound_globals(value).values()
        return (*cells, *used, value.__defaults__, value.__kwdefaults__, *value.__dict__.values())
    if kind in _PARTIALS:
        return (value.func, *value.args, *value.keywords.values(), *value.__dict__.values())
    if kind is _WrappedHook:
        return (value.hook, value.module() if value.with_module else None)
    return tuple(value.__dict__.values()) if callable(value) and _is_plain_object(value) else ()


def _bound_globals(function: types.FunctionType) -> dict[str, Any]:
    """The global variables of a function that hold a module, or what is bound to one."""
    named = function.__code__.co_names
    held = {n: function.__globals__[n] for n in named if n in function.__globals__}
    return {n: v for n, v in held.items() if isinstance(v, nn.Module | types.MethodType | functools.partial)}


def _globals(function: types.FunctionType, follow: Callable[[Any], Any]) -> dict[str, Any]:
    changed = {n: new for n, v in _bound_globals(function).items() if (new := follow(v)) is not v}
    return {**function.__globals__, **changed} if changed else function.__globals__


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and type(value).__module__ in ("builtins", "collections")


def _is_plain_object(value: Any) -> bool:
    """Whether all that an object is stands in its attributes."""
    kind: Any = type(value)
    made_plainly = kind.__new__ in _PLAINLY and kind.__reduce_ex__ is object.__reduce_ex__
    return made_plainly and not isinstance(value, nn.Module) and hasattr(value, "__dict__")


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
