"""What a node does: every analysis asks here, whichever dialect the graph is written in."""

import inspect
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnres_fx.passes.graph.nodes import argument_of, tensor_of
from attnres_fx.passes.graph.operation_table import (
    ALIASES,
    BY_MODULE,
    BY_NAME,
    BY_OPERATOR,
    VIEW_ATTRIBUTES,
    Operation,
    Trait,
)

_MOVES = Trait.CAST | Trait.IDENTITY | Trait.STOPS_GRADIENT | Trait.RESHAPE | Trait.TOKEN_MOVE
_TURNS = ("permute", "transpose", "movedim", "t", "T", "mT")
_LIGHT = _MOVES | Trait.LIGHT | Trait.METADATA


def op_name(node: Node) -> str:
    """Canonical name of what a node calls, the same in every dialect.

    Args:
        node: Any node of a graph.

    Returns:
        Aten's name where there is one (`"add"`, `"add_"` in place); `"library::name"` for operators of others,
        `"module"` for a module the table does not know, `""` for placeholders, attributes and the output.
    """
    if node.op == "call_method":
        return ALIASES.get(str(node.target), str(node.target))
    if node.op == "call_module":
        return _module_name(node)
    if node.op != "call_function":
        return ""
    return _function_name(node.target)


def _module_name(node: Node) -> str:
    module = called_module(node)
    if module is None:
        return "module"
    known = BY_MODULE.get(type(module))
    if known is not None:
        return known.name
    if type(module).__module__ == "torch.nn.modules.activation" and not list(module.parameters()):
        return "softmax" if "Softmax" in type(module).__name__ else "relu"
    return "module"


def called_module(node: Node) -> torch.nn.Module | None:
    """The module that a `call_module` node calls; None where its graph has no module there."""
    root = node.graph.owning_module
    module: torch.nn.Module | None = root if isinstance(root, GraphModule) else None
    for part in str(node.target).split("."):  # get_submodule looks at attributes first: asked of every node, that tells
        module = module._modules.get(part) if module is not None else None
    return module


def hooked(module: torch.nn.Module) -> bool:
    """Whether calling a module does more than its class's forward: hooks of its own or of all, a forward of its own."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    every = [getattr(torch.nn.modules.module, f"_global{n}", None) for n in names]
    return "forward" in vars(module) or any(every) or any(getattr(module, name) for name in names)


@cache
def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        namespace, _, name = str(target._schema.name if hasattr(target, "_schema") else target).partition("::")
        if namespace not in ("aten", "prims"):
            return f"{namespace}::{name}"
        return ALIASES.get(name, name)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{target._name}"
    if target in BY_OPERATOR:
        return BY_OPERATOR[target].name
    name = getattr(target, "__name__", str(target))
    return ALIASES.get(name, name)


def operation_of(node: Node) -> Operation | None:
    """What the table says of a node's operation; None where it is not in the table."""
    return BY_NAME.get(op_name(node))


def has_trait(node: Node, traits: Trait) -> bool:
    """Whether a node's operation has one of some traits."""
    operation = BY_NAME.get(op_name(node))
    # Their numbers: a flag made of two flags is a new object, and every pass asks this of every node.
    return operation is not None and operation.traits._value_ & traits._value_ != 0


@cache
def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or "::" in name:
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def is_light(node: Node) -> bool:
    """Whether a node is no more than elementwise: pointwise arithmetic, or rows moved about.

    Contractions, reductions, convolutions, gathers, scatters and everything unknown are not.
    """
    name = op_name(node)
    if name == "getitem":
        return not indexes_by_tensor(node.args[1])
    return has_trait(node, _LIGHT) or _is_pointwise(name.removesuffix("_"))


def may_be_in_norm(node: Node) -> bool:
    """Whether a node could be part of a written-out normalisation."""
    return is_norm_step(node) or is_light(node)


def is_norm_step(node: Node) -> bool:
    """Whether a node is what makes a normalisation one: a norm, or a reduction."""
    return has_trait(node, Trait.NORM | Trait.REDUCTION)


def asks_only_metadata(node: Node, of: Node | None = None) -> bool:
    """Whether a node looks at shape, dtype or device (of one argument, or of all) and at no value."""
    name = op_name(node)
    if views_by_attribute(node):
        return False
    if has_trait(node, Trait.METADATA):
        return True
    if name.endswith("_like") or name.startswith("new_"):
        return True
    return of is not None and has_trait(node, Trait.SHAPED_AS) and node.args[0] is not of


def views_by_attribute(node: Node) -> bool:
    """Whether a node is a view that is written as an attribute: `x.T`, `x.data`."""
    return op_name(node) == "getattr" and len(node.args) > 1 and node.args[1] in VIEW_ATTRIBUTES


