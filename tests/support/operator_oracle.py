"""Depth attention in float64, written another way, and inputs and distances to compare with it."""

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6
#: Worst difference over worst value: forward, gradients.
TOLERANCE = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (2e-3, 5e-3),
    torch.bfloat16: (8e-3, 2e-2),
}


def oracle_weights(
    sources: list[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    eps: float = EPS,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    values = torch.stack([s.double() for s in sources])
    keys = F.rms_norm(values, values.shape[-1:], None if key_weight is None else key_weight.double(), eps)
    logits = torch.einsum("s...d,d->s...", keys, query.double() * scale)
    if bias is not None:
        logits = logits + bias.double().reshape(-1, *[1] * (logits.dim() - 1))
    return logits.softmax(0)


def oracle(
    sources: list[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    *,
    eps: float = EPS,
    gain: float = 1.0,
    bias: Tensor | None = None,
    scale: float = 1.0,
    value_norm: bool = False,
) -> Tensor:
    values = torch.stack([s.double() for s in sources])
    weights = oracle_weights(sources, query, key_weight, eps, bias=bias, scale=scale)
    mixed = F.rms_norm(values, values.shape[-1:], None, eps) if value_norm else values
    return gain * torch.einsum("s...,s...d->...d", weights, mixed)


def random_inputs(shape: tuple[int, ...], dtypes: list[torch.dtype], weights: torch.dtype | None = None):
    """Sources [*shape], one a dtype, then query and key_weight; logits are about 1, so all sources count."""
    torch.manual_seed(0)
    weights, width = weights or dtypes[0], shape[-1]
    sources = [torch.randn(shape).mul(1 + i % 3).to(d).requires_grad_() for i, d in enumerate(dtypes)]
    query = torch.randn(width).div(width**0.5).to(weights).requires_grad_()
    key_weight = torch.randn(width).mul(0.3).add(1).to(weights).requires_grad_()
    return [*sources, query, key_weight]


def worst_ratio(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference, size = (actual - expected).abs().max(), expected.abs().max()
    return float(difference if size == 0 else difference / size)
