"""Frozen dataclasses as dicts, lists, strings and numbers, and back, by their type hints: what files hold.

A field hinted `Any` keeps the difference between tuples and lists, and keys that are no strings.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from attnres_fx.config import CONFIG_CLASS, RewriteConfig
from attnres_fx.errors import AttnResError, ConfigError

_SCALARS = (bool, int, float, str, type(None))


def to_plain(value: Any, *, error: type[AttnResError], kind: Any = None) -> Any:
    """A value as data that JSON can hold.

    Args:
        value: dataclasses, mappings, tuples, lists, strings, numbers, booleans and None, in one another.
        error: the class of the error to raise.
        kind: the type hint of the value, where it has one.

    Returns:
        Dicts, lists, strings, numbers, booleans and None alone.

    Raises:
        error: where something in the value is none of these.
    """
    if kind is Any:
        return _tagged(value, error)
    if isinstance(value, RewriteConfig):
        return {n: to_plain(v, error=error) for n, v in value.to_data().items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        fields = (f.name for f in dataclasses.fields(value) if f.init)
        return {n: to_plain(getattr(value, n), error=error, kind=hints[n]) for n in fields}
    if isinstance(value, Mapping):
        inside = get_args(kind)[1] if get_origin(kind) is Mapping else None
        return {str(k): to_plain(v, error=error, kind=inside) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v, error=error) for v in value]
    if isinstance(value, _SCALARS):
        return value
    raise error(f"{value!r:.60} of type {type(value).__name__} cannot be written as plain data.")


def from_plain(kind: Any, value: Any, at: str, *, error: type[AttnResError]) -> Any:
    """What `to_plain` was given.

    Args:
        kind: its type: a dataclass, `tuple[...]`, `Sequence[...]` (read as a tuple), `Mapping[str, ...]`, a union,
            `Literal[...]`, a scalar type or `Any`.
        value: what `to_plain` returned.
        at: where the value stands in its file, for the error.
        error: the class of the error to raise.

    Returns:
        A value of the type `kind`.

    Raises:
        error: where the value has another type; it names the place.
    """
    if kind is Any:
        return _untagged(value, at, error)
    if kind is RewriteConfig:
        return _config(value, at, error)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _record(kind, value, at, error)
    reader = _READERS.get(get_origin(kind))
    if reader is not None:
        return reader(kind, value, at, error)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise _mismatch(kind, value, at, error) from None
    if type(value) is kind:
        return value
    raise _mismatch(kind, value, at, error)


def _config(value: Any, at: str, error: type[AttnResError]) -> RewriteConfig:
    """A config of the class that the data names."""
    if not isinstance(value, dict):
        raise _mismatch(RewriteConfig, value, at, error)
    try:
        kind = RewriteConfig.class_in(value)
    except ConfigError as unknown:
        raise error(f"{at}: {unknown}") from unknown
    config = _record(kind, {n: v for n, v in value.items() if n != CONFIG_CLASS}, at, error)
    assert isinstance(config, RewriteConfig)
    return config


def _record(kind: Any, value: Any, at: str, error: type[AttnResError]) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(kind, value, at, error)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    needed = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    for name in (*sorted(needed - set(value)), *sorted(set(value) - set(fields))):
        raise error(f"{at} {'lacks' if name in fields else 'has the unknown entry'} {name!r}.")
    hints = _hints(kind)
    return kind(**{n: from_plain(hints[n], v, f"{at}.{n}", error=error) for n, v in value.items()})


def _union(kind: Any, value: Any, at: str, error: type[AttnResError]) -> Any:
    for choice in get_args(kind):
        try:
            return from_plain(choice, value, at, error=error)
        except error:
            continue
    raise _mismatch(kind, value, at, error)


def _tuple(kind: Any, value: Any, at: str, error: type[AttnResError]) -> Any:
    inside = get_args(kind)
    repeats = get_origin(kind) is Sequence or inside[-1:] == (...,)
    if not isinstance(value, list) or (not repeats and len(value) != len(inside)):
        raise _mismatch(kind, value, at, error)
    kinds = [inside[0]] * len(value) if repeats else inside
    pairs = zip(kinds, value, strict=True)
    return tuple(from_plain(k, v, f"{at}[{i}]", error=error) for i, (k, v) in enumerate(pairs))


def _mapping(kind: Any, value: Any, at: str, error: type[AttnResError]) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(kind, value, at, error)
    return {k: from_plain(get_args(kind)[1], v, f"{at}[{k!r}]", error=error) for k, v in value.items()}


def _literal(kind: Any, value: Any, at: str, error: type[AttnResError]) -> Any:
    if not isinstance(value, _SCALARS) or value not in get_args(kind):
        raise _mismatch(kind, value, at, error)
    return value


_Reader = Callable[[Any, Any, str, type[AttnResError]], Any]
_READERS: dict[Any, _Reader] = {
    Union: _union,
    types.UnionType: _union,
    tuple: _tuple,
    Sequence: _tuple,
    Mapping: _mapping,
    Literal: _literal,
}


def _tagged(value: Any, error: type[AttnResError]) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_tagged(v, error) for v in value]}
    if isinstance(value, list):
        return [_tagged(v, error) for v in value]
    if isinstance(value, dict):
        return {"dict": [[_tagged(k, error), _tagged(v, error)] for k, v in value.items()]}
    return to_plain(value, error=error)


def _untagged(value: Any, at: str, error: type[AttnResError]) -> Any:
    if isinstance(value, list):
        return [_untagged(v, at, error) for v in value]
    if isinstance(value, _SCALARS):
        return value
    match value:
        case {"tuple": [*entries]}:
            return tuple(_untagged(v, at, error) for v in entries)
        case {"dict": [*entries]} if all(isinstance(e, list) and len(e) == 2 for e in entries):
            return {_untagged(k, at, error): _untagged(v, at, error) for k, v in entries}
    raise _mismatch(Any, value, at, error)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _mismatch(kind: Any, value: Any, at: str, error: type[AttnResError]) -> AttnResError:
    return error(f"{at} is {value!r:.60}, which is no {getattr(kind, '__name__', kind)}.")
