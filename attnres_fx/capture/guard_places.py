"""Where in a module tree a guard of Dynamo's looks: its source as a module's path, and the steps from there."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

#: Attributes of a module that its graph asks for at every call, or that are compared by themselves.
TREE = ("_modules", "_parameters", "_buffers", "training")

_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[['\"]([^'\"\]]+)['\"]\]|\[(\d+)\]")


@dataclass(frozen=True)
class Guarded:
    """Something that Dynamo took for granted.

    Attributes:
        source: Where it is, as Dynamo writes it; the traced module is `module`.
        kind: Of the guard.
        key: The attribute or key that the guard is about, where it is about one.
        value: What a flag was before the call.
    """

    source: str
    kind: str
    key: Any = None
    value: bool | None = None


def guarded(entry: Any) -> Guarded:
    """An entry that Dynamo hands to `guard_filter_fn`."""
    create = getattr(getattr(entry, "orig_guard", None), "create_fn", None)
    named: Mapping[str, Any] = getattr(create, "keywords", None) or {}
    key = named.get("attr", named.get("key"))
    plain = key is None or isinstance(key, str | int | float | bool)
    flag = entry.value if entry.has_value and isinstance(entry.value, bool) else None
    return Guarded(str(entry.name), str(entry.guard_type), key if plain else None, flag)


def places_of(
    root: nn.Module, source: str, paths: Mapping[int, str]
) -> Iterator[tuple[str, tuple[Any, ...], str | None]]:
    """The places in a tree that a source leads through.

    Args:
        root: The tree.
        source: As Dynamo writes it.
        paths: Of the tree's modules, by their ids.

    Yields:
        The path of a module, and the steps from it. With the path of another module where the steps lead to that one,
        through a list or an attribute that is no child; what comes after counts from there. Last the place itself,
        with None. Nothing for a source that is not of the tree, or more than attributes and keys.
    """
    steps = steps_of(source.removeprefix("module")) if source == "module" or _of_module(source) else None
    if steps is None:
        return
    module, start, value = "", 0, root
    for at, step in enumerate(steps):
        try:
            value = value[step] if isinstance(value, dict | list | tuple) else getattr(value, step)
        except (AttributeError, KeyError, IndexError, TypeError):
            break
        path = paths.get(id(value)) if isinstance(value, nn.Module) else None
        if path is not None:
            if steps[start] != "_modules" and _own_child(root, module, steps[start : at + 1]) is not value:
                yield module, tuple(steps[start : at + 1]), path
            module, start = path, at + 1
    yield module, tuple(steps[start:]), None


def _of_module(source: str) -> bool:
    return source.startswith(("module.", "module["))


def _own_child(root: nn.Module, path: str, steps: list[Any]) -> nn.Module | None:
    return root.get_submodule(path)._modules.get(str(steps[0])) if len(steps) == 1 else None


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
    return [s for s in steps if s != "__dict__"]
