"""The Python objects that a model's code can write to and that are not its modules, found without running it."""

import contextlib
import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from attnres_fx.capture.outside_state import OutsideState, WrittenObject

_DEEPEST = 8
_MOST = 20_000
_LARGEST = 1_000  # entries; what is larger is data or a registry
_LIBRARIES = {
    "torch",
    "builtins",
    "numpy",
    "sympy",
    "collections",
    "functools",
    "typing",
    "abc",
    "logging",
    "os",
    "sys",
}


@contextlib.contextmanager
def left_as_it_was(model: nn.Module, *others: Any) -> Iterator[OutsideState]:
    """What a model's code writes to outside its modules is put back after: lists, dicts, counters, objects.

    Args:
        model: A clone of the caller's, whose containers are its own.
        others: More that it may write to, as its arguments.
    """
    state = OutsideState(_Search().of(model, others)).beyond(model)
    try:
        yield state
    finally:
        state.restore_(keep_logs=True)


class _Search:
    def __init__(self) -> None:
        self.seen: dict[Any, Any] = {}
        self.found: list[WrittenObject] = []
        self.packages: set[str] = set()

    def of(self, model: nn.Module, others: Any) -> list[WrittenObject]:
        """What the model's own packages and its hooks can write to."""
        for module in model.modules():
            hooks = [
                f
                for n, fs in module.__dict__.items()
                if n.endswith("hooks") and isinstance(fs, dict)
                for f in fs.values()
            ]
            self.packages |= {_package(x) for x in (*type(module).__mro__, *hooks)}
        self.packages -= _LIBRARIES
        for path, module in model.named_modules():
            for name, value in module.__dict__.items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    self.visit(value, f"{path}.{name}".lstrip("."), 0)
            for kind in type(module).__mro__:
                if _package(kind) in self.packages:
                    self.visit_class(kind)
        for value in others:
            self.visit(value, "an argument", 0)
        return self.found

    def visit(self, value: Any, place: str, depth: int) -> None:
        if isinstance(value, Tensor | nn.Module | types.ModuleType | str | int | float | None) or depth > _DEEPEST:
            return
        if id(value) in self.seen or len(self.seen) > _MOST:
            return
        self.seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self.visit_function(value, depth)
        elif isinstance(value, types.MethodType):
            self.visit(value.__func__, place, depth + 1)
            self.visit(value.__self__, place, depth + 1)
        elif isinstance(value, functools.partial):
            for held in (value.func, *value.args, *value.keywords.values()):
                self.visit(held, place, depth + 1)
        elif isinstance(value, list | tuple | dict | set | deque):
            self.visit_container(value, place, depth)
        elif isinstance(value, type):
            if _package(value) in self.packages:
                self.visit_class(value)
        elif isinstance(getattr(value, "__dict__", None), dict) and _package(type(value)) not in _LIBRARIES:
            self.visit_container(vars(value), place, depth)

    def visit_container(self, value: Any, place: str, depth: int) -> None:
        if len(value) > _LARGEST:
            return
        if not isinstance(value, tuple):
            self.found.append(WrittenObject(value, (), place, ""))
        items = dict.items(value) if isinstance(value, dict) else enumerate(value)  # not what a subclass makes of it
        for key, held in list(items):
            self.visit(held, f"{place}.{key}", depth + 1)

    def visit_class(self, kind: type) -> None:
        if (id(kind), "class") in self.seen:
            return
        self.seen[(id(kind), "class")] = kind
        plain = [n for n, v in vars(kind).items() if isinstance(v, int | float) and not n.startswith("__")]
        if plain:
            self.found.append(WrittenObject(kind, tuple(plain), kind.__name__, ""))
        for name, held in list(vars(kind).items()):
            if not name.startswith("__") or name in ("__call__", "__setattr__"):
                self.visit(getattr(held, "__func__", held), f"{kind.__name__}.{name}", 1)

    def visit_function(self, function: types.FunctionType, depth: int) -> None:
        if _package(function) not in self.packages:
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # an empty cell
                held = cell.cell_contents
                if isinstance(held, int | float):
                    self.found.append(WrittenObject(cell, ("cell_contents",), name, ""))
                self.visit(held, name, depth + 1)
        for name in _names_in(function.__code__):
            if name in function.__globals__:
                self.visit_global(function, name, depth)

    def visit_global(self, function: types.FunctionType, name: str, depth: int) -> None:
        held = function.__globals__[name]
        if isinstance(held, int | float):
            self.found.append(WrittenObject(_Globals(function.__globals__), (name,), function.__module__, ""))
        self.visit(held, f"{function.__module__}.{name}", depth + 1)


class _Globals:
    """The names of a Python module as attributes."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.__dict__ = names


def _names_in(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", None)).split(".")[0]
