"""A clone of a model's module tree that shares its tensors: what is traced, run and returned in the model's place."""

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch.fx import GraphModule
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils import parametrize

from attnres_fx.capture.held_values import Library

_STORES = ("_parameters", "_buffers", "_modules")
_PARTIALS = (functools.partial, Library)
_DEEPEST = 6  # containers inside containers; deeper ones are shared with the original


def clone_tree(model: nn.Module) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Clone every module of a tree once: same classes, same parameter and buffer objects, attributes of its own.

    Attributes that name a module of the tree (in lists, tuples, dicts, bound methods, partial functions, what a
    function closes over, objects that are called) name its clone. Other objects that an attribute holds are the
    original's. What `torch.compile` made runs uncompiled: it is compiled code of the original.

    Args:
        model: The root; it is left as it is.

    Returns:
        The root's clone, and the clone of each module by the id of its original.
    """
    clones: dict[int, nn.Module] = {}
    root = _clone(model, clones)
    for clone in clones.values():
        attributes = clone.__dict__
        for name, value in list(attributes.items()):
            if name not in _STORES:
                attributes[name] = followed(value, clones)
        if isinstance(clone, OptimizedModule):
            attributes["forward"] = types.MethodType(nn.Module.__call__, clone._modules["_orig_mod"])
    return root, clones


def uncompiled(model: Any) -> Any:
    """The module itself, of what `torch.compile(module)` returned for it; anything else as it is."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def _clone(module: nn.Module, clones: dict[int, nn.Module]) -> nn.Module:
    if id(module) in clones:
        return clones[id(module)]
    clone: nn.Module = object.__new__(_class_for(module))  # a GraphModule's own __new__ makes a class without code
    clones[id(module)] = clone
    attributes = {n: v for n, v in module.__dict__.items() if n != "_compiled_call_impl"}
    attributes["_parameters"] = type(module._parameters)(module._parameters)
    attributes["_buffers"] = type(module._buffers)(module._buffers)
    attributes["_modules"] = type(module._modules)()
    clone.__dict__.update(attributes)
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else _clone(child, clones)
    return clone


def _class_for(module: nn.Module) -> type[nn.Module]:
    """The class of a module's clone: a copy of it where PyTorch made it for this one module and edits it in place."""
    kind = type(module)
    if isinstance(module, GraphModule):  # `recompile` sets its forward, and keeps the way there where it has one
        held = {name: vars(kind)[name] for name in ("__module__", "_wrapped_call") if name in vars(kind)}
        return type(kind.__name__, (kind,), held)
    if parametrize.is_parametrized(module) and kind.__name__ == f"Parametrized{kind.__bases__[0].__name__}":
        return type(kind.__name__, kind.__bases__, dict(kind.__dict__))  # its properties are the parametrized tensors
    return kind


def followed(value: Any, clones: dict[int, nn.Module]) -> Any:
    """A value with the modules of a tree replaced by their clones, in containers and functions of its own.

    Args:
        value: What an attribute holds.
        clones: By the id of each module of the tree, its clone.
    """
    return _followed(value, clones, 0)


def _followed(value: Any, clones: dict[int, nn.Module], depth: int) -> Any:
    if isinstance(value, nn.Module):
        return clones.get(id(value), value)
    if depth >= _DEEPEST:
        return value
    deeper = functools.partial(_followed, clones=clones, depth=depth + 1)
    kind = type(value)
    if kind is list or kind is tuple:
        return kind(map(deeper, value))
    if kind is set:
        return set(value)
    if _is_dict(value):
        copied = value.copy()
        for key, held in value.items():
            copied[key] = deeper(held)
        return copied
    if not _names_module(value, clones, depth):
        return value
    return _followed_callable(value, lambda v: deeper(v) if _names_module(v, clones, depth + 1) else v)


def _followed_callable(value: Any, follow: Callable[[Any], Any]) -> Any:
    """The callable on the clones of what it is bound to, closes over or holds; it shares everything else."""
    kind = type(value)
    if kind is types.MethodType:
        return types.MethodType(value.__func__, _followed_object(value.__self__, follow))
    if kind is types.FunctionType:
        cells = tuple(types.CellType(follow(c.cell_contents)) if _filled(c) else c for c in value.__closure__ or ())
        made: Any = types.FunctionType(value.__code__, _globals(value, follow), value.__name__, None, cells or None)
        made.__defaults__, made.__kwdefaults__ = follow(value.__defaults__), follow(value.__kwdefaults__)
        made.__dict__.update({n: follow(v) for n, v in value.__dict__.items()})
        return made
    if kind in _PARTIALS:
        keywords = {k: follow(v) for k, v in value.keywords.items()}
        made = kind(follow(value.func), *map(follow, value.args), **keywords)
        made.__dict__.update({n: follow(v) for n, v in value.__dict__.items()})
        return made
    if kind is _WrappedHook:
        return _WrappedHook(follow(value.hook), follow(value.module()) if value.with_module else None)  # type: ignore[no-untyped-call]
    return _followed_object(value, follow)


def _followed_object(value: Any, follow: Callable[[Any], Any]) -> Any:
    if not _is_plain_object(value):
        return follow(value)
    made = object.__new__(type(value))
    made.__dict__.update({n: follow(v) for n, v in value.__dict__.items()})
    return made


def _names_module(value: Any, clones: dict[int, nn.Module], depth: int) -> bool:
    """Whether a value leads to a module of the tree."""
    if isinstance(value, nn.Module):
        return id(value) in clones
    return depth < _DEEPEST and any(_names_module(v, clones, depth + 1) for v in _parts(value))


def _parts(value: Any) -> Iterable[Any]:
    """What a container or a callable holds."""
    kind = type(value)
    if kind in (list, tuple):
        return tuple(value)
    if _is_dict(value):
        return tuple(value.values())
    if kind is types.MethodType:
        owner = value.__self__
        return tuple(owner.__dict__.values()) if _is_plain_object(owner) else (owner,)
    if kind is types.FunctionType:
        cells = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
        used = _bound_globals(value).values()
        return (*cells, *used, value.__defaults__, value.__kwdefaults__, *value.__dict__.values())
    if kind in _PARTIALS:
        return (value.func, *value.args, *value.keywords.values(), *value.__dict__.values())
    if kind is _WrappedHook:
        return (value.hook, value.module() if value.with_module else None)
    return tuple(value.__dict__.values()) if callable(value) and _is_plain_object(value) else ()


def _bound_globals(function: types.FunctionType) -> dict[str, Any]:
    """The global variables of a function that hold a module, or what is bound to one."""
    named = function.__code__.co_names
    held = {n: function.__globals__[n] for n in named if n in function.__globals__}
    return {n: v for n, v in held.items() if isinstance(v, nn.Module | types.MethodType | functools.partial)}


def _globals(function: types.FunctionType, follow: Callable[[Any], Any]) -> dict[str, Any]:
    changed = {n: new for n, v in _bound_globals(function).items() if (new := follow(v)) is not v}
    return {**function.__globals__, **changed} if changed else function.__globals__


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and type(value).__module__ in ("builtins", "collections")


def _is_plain_object(value: Any) -> bool:
    """Whether all that an object is stands in its attributes."""
    kind: Any = type(value)
    made_plainly = kind.__new__ is object.__new__ and kind.__reduce_ex__ is object.__reduce_ex__
    return made_plainly and not isinstance(value, nn.Module) and hasattr(value, "__dict__")


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
