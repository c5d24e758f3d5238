"""The backward of one stage on one microbatch: whole, or in the two parts of a zero bubble schedule.

Autograd itself runs through `run_backward`, which is `backward_maybe_with_nosync` of PyTorch's stage: it knows how
data parallelism delays its reductions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: (kind: "full", "input" or "weight"; its arguments; last_backward=) -> (input gradients, parameter groups)
RunBackward = Callable[..., tuple[Any, Any]]


class DetachedOutput(torch.autograd.Function):
    """An output as a tensor of its own: no view, and no alias of another output or of an input.

    Zero bubble detaches outputs in place once their inputs' gradients are known, which views do not allow.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        """The output, without its history as a view."""
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        """The gradient as it is."""
        return grad_outputs[0]


@dataclass
class ForwardState:
    """Tensors of one microbatch between the forward and the backward of a stage, by the names of their values.

    Attributes:
        inputs: Leaves of the stage's autograd graph that need gradients.
        outputs: Its roots.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclass
class DeferredWeights:
    """What the weight gradients of a microbatch still need after the backward of its inputs.

    Attributes:
        param_groups: As PyTorch's `stage_backward_input` returns them.
        outputs: Roots that no input leads to; their whole backward is still to come.
        grad_outputs: Their gradients.
    """

    param_groups: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    grad_outputs: list[Tensor] = field(default_factory=list)


def full_backward(
    outputs: list[Tensor],
    grad_outputs: list[Tensor],
    inputs: list[Tensor],
    *,
    run_backward: RunBackward,
    last_backward: bool = False,
) -> Sequence[Tensor | None]:
    """Accumulates the parameters' gradients and returns those of the inputs."""
    if not outputs:
        return [None] * len(inputs)
    grad_inputs, _ = run_backward(
        "full",
        {"stage_output": outputs, "output_grads": grad_outputs, "input_values": inputs},
        last_backward=last_backward,
    )
    gradients: Sequence[Tensor | None] = grad_inputs
    return gradients


def input_backward(
    outputs: list[Tensor], grad_outputs: list[Tensor], inputs: list[Tensor], *, run_backward: RunBackward
) -> tuple[Sequence[Tensor | None], DeferredWeights]:
    """Gradients of the inputs alone, and what `weight_backward` needs later.

    PyTorch finds the parameters that are left for later by walking up from the inputs. It so misses those that only
    reach outputs that no input reaches, an embedding in the middle of the pipeline: such outputs wait entire. Nor
    can it tell apart two uses of one parameter (layers that share their weights): then nothing is left for later.
    """
    if _uses_a_parameter_twice(outputs, inputs):
        return full_backward(outputs, grad_outputs, inputs, run_backward=run_backward), DeferredWeights()
    now, later = [], DeferredWeights()
    for output, grad_output in zip(outputs, grad_outputs, strict=True):
        if _reaches(output, inputs):
            now.append((output, grad_output))
        else:
            later.outputs.append(output)
            later.grad_outputs.append(grad_output)
    if not now:
        return [None] * len(inputs), later
    grad_inputs, param_groups = run_backward(
        "input",
        {"stage_output": [o for o, _ in now], "output_grads": [g for _, g in now], "input_values": inputs},
    )
    for tensor in inputs:
        tensor.grad = None
    later.param_groups = param_groups or []
    return grad_inputs, later


def weight_backward(deferred: DeferredWeights, *, run_backward: RunBackward, last_backward: bool) -> None:
    """Accumulates the gradients of the parameters that `input_backward` left for later."""
    if deferred.param_groups and deferred.outputs:
        # Both may pass through the same node, an embedding that two outputs use.
        torch.autograd.backward(deferred.outputs, deferred.grad_outputs, retain_graph=True)
    elif deferred.outputs:
        full_backward(
            deferred.outputs, deferred.grad_outputs, [], run_backward=run_backward, last_backward=last_backward
        )
    if deferred.param_groups:
        run_backward("weight", {"param_groups": deferred.param_groups}, last_backward=last_backward)


def _reaches(output: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether the graph of `output` leads to one of the inputs."""
    targets = {id(tensor) for tensor in inputs}
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in targets:
            return True
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return False


def _uses_a_parameter_twice(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether two operations of a graph take one and the same parameter."""
    input_ids = {id(tensor) for tensor in inputs}
    nodes, seen, used = [output.grad_fn for output in outputs], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for next_node, _ in node.next_functions:
            if next_node is not None and hasattr(next_node, "variable") and id(next_node.variable) not in input_ids:
                if next_node in used:
                    return True
                used.add(next_node)
            nodes.append(next_node)
    return False
