"""A clone of a model's module tree that shares its tensors: what is traced, run and returned in the model's place."""

import types
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch.fx import GraphModule
from torch.nn.utils import parametrize

from attnres_fx.capture.followed import Followed

_STORES = ("_parameters", "_buffers", "_modules")


def clone_tree(model: nn.Module) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Clone every module of a tree once: same classes, same parameter and buffer objects, attributes of its own.

    Attributes that name a module of the tree (in lists, tuples, dicts, bound methods, partial functions, what a
    function closes over, objects that are called or that hold the module themselves) name its clone. Other objects
    that an attribute holds are the original's. What `torch.compile` made runs uncompiled: it is compiled code of the
    original.

    Args:
        model: The root; it is left as it is.

    Returns:
        The root's clone, and the clone of each module by the id of its original.
    """
    clones: dict[int, nn.Module] = {}
    root = _clone(model, clones)
    follow = Followed(clones)
    for clone in clones.values():
        attributes = clone.__dict__
        for name, value in list(attributes.items()):
            if name not in _STORES:
                attributes[name] = follow(value)
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
