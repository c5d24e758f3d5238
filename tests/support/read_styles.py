"""Reads in every style (bias, scale, normalised values, no key gain) and a float64 oracle for each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops import depth_attention, depth_attention_batch, depth_attention_fused, depth_attention_merge
from tests.support.operator_oracle import oracle, worst_ratio

COUNT, WIDTH = 4, 24


@dataclass(frozen=True)
class Style:
    """What a read does beside the plain one."""

    bias: bool = False
    scale: float = 1.0
    value_norm: bool = False
    key_gain: bool = True


STYLES = {
    "bias": Style(bias=True),
    "scale": Style(scale=2.5),
    "normalised values": Style(value_norm=True),
    "no key gain": Style(key_gain=False),
    "Inkling": Style(scale=WIDTH**-0.5, value_norm=True, key_gain=False),
    "all": Style(bias=True, scale=0.7, value_norm=True),
}


@dataclass(frozen=True)
class Given:
    """Sources, queries, and what their style asks for."""

    style: Style
    sources: list[Tensor]
    queries: list[Tensor]
    gains: list[Tensor] | None
    bias: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.sources, *self.queries, *(self.gains or ()), *(() if self.bias is None else (self.bias,))]

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.style.scale, "value_norm": self.style.value_norm}

    def bias_of(self, query: int) -> Tensor | None:
        return None if self.bias is None else self.bias[query]

    def exact(self) -> "Given":
        """The same numbers in float64."""
        found = iter([t.detach().double().requires_grad_() for t in self.leaves])
        copies = ([next(found) for _ in group] for group in (self.sources, self.queries, self.gains or ()))
        sources, queries, gains = copies
        sources, queries, gains = list(sources), list(queries), list(gains)
        return Given(self.style, sources, queries, gains or None, next(found, None))

    def oracle(self, query: int, *, gain: float = 1.0, first: int | None = None) -> Tensor:
        """The read of one query over the first sources."""
        key_gain, bias = None if self.gains is None else self.gains[query], self.bias_of(query)
        bias = bias if bias is None else bias[:first]
        return oracle(self.sources[:first], self.queries[query], key_gain, gain=gain, bias=bias, **self.options)


def given(
    style: Style,
    *shape: int,
    count: int = COUNT,
    queries: int = 1,
    dtype: torch.dtype = torch.float32,
    width: int = WIDTH,
) -> Given:
    generator = torch.Generator().manual_seed(7)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    sources = [normal(*shape, width).mul(1 + i % 3).to(dtype).requires_grad_() for i in range(count)]
    weights = [normal(width).div(width**0.5 * style.scale).requires_grad_() for _ in range(queries)]
    gains = [normal(width).mul(0.3).add(1).requires_grad_() for _ in range(queries)] if style.key_gain else None
    return Given(style, sources, weights, gains, normal(queries, count).requires_grad_() if style.bias else None)


def compare(
    inputs: Given,
    run: Callable[[Given], list[Tensor]],
    right: Callable[[Given], list[Tensor]],
    tolerance: tuple[float, float] = (1e-5, 1e-4),
) -> None:
    """Results and gradients of every tensor, against those of float64."""
    exact = inputs.exact()
    found, expected = run(inputs), right(exact)
    grads = [torch.randn(f.shape, generator=torch.Generator().manual_seed(3)).to(f.dtype) for f in found]
    for one, other in zip(found, expected, strict=True):
        assert worst_ratio(one, other) <= tolerance[0], worst_ratio(one, other)
    gradients = torch.autograd.grad(found, inputs.leaves, grads)
    wanted = torch.autograd.grad(expected, exact.leaves, [g.double() for g in grads])
    for place, (one, other) in enumerate(zip(gradients, wanted, strict=True)):
        assert torch.isfinite(one).all(), place
        assert worst_ratio(one, other) <= tolerance[1], (place, worst_ratio(one, other))


def one_read(inputs: Given) -> list[Tensor]:
    gain = None if inputs.gains is None else inputs.gains[0]
    bias = inputs.bias_of(0)
    return [depth_attention(inputs.sources, inputs.queries[0], gain, gain=3.0, bias=bias, **inputs.options)]


def several_queries(inputs: Given) -> list[Tensor]:
    outputs = depth_attention_batch(inputs.sources, inputs.queries, inputs.gains, bias=inputs.bias, **inputs.options)
    return outputs[: len(inputs.queries)]


def two_phases(inputs: Given) -> list[Tensor]:
    bias = (None, None) if inputs.bias is None else (inputs.bias[:, :-1], inputs.bias[0, -1:])
    gain = None if inputs.gains is None else inputs.gains[0]
    first = depth_attention_batch(inputs.sources[:-1], inputs.queries, inputs.gains, bias=bias[0], **inputs.options)
    lse = first[len(inputs.queries)]
    parts = (first[0], lse, inputs.sources[-1], inputs.queries[0], gain)
    return [depth_attention_merge(*parts, gain=3.0, bias=bias[1], **inputs.options)[0]]


def fused(inputs: Given) -> list[Tensor]:
    gain, bias = None if inputs.gains is None else inputs.gains[0], inputs.bias_of(0)
    zero = torch.zeros_like(inputs.sources[-1])
    return depth_attention_fused(
        inputs.sources, inputs.queries[0], gain, delta=zero, norm=1, norm_eps=1e-5, bias=bias, **inputs.options
    )[:1]


def fused_oracle(exact: Given) -> list[Tensor]:
    return [torch.nn.functional.rms_norm(exact.oracle(0), exact.sources[0].shape[-1:], None, 1e-5)]
