"""Python objects outside a module tree that a call writes to: kept as they were, and compared."""

import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import CellType, ModuleType
from typing import Any

import torch
from torch import nn

from attnres_fx.capture.side_effects import PythonChange, contents_of, mark_of, settled, shown_as

_MISSING = object()


@dataclass(frozen=True)
class WrittenObject:
    """An object that a traced call writes to.

    Attributes:
        value: The object: a container, a closure's cell, a class, a Python module or another object.
        names: The attributes that are written, for what is no container.
        place: What it is, in words.
        line: Where the call writes to it.
    """

    value: Any
    names: tuple[str, ...]
    place: str
    line: str


class OutsideState:
    """What objects held at one time.

    Args:
        objects: The objects; they are kept alive.
    """

    def __init__(self, objects: Iterable[WrittenObject]) -> None:
        self.objects = tuple(objects)
        self.before = [_held(o) for o in self.objects]

    def beyond(self, root: nn.Module) -> "OutsideState":
        """Without the modules of a tree and the containers that are their attributes."""
        inside = set()
        for module in root.modules():
            stores = (module._parameters, module._buffers, module._modules)
            attributes = [v for v in module.__dict__.values() if type(v) in (list, set, dict, OrderedDict, defaultdict)]
            inside |= {id(x) for x in (module, module.__dict__, *stores, *attributes)}
        kept = OutsideState(())
        pairs = [(o, b) for o, b in zip(self.objects, self.before, strict=True) if id(o.value) not in inside]
        kept.objects, kept.before = tuple(o for o, _ in pairs), [b for _, b in pairs]
        return kept

    def changes(self) -> list[PythonChange]:
        """What is another than it was then, by the line that wrote it."""
        found = []
        for o, before in zip(self.objects, self.before, strict=True):
            now = _held(o)
            for key in dict.fromkeys((*before, *now)):
                old, new = before.get(key, _MISSING), now.get(key, _MISSING)
                if _marks(old) != _marks(new):
                    name = f"{o.place}.{key}" if key else o.place
                    logged = _is_log(o, old, new)
                    found.append(PythonChange("", name, _words(old), f"{_words(new)}{o.line}", True, logged))
        return found

    def settle_(self, device: torch.device) -> None:
        """Let zeros take the place of stand-ins that were written, so that another trace can see them."""
        for o in self.objects:
            _put_(o, {k: settled(v, device) for k, v in _held(o).items()})

    def restore_(self, *, keep_logs: bool = False) -> None:
        """Let the objects hold again what they held then, but for logs of calls that were really made."""
        for o, before in zip(self.objects, self.before, strict=True):
            now = _held(o)
            if keep_logs and _is_log(o, before.get("", _MISSING), now.get("", _MISSING)):
                continue
            if any(_marks(now.get(k, _MISSING)) != _marks(before.get(k, _MISSING)) for k in {*now, *before}):
                _put_(o, before)


def _is_log(o: WrittenObject, old: Any, new: Any) -> bool:
    """Whether plain values were put at the end of a list that a Python module has: nothing a call computes with."""
    if not (isinstance(old, list) and isinstance(new, list)) or o.place.rpartition(".")[0] not in sys.modules:
        return False
    kept, added = new[: len(old)], new[len(old) :]
    same = len(kept) == len(old) and all(a is b for a, b in zip(kept, old, strict=True))
    return same and all(isinstance(x, bool | int | float | str | None) for x in added)


def _is_container(value: Any) -> bool:
    return isinstance(value, list | dict | set | deque)


def _held(o: WrittenObject) -> dict[str, Any]:
    """The contents of a container under "", or the attributes that are written."""
    found: dict[str, Any] = {}
    if _is_container(o.value):
        found[""] = dict(dict.items(o.value)) if isinstance(o.value, dict) else type_of(o.value)(o.value)
    for name in o.names:
        value = _attribute(o.value, name)
        if value is not _MISSING:
            found[name] = value
    return found


def type_of(value: Any) -> type:
    """The built-in kind of a container."""
    return next(kind for kind in (list, set, deque) if isinstance(value, kind))


def _attribute(value: Any, name: str) -> Any:
    if isinstance(value, CellType):
        try:
            return value.cell_contents
        except ValueError:
            return _MISSING
    held = getattr(value, "__dict__", None)
    if held is not None and name in held:
        return held[name]
    return _MISSING if held is not None else getattr(value, name, _MISSING)


def _put_(o: WrittenObject, held: dict[str, Any]) -> None:
    if "" in held:
        _fill_(o.value, held[""])
    for name in o.names:
        value = held.get(name, _MISSING)
        if isinstance(o.value, CellType):
            if value is not _MISSING:
                o.value.cell_contents = value
        elif value is _MISSING:
            if name in getattr(o.value, "__dict__", {}):
                delattr(o.value, name) if isinstance(o.value, type | ModuleType) else o.value.__dict__.pop(name)
        elif isinstance(o.value, type | ModuleType) or not hasattr(o.value, "__dict__"):
            setattr(o.value, name, value)
        else:
            o.value.__dict__[name] = value


def _fill_(container: Any, held: Any) -> None:
    if isinstance(container, list):
        container[:] = held
        return
    container.clear()
    container.extend(held) if isinstance(container, deque) else container.update(held)


def _marks(value: Any) -> Any:
    inside = contents_of(value)
    return mark_of(value) if inside is None else inside


def _words(value: Any) -> str:
    return "missing" if value is _MISSING else shown_as(contents_of(value), value)
