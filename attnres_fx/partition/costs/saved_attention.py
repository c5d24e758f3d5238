"""A stand-in for attention while memory is measured: it keeps what flash attention keeps, and cannot be run.

Which kernel PyTorch chooses depends on a device, and the definition that it falls back to keeps the scores of all
pairs of positions. This keeps query, key, value, mask, the output, and one number in float32 for each row of scores.
"""

from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops.operator import library

library.define("kept_attention(Tensor query, Tensor key, Tensor value, Tensor? mask) -> (Tensor, Tensor)")
library.define(
    "kept_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor out, "
    "Tensor logsumexp) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    *batch, heads, length, _ = (1, *query.shape)[-max(4, query.dim()) :]
    # Kernels lay the output out by tokens, so that merging the heads is a view and not a second copy to keep.
    out = query.new_empty((*batch, length, heads, value.shape[-1])).transpose(-3, -2)
    return out.reshape((*query.shape[:-1], value.shape[-1])), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    other = query.new_empty(0) if mask is None else torch.empty_like(mask)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), other


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, key, value, mask, out, logsumexp = ctx.saved_tensors
    found = torch.ops.attnres_fx.kept_attention_backward(grad, query, key, value, mask, out, logsumexp)
    return *found[:3], found[3] if mask is not None and mask.is_floating_point() else None


torch.library.register_fake("attnres_fx::kept_attention", _forward, lib=library)
torch.library.register_fake("attnres_fx::kept_attention_backward", _backward, lib=library)
torch.library.register_autograd("attnres_fx::kept_attention", _gradients, setup_context=_save, lib=library)

#: (query, key [..., heads, length, width], value, mask) to the output and the log-sum-exps.
KEPT_ATTENTION = torch.ops.attnres_fx.kept_attention.default
