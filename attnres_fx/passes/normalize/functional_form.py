"""In-place operations and what computes the same value without the write."""

import operator
from functools import cache
from typing import Any

import torch
from torch.fx import Node

from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import computed_value, fake_like, same_shape, shapes_agree, tensor_of
from attnres_fx.passes.graph.operation_table import BY_OPERATOR, Trait
from attnres_fx.passes.graph.operations import asked_in_place, has_trait, op_name

#: Views that show the whole storage in its order.
_KEEPS_ORDER = Trait.RESHAPE | Trait.IDENTITY | Trait.CAST


def functional_form(node: Node) -> Any:
    """The function or the method that computes what a node writes.

    A namesake will not do: `bernoulli_()` has a probability by default and `bernoulli()` takes the tensor's values for
    it, and those that aten generates (`zero`, `copy`) have no backward.

    Args:
        node: A call that writes into its first argument.

    Returns:
        The target of the call without the write; None where there is none that means the same.
    """
    if node.op == "call_module" or node.target is operator.setitem or node.kwargs.get("out") is not None:
        return None
    if asked_in_place(node):
        return node.target
    if node.op == "call_method":
        plain = str(node.target).removesuffix("_")
        return plain if hasattr(torch.Tensor, plain) and _means_the_same(str(node.target)) else None
    if (known := BY_OPERATOR.get(node.target)) is not None and known.functional is not None:  # type: ignore[arg-type]
        return known.functional
    if isinstance(node.target, torch._ops.OpOverload):
        return _functional_overload(node.target)
    name = getattr(node.target, "__name__", "")
    return getattr(torch, name.removesuffix("_"), None) if _means_the_same(name) else None


def copied_value(node: Node) -> Node | None:
    """What a node copies over the whole of a tensor: `x.copy_(value)`, `x[:] = value`, `x[..., 0:] = value`.

    Args:
        node: A call that writes into its first argument.

    Returns:
        The value, which may have another dtype and fewer dimensions; None where a node does something else.
    """
    if op_name(node) == "copy_":
        value = node.args[1] if len(node.args) > 1 else node.kwargs.get("src", node.kwargs.get("other"))
    elif node.target is operator.setitem and _takes_all(node):
        value = node.args[2]
    else:
        return None
    target = tensor_of(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
    held = tensor_of(value) if isinstance(value, Node) else None
    if target is None or held is None or held.device != target.device or held.dim() > target.dim():
        return None
    return value  # type: ignore[return-value]


def in_dtype_of(value: Node, target: Node) -> Node:
    """A value in the dtype of what it is written to: a write keeps that, and its functional form may promote."""
    kept, made = tensor_of(target), tensor_of(value)
    assert kept is not None and made is not None
    if made.dtype == kept.dtype:
        return value
    return emit(value.graph, "to", (value, kept.dtype), like=value, value=fake_like(made, kept.dtype))


def shows_all(view: Node, whole: Node) -> bool:
    """Whether a view has every element of what it is a view of, in its order, and passes its gradient on."""
    seen, held = tensor_of(view), tensor_of(whole)
    if seen is None or held is None or seen.dtype != held.dtype:
        return False
    if has_trait(view, _KEEPS_ORDER) or op_name(view) == "dropout":
        return True
    return has_trait(view, Trait.SAME_AT_SAME_SHAPE) and same_shape(view, whole)


def _takes_all(node: Node) -> bool:
    """Whether the index of an assignment takes every element in its order."""
    written, index = node.args[:2]
    parts = index if isinstance(index, tuple) else (index,)
    if not isinstance(written, Node) or not all(p is Ellipsis or _may_take_all(p) for p in parts):
        return False
    whole, picked = tensor_of(written), computed_value("call_function", operator.getitem, (written, index), {})
    known = whole is not None and isinstance(picked, torch.Tensor)
    return known and shapes_agree(tuple(whole.shape), tuple(picked.shape))  # type: ignore[union-attr]


def _may_take_all(part: Any) -> bool:
    return isinstance(part, slice) and part.step in (None, 1)


@cache
def _means_the_same(name: str) -> bool:
    """Whether each form of an in-place operation has one without the write, with the same arguments and defaults."""
    if name == "detach_":
        return True
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    of_tensors = [o for o in overloads if o._schema.is_mutable and str(o._schema.arguments[0].type) == "Tensor"]
    return bool(of_tensors) and all(_functional_overload(o) is not None for o in of_tensors)


@cache
def _functional_overload(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    packet = getattr(torch.ops.aten, target._schema.name.split("::")[1].removesuffix("_"), None)
    for name in packet.overloads() if packet is not None else ():
        found = getattr(packet, name)
        if found._schema.is_mutable or torch.Tag.generated in found.tags:
            continue
        if _arguments(found) == _arguments(target):
            return found  # type: ignore[no-any-return]
    return None


def _arguments(overload: torch._ops.OpOverload) -> list[tuple[str, str, Any]]:
    """Name, type and default of each argument; the first, which is the tensor, has several names."""
    return [
        (a.name if i else "", str(a.type), a.default_value if a.has_default_value() else "given")
        for i, a in enumerate(overload._schema.arguments)
    ]
