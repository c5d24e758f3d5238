"""Frozen dataclasses as dicts, lists, strings and numbers, and back, by their type hints."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from attnres_fx.errors import PlanError


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings, numbers, booleans and None alone."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value


def from_plain(kind: Any, value: Any, at: str) -> Any:
    """What `to_plain` was given, of the type `kind`.

    at: where it stands, for the error. Raises PlanError where it is something else.
    """
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for choice in inside:
            try:
                return from_plain(choice, value, at)
            except PlanError:
                continue
        raise _wrong(kind, value, at)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _record(kind, value, at)
    if origin is tuple and isinstance(value, list):
        kinds = [inside[0]] * len(value) if inside[-1] is ... else list(inside)
        if len(kinds) == len(value):
            pairs = zip(kinds, value, strict=True)
            return tuple(from_plain(k, v, f"{at}[{i}]") for i, (k, v) in enumerate(pairs))
    elif origin is Literal:
        if value in inside:
            return value
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and origin is None and type(value) is kind:
        return value
    raise _wrong(kind, value, at)


def _record(kind: Any, value: Any, at: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    if not isinstance(value, dict):
        raise _wrong(kind, value, at)
    needed = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    for name in (*sorted(needed - set(value)), *sorted(set(value) - set(fields))):
        raise PlanError(f"{at} {'lacks' if name in fields else 'has the unknown entry'} {name!r}.")
    hints = get_type_hints(kind)
    return kind(**{n: from_plain(hints[n], v, f"{at}.{n}") for n, v in value.items()})


def _wrong(kind: Any, value: Any, at: str) -> PlanError:
    return PlanError(f"{at} is {value!r:.60}, which is no {getattr(kind, '__name__', kind)}.")
