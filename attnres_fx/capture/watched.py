"""Values of a module tree that a trace took as they were: numbers, flags and lists that became part of the graph."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnres_fx.errors import AttnResError

_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[['\"]([^'\"\]]+)['\"]\]|\[(\d+)\]")
_NUMPY = re.compile(r"___from_numpy\(L\['module'\](.*)\)$")
#: Kinds of guards that say that a plain value became part of a graph.
VALUE_GUARDS = ("CONSTANT_MATCH", "EQUALS_MATCH", "SEQUENCE_LENGTH", "DICT_LENGTH", "BOOL_MATCH", "NONE_MATCH")
_LARGEST_ARRAY = 1 << 16  # bytes; a larger table is compared by nobody at every call
_TREE = ("_modules", "_parameters", "_buffers", "training")


@dataclass(frozen=True)
class WatchedValue:
    """A value that a graph holds.

    Attributes:
        module: Path of the module that has it.
        steps: Attributes and keys that lead to it from there.
        value: What it was, in containers of its own.
    """

    module: str
    steps: tuple[Any, ...]
    value: Any


def watched_values(root: nn.Module, guards: Iterable[tuple[str, str]]) -> tuple[WatchedValue, ...]:
    """What a trace took for granted of a module tree.

    Args:
        root: The traced tree.
        guards: Source and kind of each guard, as Dynamo writes them; the root is `module`.

    Returns:
        One entry for each plain value, or container of plain values, that belongs to a module.
    """
    found: dict[tuple[str, tuple[Any, ...]], WatchedValue] = {}
    for source, kind in guards:
        if kind not in VALUE_GUARDS or not source.startswith("module"):
            continue
        steps = steps_of(source.removeprefix("module"))
        if steps is None:
            continue
        place = _module_and_steps(root, [s for s in steps if s != "__dict__"])
        if place is None or not place[1] or place[1][0] in _TREE or str(place[1][0]).endswith("hooks"):
            continue
        value = value_at(root.get_submodule(place[0]), place[1])
        if value is not UNKNOWN:
            found[place] = WatchedValue(*place, value)
    return tuple(found.values())


def numpy_source(source: str) -> str:
    """The source of a numpy value of a module that Dynamo makes a tensor of; empty for another source."""
    match = _NUMPY.match(source)
    return f"module{match.group(1)}" if match else ""


class _Unknown:
    def __repr__(self) -> str:
        return "something else"


UNKNOWN = _Unknown()


def value_at(module: Any, steps: Sequence[Any]) -> Any:
    """The plain value there; UNKNOWN where there is none."""
    value: Any = module
    try:
        for step in steps:
            value = value[step] if isinstance(value, dict | list | tuple) else getattr(value, step)
    except (AttributeError, KeyError, IndexError, TypeError):
        return UNKNOWN
    except AttnResError:
        return UNKNOWN
    return _plain(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str | complex):
        return value
    if type(value).__module__ == "numpy" and getattr(value, "nbytes", _LARGEST_ARRAY) < _LARGEST_ARRAY:
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, list | tuple):
        held = [_plain(v) for v in value]
        return UNKNOWN if any(h is UNKNOWN for h in held) else tuple(held)
    return UNKNOWN


def steps_of(text: str) -> list[Any] | None:
    """The accessors of a source; None where it is more than accessors."""
    steps: list[Any] = []
    at = 0
    while at < len(text):
        match = _STEP.match(text, at)
        if match is None:
            return None
        attribute, key, index = match.groups()
        steps.append(int(index) if index is not None else attribute if attribute is not None else key)
        at = match.end()
    return steps


def _module_and_steps(root: nn.Module, steps: Sequence[Any]) -> tuple[str, tuple[Any, ...]] | None:
    """The longest path of submodules that the accessors begin with, and the accessors after it."""
    module, at = root, 0
    path: list[str] = []
    while at < len(steps):
        name = steps[at + 1] if steps[at] == "_modules" and at + 1 < len(steps) else steps[at]
        child = module._modules.get(str(name))
        if child is None:
            break
        at += 2 if steps[at] == "_modules" else 1
        module, path = child, [*path, str(name)]
    return ".".join(path), tuple(steps[at:])
