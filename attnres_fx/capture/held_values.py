"""Values as they can be compared later: plain data by what it is, functions, tensors and objects by which one it is."""

import enum
import functools
import types
from collections.abc import Sequence
from typing import Any

import torch

from attnres_fx.errors import AttnResError

_PLAIN = (bool, int, float, str, complex, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.layout)
_DEEPEST = 8
_LARGEST_ARRAY = 1 << 16  # bytes; of a larger one it is told which one it is


class _Unknown:
    def __repr__(self) -> str:
        return "something else"


#: Where nothing is.
UNKNOWN = _Unknown()


class Library(functools.partial):  # type: ignore[type-arg]
    """A function that this library sets on a module in the place of the module's own."""


class Which:
    """One object, equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Which) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        value = self.value
        if isinstance(value, torch.Tensor):
            return f"a tensor {tuple(value.shape)}"
        name = getattr(value, "__qualname__", None)
        return str(name) if name is not None else f"a {type(value).__qualname__}"


class Function:
    """A function, equal to every copy of it that calls the clones of the modules it closes over.

    Args:
        value: The function.
        closed: What it closes over and its defaults, in forms of their own.
    """

    def __init__(self, value: types.FunctionType, closed: tuple[Any, ...]) -> None:
        self.value, self.closed = value, closed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and (
            self.value is other.value or (self.value.__code__ is other.value.__code__ and self.closed == other.closed)
        )

    def __hash__(self) -> int:
        return hash(self.value.__code__)

    def __repr__(self) -> str:
        return self.value.__qualname__


def held(value: Any, depth: int = 0) -> Any:
    """A value in a form of its own, which later changes of the value do not reach."""
    if isinstance(value, Library | _Unknown):
        return value
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, types.MethodType):  # who is bound is another module in every clone of a tree
        return Which(value.__func__)
    if isinstance(value, types.FunctionType):
        return _function(value, depth)
    if type(value).__module__ == "numpy" and getattr(value, "nbytes", _LARGEST_ARRAY) < _LARGEST_ARRAY:
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, torch.nn.Module):
        return Which(type(value))
    if depth < _DEEPEST:
        if type(value) is functools.partial:
            return held((value.func, value.args, value.keywords), depth + 1)
        if isinstance(value, list | tuple):
            return tuple(held(v, depth + 1) for v in value)
        if type(value) in (set, frozenset):
            return frozenset(held(v, depth + 1) for v in value)
        if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
            return tuple((held(k, depth + 1), held(v, depth + 1)) for k, v in value.items())
    return Which(value)


def _function(function: types.FunctionType, depth: int) -> Function:
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:
            cells.append(UNKNOWN)
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return Function(function, tuple(_closed_over(v, depth + 1) for v in (*cells, *defaults)))


def _closed_over(value: Any, depth: int) -> Any:
    """Containers and objects that lead to modules are others in every clone of a tree; of its root, so is the class."""
    kinds = (*_PLAIN, torch.Tensor, types.FunctionType, types.MethodType, functools.partial)
    if depth < _DEEPEST and isinstance(value, kinds):
        return held(value, depth)
    return Which(torch.nn.Module if isinstance(value, torch.nn.Module) else type(value))


def walked(value: Any, steps: Sequence[Any]) -> Any:
    """What attributes and keys lead to from a value; a function of this library's is the end of the way."""
    for step in steps:
        if isinstance(value, Library):
            break
        value = value[step] if isinstance(value, dict | list | tuple) else getattr(value, step)
    return value


def value_at(holder: Any, steps: Sequence[Any]) -> Any:
    """The plain value there, in a form of its own; UNKNOWN where there is none."""
    try:
        value = held(walked(holder, steps))
    except (AttributeError, KeyError, IndexError, TypeError, AttnResError):
        return UNKNOWN
    return value if _is_plain(value) else UNKNOWN


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def same(one: Any, other: Any) -> bool:
    """Whether two held values are the same."""
    return one is other or (type(one) is type(other) and bool(one == other))