def turned_by(node: Node) -> str:
    """What exchanges the dimensions of a tensor, a function or an attribute; empty where nothing does."""
    name = str(node.args[1]) if views_by_attribute(node) else op_name(node)
    return name if name in _TURNS else ""


def stops_gradient(node: Node) -> bool:
    """Whether a node passes a tensor on without its gradient."""
    return has_trait(node, Trait.STOPS_GRADIENT) or (views_by_attribute(node) and node.args[1] == "data")


def is_dropout(node: Node) -> bool:
    """Whether a node is a dropout, active or not."""
    return has_trait(node, Trait.DROPOUT)


def is_aten(node: Node) -> bool:
    """Whether a node calls an aten overload, or one of another library."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def moves_data(node: Node) -> bool:
    """Whether a node only casts, passes on, reshapes or moves the rows of one tensor."""
    return has_trait(node, _MOVES) or views_by_attribute(node)


def switches_mode(node: Node) -> bool:
    """Whether a node switches autocast or gradients for the calls that follow."""
    return has_trait(node, Trait.SWITCHES_MODE)


def is_random(node: Node) -> bool:
    """Whether a node draws random numbers."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return True
    name = op_name(node)
    # Operators of other libraries often lack the tag.
    return has_trait(node, Trait.RANDOM) or ("::" in name and "dropout" in name)


def has_side_effects(node: Node) -> bool:
    """Whether a node writes to a tensor that others hold, or switches a mode: nothing is moved across it."""
    return writes_in_place(node) or (node.op == "call_function" and switches_mode(node))


def writes_in_place(node: Node) -> bool:
    """Whether a node writes to a tensor that others hold."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    if is_aten(node):
        return bool(node.target._schema.is_mutable)  # type: ignore[union-attr]
    name = op_name(node)
    if name == "setitem" or name.endswith("_"):
        return True
    return node.kwargs.get("out") is not None or asked_in_place(node)


def asked_in_place(node: Node) -> bool:
    """Whether a function is called with `inplace=True`, by name or by position."""
    if node.op != "call_function":
        return False
    position = _inplace_position(node.target)
    given = node.args[position] if position is not None and position < len(node.args) else None
    return node.kwargs.get("inplace", given) is True


def not_in_place(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call without its `inplace=True`."""
    position = _inplace_position(node.target)
    if position is not None and position < len(args):
        args = (*args[:position], False, *args[position + 1 :])
    return args, {**kwargs, "inplace": False} if kwargs.get("inplace") is True else kwargs


@cache
def _inplace_position(target: Any) -> int | None:
    """Where a function of `torch.nn.functional` takes whether to write in place."""
    if getattr(target, "__module__", "") != "torch.nn.functional":
        return None
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a builtin
        return None
    return names.index("inplace") if "inplace" in names else None


def indexes_by_tensor(index: Any) -> bool:
    """Whether an index picks by a tensor or a list, and so makes a copy and no view."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, list | torch.Tensor) or (isinstance(p, Node) and tensor_of(p) is not None) for p in parts)


def indexed_dimensions(part: Any) -> int:
    """How many dimensions a part of an index takes: none of `None`, those of a mask, else one; 0 of an ellipsis."""
    if part is None or part is Ellipsis:
        return 0
    value = tensor_of(part) if isinstance(part, Node) else None
    return value.dim() if value is not None and value.dtype in (torch.bool, torch.uint8) else 1


def picks_rows(node: Node) -> bool:
    """Whether a node takes parts of a tensor by index tensors: `x[chosen]`."""
    return has_trait(node, Trait.PICKS) or (op_name(node) == "getitem" and indexes_by_tensor(node.args[1]))


def dropout_probability(node: Node) -> float:
    """p of a dropout node, whether it is active or not; 1 where it cannot be read."""
    if node.op == "call_module":
        return float(getattr(called_module(node), "p", 1.0))
    p = argument_of(node, 1, "p")
    return float(p) if isinstance(p, int | float) else 0.5 if p is None else 1.0


def trains(node: Node) -> bool | None:
    """True or False where a node bakes train or eval behaviour in; None where it says nothing."""
    name = op_name(node)
    if node.op == "call_module":
        return None
    if is_dropout(node):
        value = argument_of(node, 2, "train" if is_aten(node) else "training")
        return bool(value) if value is not None else True
    if name == "batch_norm":
        value = argument_of(node, 5, "training")
        return bool(value) if value is not None else False
    if name == "sdpa" and (argument_of(node, 4, "dropout_p") or 0):
        return True
    return None
