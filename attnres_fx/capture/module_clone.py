"""A clone of a model's module tree that shares its tensors: what is traced, run and returned in the model's place."""

import functools
import types
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.nn.utils import parametrize

_STORES = ("_parameters", "_buffers", "_modules")
_DEEPEST = 4  # containers inside containers; deeper ones are shared with the original


def clone_tree(model: nn.Module) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Clone every module of a tree once: same classes, same parameter and buffer objects, attributes of its own.

    Attributes that name a module of the tree (in lists, tuples, dicts, bound methods, partial functions) name its
    clone. Other objects that an attribute holds are the original's.

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
                attributes[name] = _followed(value, clones, 0)
    return root, clones


def _clone(module: nn.Module, clones: dict[int, nn.Module]) -> nn.Module:
    if id(module) in clones:
        return clones[id(module)]
    clone: nn.Module = object.__new__(_class_for(module))  # a GraphModule's own __new__ makes a class without code
    clones[id(module)] = clone
    attributes = dict(module.__dict__)
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


def _followed(value: Any, clones: dict[int, nn.Module], depth: int) -> Any:
    """The value with the modules of the tree replaced by their clones, in containers of its own."""
    if isinstance(value, nn.Module):
        return clones.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in clones:
        return types.MethodType(value.__func__, clones[id(value.__self__)])
    if depth >= _DEEPEST:
        return value
    deeper = functools.partial(_followed, clones=clones, depth=depth + 1)
    kind = type(value)
    if kind is list or kind is tuple:
        return kind(map(deeper, value))
    if kind is set:
        return set(value)
    if kind is functools.partial:
        keywords = {k: deeper(v) for k, v in value.keywords.items()}
        return functools.partial(deeper(value.func), *map(deeper, value.args), **keywords)
    if isinstance(value, dict) and kind.__module__ in ("builtins", "collections"):
        copied = value.copy()
        for key, held in value.items():
            copied[key] = deeper(held)
        return copied
    return value
