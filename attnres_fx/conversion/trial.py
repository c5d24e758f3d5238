"""Calls of a model that leave no trace on it, with everything that a comparison needs: outputs, gradients, state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_fx.capture.isolated_run import fast_path_off, seeded


@dataclass(frozen=True)
class HeldTensor:
    """An output's values, and whether it had a gradient."""

    value: Tensor
    requires_grad: bool


class BackwardError(RuntimeError):
    """A call cannot be differentiated: it wrote to what its backward needs."""


@dataclass(frozen=True)
class Outcome:
    """What one call gave.

    Attributes:
        outputs: Each leaf of the result, by its place.
        gradients: Of the parameters and the floating inputs, by name; None where no output depends on one.
        buffers: Copies of the buffers after the call, by name.
    """

    outputs: dict[str, Any]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def outcome_of(
    call: Callable[..., Any],
    root: nn.Module,
    names: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    gradients: bool,
    asked: bool | None = None,
    seed: int = 0,
) -> Outcome:
    """Call once.

    Args:
        call: Takes the arguments.
        root: The modules that the call runs on, with parameters and buffers of their own (`isolated_clone`); they keep
            what the call writes.
        names: The parameters and buffers to look at.
        args: Arguments by position; the call gets copies.
        kwargs: Arguments by keyword; the call gets copies.
        gradients: Whether to differentiate.
        asked: Whether gradients are on, for a model that asks for that: its arguments need gradients as they are.
        seed: Of torch's random numbers; their state is put back after.
    """
    args, kwargs, inputs = _copied_arguments(args, kwargs, gradients, as_given=asked is not None)
    parameters = {n: p for n, p in root.named_parameters() if n in names and p.requires_grad}
    devices = list({p.device for p in parameters.values()})
    with seeded(devices, seed), torch.set_grad_enabled(gradients if asked is None else asked), fast_path_off():
        result = call(*args, **kwargs)
        outputs = {pytree.keystr(p) or "output": x for p, x in pytree.tree_flatten_with_path(result)[0]}
        grads = _gradients(outputs, {**parameters, **inputs}) if gradients else {}
    buffers = {n: b.detach().clone() for n, b in root.named_buffers() if n in names}
    return Outcome({n: _detached(x) for n, x in outputs.items()}, grads, buffers)


def _copied_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], gradients: bool, *, as_given: bool
) -> tuple[Sequence[Any], Mapping[str, Any], dict[str, Tensor]]:
    """Copies of arguments, and the floating ones among them, by name, that a backward reaches."""
    pairs, spec = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    inputs: dict[str, Tensor] = {}
    copies: dict[int, Any] = {}
    for path, leaf in pairs:
        if isinstance(leaf, Tensor) and id(leaf) not in copies:
            copy = _strided_copy(leaf.detach())
            if (gradients or as_given) and copy.is_floating_point() and (leaf.requires_grad or not as_given):
                inputs[f"argument {pytree.keystr(path[1:])}"] = copy.requires_grad_()
                copy = _strided_copy(copy)  # a leaf could not be written to in place
            copies[id(leaf)] = copy
    copied_args, copied_kwargs = pytree.tree_unflatten([copies.get(id(x), x) for _, x in pairs], spec)
    return copied_args, copied_kwargs, inputs


def _strided_copy(tensor: Tensor) -> Tensor:
    """A copy that lies in its memory as the tensor does."""
    if tensor.is_contiguous() or tensor.layout is not torch.strided or 0 in tensor.stride():
        return tensor.clone()
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)


def _gradients(outputs: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Derivatives of a weighted sum of all outputs; the weights differ, so that nothing cancels."""
    parts = [x for x in outputs.values() if isinstance(x, Tensor) and x.requires_grad and not x.is_complex()]
    if not parts or not wanted:
        return dict.fromkeys(wanted)
    loss = sum(_weighted_sum(x) for x in parts)
    for tensor in wanted.values():
        tensor.grad = None
    try:
        loss.backward()  # type: ignore[union-attr]  # grad() would refuse reentrant checkpoints
    except RuntimeError as error:
        raise BackwardError(str(error)) from error
    grads = {name: tensor.grad for name, tensor in wanted.items()}
    return {name: g.to_dense() if g is not None and g.is_sparse else g for name, g in grads.items()}


def _weighted_sum(x: Tensor) -> Tensor:
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    weights = torch.arange(x.numel(), dtype=x.dtype, device=x.device).cos().reshape(x.shape)
    return torch.where(torch.isfinite(x), x * weights, 0).sum()


def _detached(x: Any) -> Any:
    return HeldTensor(x.detach(), x.requires_grad) if isinstance(x, Tensor) else x
