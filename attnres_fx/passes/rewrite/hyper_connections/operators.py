"""`torch.ops.attnres_fx.hyper_read` and `hyper_write`: what hyper-connections do, each as one node in every graph.

Copies x_1 … x_n, each [..., D], of one stream; h is what a sublayer reads, y what it returns:

    h    = sum_j pre_j x_j
    x_k' = sum_j carry_kj x_j + post_k y

Unconstrained (arXiv 2409.19606), with u_j = x_j / rms(x_j), each weight from the copy it belongs to:

    pre_j    = b_j  + s tanh(<w, u_j>)        carry_kj = b_kj + s tanh(<w_k, u_j>)
    post_j   = b_j  + s tanh(<w, u_j>)

Constrained (arXiv 2512.24880), with u = (x_1, …, x_n) / rms of all of them, each weight from all copies:

    pre_j    = sigmoid(b_j + s <w_j, u>)      carry = Sinkhorn(exp(b + s <w, u>)), rows last
    post_j   = 2 sigmoid(b_j + s <w_j, u>)

Both are composite, as depth attention is: what looks below autograd meets plain operations. Arithmetic is float32,
float64 for float64 copies, whatever autocast says, with one cast at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attnres_fx.errors import OperatorError
from attnres_fx.ops.dtypes import compute_dtype, result_dtype, without_autocast
from attnres_fx.ops.operator import library

library.define(
    "hyper_read(Tensor[] copies, Tensor pre, Tensor? pre_weight, Tensor? pre_scale, bool constrained, float eps) "
    "-> Tensor"
)
library.define(
    "hyper_write(Tensor[] copies, Tensor branch, Tensor post, Tensor? post_weight, Tensor? post_scale, Tensor? carry, "
    "Tensor? carry_weight, Tensor? carry_scale, bool constrained, int steps, float eps) -> Tensor[]"
)


@dataclass(frozen=True)
class Weights:
    """What one kind of weights is computed from.

    Args:
        static: b, [n], or [n, n] for those that carry copies.
        weight: w, [D] or [n, D] unconstrained, [n, n D] or [n n, n D] constrained; None for static weights.
        scale: s, []; None for static weights.
    """

    static: Tensor
    weight: Tensor | None
    scale: Tensor | None

    def unbounded(self, rows: Sequence[Tensor], constrained: bool) -> Tensor:
        """b and what depends on the token.

        Args:
            rows: u_1 … u_n, each [..., D], in the dtype to compute in.
            constrained: Whether each weight depends on all of them.

        Returns:
            [..., n] or [..., n, n]; without the first dimensions where nothing depends on the token.
        """
        static = self.static.to(rows[0].dtype)
        if self.weight is None or self.scale is None:
            return static
        weight, scale = self.weight.to(static.dtype), self.scale.to(static.dtype)
        if constrained:
            total = F.linear(torch.cat(list(rows), -1), weight)
            return torch.add(static, scale * total.unflatten(-1, static.shape))
        if static.dim() == 1:
            return static + scale * torch.cat([(row * weight).sum(-1, keepdim=True) for row in rows], -1).tanh()
        return static + scale * torch.stack([F.linear(row, weight) for row in rows], -1).tanh()


def _rows(copies: Sequence[Tensor], constrained: bool, eps: float) -> list[Tensor]:
    """u_1 … u_n: the copies divided by the root mean square of each, or of all together."""
    values = [c.to(compute_dtype(copies)) for c in copies]
    squares = [v.square().mean(-1, keepdim=True) for v in values]
    if constrained:
        squares = [sum(squares[1:], squares[0]) / len(squares)] * len(squares)
    return [v * torch.rsqrt(s + eps) for v, s in zip(values, squares, strict=True)]


def _sinkhorn(logits: Tensor, steps: int) -> Tensor:
    """A doubly stochastic matrix: columns and rows of exp(logits) normalised in turn, rows last."""
    matrix = (logits - logits.amax((-2, -1), keepdim=True)).exp()
    for _ in range(steps):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


def _mixed(values: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of values [..., D] times weights [..., n] or [n]."""
    each = weights.unsqueeze(-1).unbind(-2)
    total = values[0] * each[0]
    for value, weight in zip(values[1:], each[1:], strict=True):
        total = torch.addcmul(total, value, weight)
    return total


def _hyper_read(
    copies: list[Tensor],
    pre: Tensor,
    pre_weight: Tensor | None,
    pre_scale: Tensor | None,
    constrained: bool,
    eps: float,
) -> Tensor:
    _check("hyper_read", copies, {"pre": (pre, (len(copies),))})
    with without_autocast(copies[0].device):
        rows = _rows(copies, constrained, eps)
        weights = Weights(pre, pre_weight, pre_scale).unbounded(rows, constrained)
        weights = weights.sigmoid() if constrained else weights
        return _mixed([c.to(rows[0].dtype) for c in copies], weights).to(result_dtype(copies))


def _hyper_write(
    copies: list[Tensor],
    branch: Tensor,
    post: Tensor,
    post_weight: Tensor | None,
    post_scale: Tensor | None,
    carry: Tensor | None,
    carry_weight: Tensor | None,
    carry_scale: Tensor | None,
    constrained: bool,
    steps: int,
    eps: float,
) -> list[Tensor]:
    count = len(copies)
    shapes = {"post": (post, (count,)), "carry": (carry, (count, count)), "branch": (branch, copies[0].shape)}
    _check("hyper_write", copies, shapes)
    with without_autocast(copies[0].device):
        rows = _rows(copies, constrained, eps)
        writes = Weights(post, post_weight, post_scale).unbounded(rows, constrained)
        writes = 2 * writes.sigmoid() if constrained else writes
        dtype = result_dtype([*copies, branch])
        written = [branch.to(writes.dtype) * w for w in writes.unsqueeze(-1).unbind(-2)]
        values = [c.to(writes.dtype) for c in copies]
        if carry is None:  # equal copies, which a doubly stochastic matrix leaves as they are
            return [(v + w).to(dtype) for v, w in zip(values, written, strict=True)]
        carried = Weights(carry, carry_weight, carry_scale).unbounded(rows, constrained)
        carried = _sinkhorn(carried, steps) if constrained else carried
        return [(_mixed(values, row) + w).to(dtype) for row, w in zip(carried.unbind(-2), written, strict=True)]


def _check(name: str, copies: Sequence[Tensor], shapes: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """Raise OperatorError where something has another shape than the copies say."""
    if not copies:
        raise OperatorError(f"{name} got no copies of the stream: it needs at least one.")
    for i, copy in enumerate(copies):
        if not copy.is_floating_point() or copy.dim() < 1 or copy.shape != copies[0].shape:
            raise OperatorError(
                f"{name}: copy {i} is {copy.dtype} {tuple(copy.shape)}, and copy 0 {copies[0].dtype} "
                f"{tuple(copies[0].shape)}: copies are floating point tensors [..., D] of one shape."
            )
    for what, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise OperatorError(f"{name}: {what} is {tuple(tensor.shape)}; for these copies it is {tuple(shape)}.")


for _name, _kernel in (("hyper_read", _hyper_read), ("hyper_write", _hyper_write)):
    library.impl(_name, _kernel, "CompositeImplicitAutograd")
    library.impl(_name, _kernel, "FuncTorchBatched")  # see depth attention: else vmap fails above its rules

#: What stands in a graph for a read, and for a write, whose result is a list of n copies.
HYPER_READ = torch.ops.attnres_fx.hyper_read.default
HYPER_WRITE = torch.ops.attnres_fx.hyper_write.default
