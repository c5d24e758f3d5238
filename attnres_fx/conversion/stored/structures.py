"""The structure of arguments and results (a pytree) as JSON, and back.

A class that a file names is never imported: it is used if this process knows it as a structure already, and a plain one
of the same entries stands in its place if not.
"""

import collections
import sys
from typing import Any

from torch.utils import _pytree as pytree

from attnres_fx.capture.signature import child_specs
from attnres_fx.conversion.stored.arguments import ArgumentReader, to_data
from attnres_fx.errors import SaveError

_DEEPEST = 40
_BUILT_IN: dict[str, Any] = {
    "tuple": tuple,
    "list": list,
    "dict": dict,
    "ordered dict": collections.OrderedDict,
    "deque": collections.deque,
}
_NAMES = {kind: name for name, kind in _BUILT_IN.items()}
_FACTORIES: dict[str, Any] = {k.__name__: k for k in (list, dict, set, int, float, str, tuple)} | {"None": None}


def structure_to_data(spec: Any) -> Any:
    """The spec of a pytree as JSON; `"leaf"` for a leaf, None for None.

    Raises:
        SaveError: A class of it keeps more than plain data about itself.
    """
    if spec is None:
        return None
    if spec.is_leaf():
        return "leaf"
    children = [structure_to_data(c) for c in child_specs(spec)]
    if spec.type in _NAMES:
        return {_NAMES[spec.type]: children, "about": to_data(spec.context)}
    if spec.type is collections.defaultdict:
        factory, keys = spec.context
        name = getattr(factory, "__name__", str(factory))
        if _FACTORIES.get(name, spec) is not factory:
            raise SaveError(f"a defaultdict of {name}, which a file cannot hold: return a dict")
        return {"default dict": children, "about": [name, to_data(keys)]}
    kind = spec.context if spec.type is collections.namedtuple else spec.type  # type: ignore[comparison-overlap]
    named = {"class": f"{kind.__module__}:{kind.__qualname__}", "children": children}
    if spec.type is collections.namedtuple:  # type: ignore[comparison-overlap]
        return {**named, "fields": list(kind._fields)}
    try:
        return {**named, "about": to_data(spec.context)}
    except SaveError as error:
        raise SaveError(f"the structure {kind.__qualname__}: {error}") from error


class StructureReader:
    """Reads structures.

    Attributes:
        missing: The classes that this process does not know, as `module:name`.
    """

    def __init__(self, plain: ArgumentReader) -> None:
        self.plain = plain
        self.missing: list[str] = []

    def read(self, data: Any, depth: int = 0) -> Any:
        """The spec that `structure_to_data` was given, with plain structures for classes that are not known.

        Raises:
            SaveError: The data has another form.
        """
        if data is None:
            return None
        if data == "leaf":
            return pytree.tree_structure(0)
        if not isinstance(data, dict) or depth > _DEEPEST:
            raise SaveError(f"{data!r:.60} is no structure")
        return self._named(data, depth) if "class" in data else self._built_in(data, depth)

    def _children(self, children: Any, depth: int) -> list[Any]:
        if not isinstance(children, list) or any(c is None for c in children):
            raise SaveError("a structure has no list of entries")
        return [self.read(c, depth + 1) for c in children]

    def _built_in(self, data: dict[str, Any], depth: int) -> Any:
        if set(data) == {"default dict", "about"}:
            match data["about"]:
                case [str() as name, list() as keys] if name in _FACTORIES:
                    children = self._children(data["default dict"], depth)
                    about = [_FACTORIES[name], self._keys(keys, children)]
                    return pytree.TreeSpec(collections.defaultdict, about, children)
        name = next((n for n in data if n in _BUILT_IN), "")
        if set(data) != {name, "about"}:
            raise SaveError(f"{data!r:.60} is no structure")
        children, about = self._children(data[name], depth), self.plain.read(data["about"])
        if "dict" in name:
            about = self._keys(data["about"], children)
        elif "dict" not in name and name != "deque" and about is not None:
            raise SaveError(f"a {name} has {about!r:.40} beside its entries")
        return pytree.TreeSpec(_BUILT_IN[name], about, children)

    def _keys(self, data: Any, children: list[Any]) -> list[Any]:
        keys = self.plain.read(data)
        if not isinstance(keys, list) or len(set(keys)) != len(children):
            raise SaveError("a dict has not as many keys as entries")
        return keys

    def _named(self, data: dict[str, Any], depth: int) -> Any:
        named, children = data["class"], self._children(data.get("children"), depth)
        if not isinstance(named, str) or named.count(":") != 1 or len(set(data) & {"about", "fields"}) != 1:
            raise SaveError(f"{data!r:.60} is no structure")
        if "fields" in data:
            fields = data["fields"]
            kind = _imported_tuple(named, fields)
            if kind is not None and len(fields) == len(children):
                return pytree.TreeSpec(collections.namedtuple, kind, children)  # type: ignore[arg-type]
            self.missing.append(named)
            return pytree.TreeSpec(tuple, None, children)
        about = self.plain.read(data["about"])
        kind = _registered(named)
        if kind is not None:
            return pytree.TreeSpec(kind, about, children)
        self.missing.append(named)
        keys = _keys(about, len(children))
        return pytree.TreeSpec(tuple, None, children) if keys is None else pytree.TreeSpec(dict, keys, children)


def _keys(about: Any, count: int) -> list[Any] | None:
    """The names of a structure's entries, from what it keeps of itself."""
    candidates = [about, *(about if isinstance(about, list | tuple) else ())]
    for keys in candidates:
        if isinstance(keys, list | tuple) and len(keys) == count and all(isinstance(k, str) for k in keys):
            return list(keys)
    return None


def _registered(named: str) -> Any:
    """A class that torch knows as a structure, by module and name; nothing is imported or looked up for it."""
    module, name = named.split(":")
    kinds = [k for k in pytree.SUPPORTED_NODES if isinstance(k, type)]
    found = [k for k in kinds if k.__module__ == module and k.__qualname__ == name]
    return found[-1] if found and module in sys.modules else None


def _imported_tuple(named: str, fields: Any) -> Any:
    """A named tuple that is imported already, read from its module's own names."""
    module, name = named.split(":")
    value: Any = sys.modules.get(module)
    for part in name.split("."):
        value = vars(value).get(part) if hasattr(value, "__dict__") else None
    is_tuple = isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields")
    return value if is_tuple and list(value._fields) == fields else None
