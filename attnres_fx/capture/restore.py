"""Operations that Dynamo records for compilers, as the functions that mean the same in eager.

Run as they were recorded, a checkpointed region draws other dropout in its recomputation than in its forward, and
custom backwards and hooks cannot be compiled once more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from attnres_fx.passes.graph.aliasing import mutated_arguments, storage_of
from attnres_fx.passes.graph.nodes import body_of, nodes_with_bodies
from attnres_fx.passes.graph.operations import op_name
from attnres_fx.passes.graph.result import PassResult

CHECKPOINT = "higher_order::tag_activation_checkpoint"
FUNCTION = "higher_order::autograd_function_apply"
HOOK = "higher_order::register_hook"

A_CHECKPOINT = "a checkpoint"


@dataclass(frozen=True)
class RestoredFunction:
    """What a restored custom function is made of.

    Attributes:
        forward: Its forward as a graph; returns the outputs, and what backward needs.
        backward: Its backward as a graph, of the gradients and of what forward kept.
        not_differentiable: The outputs without gradients.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    not_differentiable: tuple[int, ...]


def restore_autograd_pass(gm: GraphModule) -> PassResult:
    """Turn recorded checkpoints, custom functions and tensor hooks into such, in place.

    Args:
        gm: A graph of torch functions, from Dynamo.

    Returns:
        The names of the nodes that were changed, as notes.
    """
    changed = []
    for node in gm.graph.nodes:
        restored = _RESTORED.get(op_name(node))
        if restored is not None:
            restored(gm, node)
        closed = node.target is _CHECKPOINTED and _close_over_what_is_held(gm, node)
        if restored is not None or closed:
            changed.append(node.name)
    if changed:
        _drop_unused_bodies(gm)
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, bool(changed), (), tuple(changed))


def _drop_unused_bodies(gm: GraphModule) -> None:
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and not n.users]:
        gm.graph.erase_node(node)


def what_backward_holds(gm: GraphModule) -> tuple[str, ...]:
    """What of a graph's backward its forward does not show, in words."""
    words = {CHECKPOINT: A_CHECKPOINT, FUNCTION: "a custom autograd.Function", HOOK: "a tensor hook"}
    targets = {_CHECKPOINTED: words[CHECKPOINT], _HOOKED: words[HOOK]}
    found = []
    for node in gm.graph.nodes:
        word = words.get(op_name(node)) or targets.get(node.target)
        if word is None and hasattr(node.target, "attnres_restored_function"):
            word = words[FUNCTION]
        if word is not None and word not in found:
            found.append(word)
    return tuple(found)


def _restore_checkpoint(gm: GraphModule, node: Node) -> None:
    node.target = _CHECKPOINTED
    node.kwargs = {**node.kwargs, "use_reentrant": False}


def _close_over_what_is_held(gm: GraphModule, node: Node) -> bool:
    """Give a checkpoint by keyword what the model holds, and what the region writes to; whether there is any.

    The model's own code has closed over those. Among the arguments that a checkpoint saves they would have to be the
    same in backward, which the statistics of a batch norm, a counter or a cache in a buffer are not.
    """
    body = body_of(node.args[0], gm)
    if body is None or sum(body_of(n, gm) is body for n in gm.graph.nodes) > 1:
        return False
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    written = {storage_of(w)[-1] for n in nodes_with_bodies(body) for w in mutated_arguments(n)}
    pairs = list(zip(node.args[1:], inputs, strict=True))
    held = [(o, n) for o, n in pairs if isinstance(o, Node) and (o.op == "get_attr" or n in written)]
    for i, (_, inside) in enumerate(held):
        inside.target = f"{_HELD}{i}"
        inputs[-1].append(inside)
        inputs.append(inside)
    body.recompile()
    closed = {inside for _, inside in held}
    node.args = (node.args[0], *[o for o, n in pairs if n not in closed])
    node.kwargs = {**node.kwargs, **{str(n.target): o for o, n in held}}
    return bool(held)


def _restore_function(gm: GraphModule, node: Node) -> None:
    forward, backward = (getattr(gm, str(n.target)) for n in node.args[:2])  # type: ignore[union-attr]
    not_differentiable = node.kwargs.get("non_differentiable_idx", ())
    node.target = function_of(forward, backward, tuple(not_differentiable))  # type: ignore[arg-type]
    node.args, node.kwargs = node.args[2:], {}


def _restore_hook(gm: GraphModule, node: Node) -> None:
    node.target = _HOOKED


def function_of(
    forward_graph: Callable[..., Any], backward_graph: Callable[..., Any], not_differentiable: Sequence[int]
) -> Callable[..., Any]:
    """A function whose forward and backward are recorded graphs."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs, saved = forward_graph(*args)
            outputs = tuple(outputs)
            ctx.tensors = [i for i, s in enumerate(saved) if isinstance(s, Tensor)]
            ctx.save_for_backward(*[saved[i] for i in ctx.tensors])
            ctx.others = [None if isinstance(s, Tensor) else s for s in saved]
            ctx.mark_non_differentiable(*[outputs[i] for i in not_differentiable])
            return outputs

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> Any:
            saved = list(ctx.others)
            for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
                saved[i] = tensor
            return backward_graph(*grad_outputs, *saved)

    def recorded_function(*args: Any) -> Any:
        return Recorded.apply(*args)

    recorded_function.attnres_restored_function = RestoredFunction(  # type: ignore[attr-defined]
        forward_graph, backward_graph, tuple(not_differentiable)
    )
    return recorded_function


def hooked(tensor: Tensor, body: Callable[..., Any], *captured: Any) -> Tensor:
    """The tensor, with a hook on its gradient where it has one."""
    if tensor.requires_grad:
        tensor.register_hook(lambda grad: body(grad, *captured))
    return tensor


#: How the inputs of a region are named that a checkpoint does not save.
_HELD = "held_"
_CHECKPOINTED: Any = checkpoint
_HOOKED: Any = hooked
_RESTORED: dict[str, Callable[[GraphModule, Node], None]] = {
    CHECKPOINT: _restore_checkpoint,
    FUNCTION: _restore_function,
    HOOK: _restore_hook,
}
