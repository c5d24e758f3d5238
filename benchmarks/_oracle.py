"""Depth attention in float64, in chunks of rows, and what an implementation is held to before it is timed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from _measure import relative_error
from torch import Tensor

#: Largest differences allowed, relative to the largest value: forward, gradients.
TOLERANCES = {torch.bfloat16: (8e-3, 2e-2), torch.float16: (4e-3, 1e-2), torch.float32: (1e-5, 1e-4)}
#: Bytes of float64 sources that the oracle takes up at once; autograd needs a few times as much.
CHUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """One problem: S sources [N, D], views of one [S, N, D] tensor so that stacked peers need no copy."""

    stacked: Tensor
    query: Tensor
    key_weight: Tensor
    grad: Tensor
    eps: float

    @property
    def shape(self) -> tuple[int, int, int]:
        sources, tokens, width = self.stacked.shape
        return sources, tokens, width


def make_case(sources: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
    """Random inputs whose logits are of the order of one, so that the softmax is neither flat nor a choice."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    stacked = normal(sources, tokens, width)
    query = normal(width) * (2.0 / width**0.5)
    key_weight = 1 + 0.1 * normal(width)
    return Case(stacked, query, key_weight, normal(tokens, width), 1e-6)


def oracle(
    sources: Sequence[Tensor], query: Tensor, key_weight: Tensor, grad: Tensor, eps: float
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Output, gradients of the sources, of the query and of the key gain, all float64, written out independently."""
    values = torch.stack([s.detach().double() for s in sources]).requires_grad_()
    q, g = query.detach().double().requires_grad_(), key_weight.detach().double().requires_grad_()
    keys = values / (values.square().mean(-1, keepdim=True) + eps).sqrt() * g
    weights = torch.softmax(torch.einsum("s...d,d->s...", keys, q), 0)
    out = torch.einsum("s...,s...d->...d", weights, values)
    values_grad, q_grad, g_grad = torch.autograd.grad(out, (values, q, g), grad.double())
    return out.detach(), list(values_grad.unbind(0)), q_grad, g_grad


@dataclass(frozen=True)
class Errors:
    """Largest relative differences of one implementation from the oracle."""

    out: float
    sources: float
    query: float
    key_weight: float | None

    def failure(self, dtype: torch.dtype) -> str | None:
        forward, gradients = TOLERANCES[dtype]
        found = {"output": (self.out, forward), "source gradient": (self.sources, gradients)}
        found["query gradient"] = (self.query, gradients)
        if self.key_weight is not None:
            found["key gain gradient"] = (self.key_weight, gradients)
        wrong = [f"{name} off by {e:.2g} (allowed {limit:.2g})" for name, (e, limit) in found.items() if not e <= limit]
        return "; ".join(wrong) or None


def errors(
    case: Case, key_weight: Tensor, out: Tensor, grads: Sequence[Tensor], query_grad: Tensor, gain_grad: Tensor | None
) -> Errors:
    """Compare in chunks of rows; gradients of query and key gain are summed over the chunks."""
    sources, tokens, width = case.shape
    rows = max(1, CHUNK_BYTES // (8 * sources * width))
    worst_out = worst_source = 0.0
    query_total = torch.zeros(width, dtype=torch.float64, device=case.stacked.device)
    gain_total = torch.zeros_like(query_total)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        wanted_out, wanted, q, g = oracle(
            case.stacked[:, part].unbind(0), case.query, key_weight, case.grad[part], case.eps
        )
        worst_out = max(worst_out, relative_error(out[part], wanted_out))
        for found, want in zip(grads, wanted, strict=True):
            worst_source = max(worst_source, relative_error(found[part], want))
        query_total += q
        gain_total += g
        del wanted_out, wanted
    return Errors(
        worst_out,
        worst_source,
        relative_error(query_grad, query_total),
        None if gain_grad is None else relative_error(gain_grad, gain_total),
    )
