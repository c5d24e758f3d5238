"""Values as they can be compared later: plain data by what it is, functions, tensors and objects by which one it is."""

import enum
import functools
import types
from typing import Any

import torch

_PLAIN = (bool, int, float, str, complex, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.layout)
_DEEPEST = 8


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


def held(value: Any, depth: int = 0) -> Any:
    """A value in a form of its own, which later changes of the value do not reach."""
    if isinstance(value, Library | _Unknown):
        return value
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, types.MethodType):  # who is bound is another module in every clone of a tree
        return Which(value.__func__)
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


def same(one: Any, other: Any) -> bool:
    """Whether two held values are the same."""
    return one is other or (type(one) is type(other) and bool(one == other))
