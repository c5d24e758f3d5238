"""The watched values of one module tree, compared at every call."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from attnres_fx.capture.held_values import UNKNOWN
from attnres_fx.capture.watched import WatchedValue

_IMMUTABLE = (bool, int, float, str, complex, bytes, type(None))
_ABOUT_THE_OBJECT = ("type", "has", "submodule", "attribute")


class WatchList:
    """What graphs hold of one tree. A tree is not kept alive by it.

    Most values are attributes of a module that hold an object which cannot change: those are compared by identity
    first, and by what they are only where that fails.

    Args:
        base: The class whose attributes the root's are, where that is not its own.
    """

    def __init__(self, base: type[nn.Module] | None = None) -> None:
        self.base = base
        self._entries: dict[tuple[Any, ...], tuple[Any, str | None, Any, WatchedValue]] = {}
        self._classes: dict[tuple[type, str], Any] = {}

    def add(self, root: nn.Module, values: Iterable[WatchedValue]) -> None:
        """Compare these values too; the last word on a place is taken."""
        modules = dict(root.named_modules(remove_duplicate=False))
        for value in values:
            module = modules.get(value.module)
            if module is None:  # taken out of the tree since
                continue
            name, seen = self._probe(module, value) if self._holds(value, module, root) else (None, None)
            self._entries[value.place] = (weakref.ref(module), name, seen, value)

    def changed(self, root: nn.Module) -> tuple[WatchedValue, Any] | None:
        """The first value that is not what it was, and what it is now."""
        same_classes = all(getattr(kind, name, UNKNOWN) is seen for (kind, name), seen in self._classes.items())
        for reference, name, seen, value in self._entries.values():
            module = reference()
            if module is None:
                continue
            unchanged = name is not None and module.__dict__.get(name, UNKNOWN) is seen
            if unchanged and (same_classes or seen is not UNKNOWN):
                continue
            if not self._holds(value, module, root):
                return value, value.now(module, self._kind(module, root))
        return None

    def _holds(self, value: WatchedValue, module: nn.Module, root: nn.Module) -> bool:
        return value.holds(module, root, self._kind(module, root))

    def _kind(self, module: nn.Module, root: nn.Module) -> type | None:
        return self.base if module is root else None

    def _probe(self, module: nn.Module, value: WatchedValue) -> tuple[str | None, Any]:
        """The attribute of the module whose identity tells that a value is what it was, and the object it holds."""
        if len(value.steps) > 1 or (value.steps and value.aspect in ("attribute", "has")):
            return None, None
        name = value.name
        seen = module.__dict__.get(name, UNKNOWN)
        if seen is UNKNOWN:
            if value.aspect != "attribute" or (self.base is not None and not value.module):
                return None, None
            self._classes.setdefault((type(module), name), getattr(type(module), name, UNKNOWN))
            return name, seen
        fixed = isinstance(seen, _IMMUTABLE) or value.aspect in _ABOUT_THE_OBJECT or callable(seen)
        return (name, seen) if fixed else (None, None)
