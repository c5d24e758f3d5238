"""What a trace took for granted of a module tree: values, functions, lengths and names that its graph holds."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnres_fx.capture.guard_places import TREE, Guarded, places_of
from attnres_fx.capture.held_values import UNKNOWN, Library, held, same, walked
from attnres_fx.errors import AttnResError
from attnres_fx.passes.graph.module_paths import module_at

_NUMPY_ARGUMENT = re.compile(r"___from_numpy\(L\['(args|kwargs)'\]")
_NUMPY = re.compile(r"___from_numpy\(L\['module'\](.*)\)$")
_CONTENTS = ("DICT_CONTAINS", "SET_CONTAINS", "DICT_NOT_CONTAINS", "SET_NOT_CONTAINS")
_VALUES = (
    "CONSTANT_MATCH",
    "EQUALS_MATCH",
    "BOOL_MATCH",
    "NONE_MATCH",
    "BUILTIN_MATCH",
    "CLOSURE_MATCH",
    "FUNCTION_MATCH",
    "ID_MATCH",
    "CLASS_MATCH",
    "TENSOR_MATCH",
)
#: What of a place each kind of guard compares.
_ASPECTS = {
    **dict.fromkeys(_VALUES, "value"),
    **dict.fromkeys(("SEQUENCE_LENGTH", "DICT_LENGTH", "EMPTY_NN_MODULE_HOOKS_DICT"), "length"),
    **dict.fromkeys(_CONTENTS, "key"),
    "TYPE_MATCH": "type",
    "DICT_KEYS_MATCH": "keys",
    "DICT_CONST_KEYS": "keys",
}


@dataclass(frozen=True)
class WatchedValue:
    """A fact about a module that a graph holds.

    Attributes:
        module: Path of the module that has it.
        steps: Attributes and keys that lead to it from there.
        value: What it was.
        aspect: What of it: `"value"`, `"type"`, `"length"`, `"keys"`, `"key"` (whether it holds one), `"attribute"`
            (what an attribute of this name is where the class has it), `"has"` (whether there is such an attribute),
            `"submodule"` (which module of the tree it is, by path).
        key: Of `"key"`, `"attribute"` and `"has"`.
    """

    module: str
    steps: tuple[Any, ...]
    value: Any
    aspect: str = "value"
    key: Any = None

    @property
    def place(self) -> tuple[Any, ...]:
        """What is watched, whatever it was."""
        return self.module, self.steps, self.aspect, self.key

    @property
    def name(self) -> str:
        """The attribute of the module that it is about or within."""
        return str(self.steps[0] if self.steps else self.key)

    def __str__(self) -> str:
        name = (self.key,) if self.aspect in ("attribute", "has") else ()
        return ".".join(p for p in (self.module, *map(str, self.steps), *map(str, name)) if p)

    def now(self, module: nn.Module, kind: type | None = None) -> Any:
        """What it is now.

        Args:
            module: The module at `self.module`.
            kind: The class that its attributes are looked up in, where that is not its own.
        """
        return aspect_of(module, self.steps, self.aspect, self.key, kind)

    def holds(self, module: nn.Module, root: nn.Module, kind: type | None = None) -> bool:
        """Whether it is what it was.

        Args:
            module: The module at `self.module`.
            root: The tree that it belongs to.
            kind: As `now` takes it.
        """
        now = self.now(module, kind)
        if isinstance(now, Library):
            return True
        return (
            (now is not None and module_at(root, self.value) is now)
            if self.aspect == "submodule"
            else same(now, self.value)
        )


def watched_values(root: nn.Module, guards: Iterable[Guarded]) -> tuple[WatchedValue, ...]:
    """What a trace took for granted of a module tree.

    Args:
        root: The traced tree.
        guards: As they were recorded.

    Returns:
        One entry for each fact about a module that another trace might see otherwise. Modes are left out (`flags_in`),
        and so is what the graph asks its module for at every call: parameters, buffers, tensor attributes.
    """
    found: dict[tuple[Any, ...], WatchedValue] = {}
    paths = {id(m): p for p, m in root.named_modules()}
    for guard in guards:
        for module, steps, alias in places_of(root, guard.source, paths):
            if not module and steps[:1] == ("forward",):  # set on the root itself: a converted one has it no longer
                continue
            if alias is not None:
                entry = WatchedValue(module, steps, alias, "submodule")
                found[entry.place] = entry
                continue
            aspect = _aspect(guard, module, steps)
            if aspect is not None:
                value = aspect_of(root.get_submodule(module), steps, aspect, guard.key, None)
                entry = WatchedValue(module, steps, value, aspect, guard.key)
                if value is not UNKNOWN:
                    found[entry.place] = entry
    return tuple(found.values())


def numpy_source(source: str) -> str:
    """The source of a numpy value of a module that Dynamo makes a tensor of; empty for another source."""
    match = _NUMPY.match(source)
    return f"module{match.group(1)}" if match else ""


def is_numpy_argument(source: str) -> bool:
    """Whether a source is a numpy value among the arguments of a call."""
    return bool(_NUMPY_ARGUMENT.match(source))


def flags_in(root: nn.Module, guards: Iterable[Guarded]) -> tuple[tuple[str, bool], ...]:
    """The `training` flags of submodules that a trace read, by the path of the submodule."""
    paths = {id(m): p for p, m in root.named_modules()}
    found: dict[str, bool] = {}
    for guard in guards:
        for module, steps, alias in places_of(root, guard.source, paths):
            if alias is None and steps == ("training",) and module and guard.value is not None:
                found[module] = guard.value
    return tuple(found.items())


def _aspect(guard: Guarded, module: str, steps: Sequence[Any]) -> str | None:
    """What of a place a guard compares; None where nothing has to be watched."""
    if guard.kind == "NOT_PRESENT_IN_GENERIC_DICT" and isinstance(guard.key, str):
        own = guard.key in TREE or (not module and not steps and guard.key in ("forward", "__call__"))
        return None if own else "attribute"
    if guard.kind == "HASATTR" and isinstance(guard.key, str):
        return "has"
    if not steps or steps[0] in TREE or _is_hooks(steps[0]) or steps[-1] == "__class__":
        return None
    if guard.kind == "TENSOR_MATCH" and len(steps) == 1:  # a tensor of a module's own is an input of the graph
        return None
    return None if guard.kind in _CONTENTS and guard.key is None else _ASPECTS.get(guard.kind)


def _is_hooks(step: Any) -> bool:
    return str(step).endswith(("hooks", "hooks_with_kwargs"))


def aspect_of(module: nn.Module, steps: Sequence[Any], aspect: str, key: Any, kind: type | None) -> Any:
    """One aspect of what is at a place; UNKNOWN where there is nothing."""
    try:
        value = walked(module, steps)
        if isinstance(value, Library):
            return value
        if aspect == "value":
            return held(value)
        if aspect == "submodule":
            return value
        if aspect in ("attribute", "has"):
            return _attribute(value, key, kind if not steps and kind is not None else type(value), aspect)
        if aspect == "type":
            return held(type(value))
        if aspect == "length":
            return len(value)
        return key in value if aspect == "key" else held(tuple(value))
    except (AttributeError, KeyError, IndexError, TypeError, AttnResError):
        return UNKNOWN


def _attribute(owner: Any, name: str, kind: type, aspect: str) -> Any:
    """What an attribute is, its own or its class's, without running a property."""
    own: Mapping[str, Any] = getattr(owner, "__dict__", {})
    if name in own:
        return True if aspect == "has" else held(own[name])
    found = getattr(kind, name, UNKNOWN)
    if aspect == "attribute":
        return held(found)
    stores = [own.get(s) or () for s in ("_parameters", "_buffers", "_modules")]
    return found is not UNKNOWN or any(name in store for store in stores)
