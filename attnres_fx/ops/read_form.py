"""How the weights of a read come about in every form, and what it mixes: the definition behind every form of a read.

    n    = v_S * rsqrt(mean(v_S^2, -1) + eps)              of the newest source
    q    = query, or query @ n of a token where query is [D, D]
    k_i  = v_i * rsqrt(mean(v_i^2, -1) + eps) * key_weight  without key_norm: v_i * key_weight
    l_ih = scale * <q_h, k_ih> + bias_i                     over the D / H elements of head h
    a    = softmax_i(l), or sigmoid(l), or without a query softmax_i(bias)
    out  = gain * sum_i a_ih v_ih                           with value_norm: of the normalised v_i

Sources are taken one by one and never stacked; only row statistics [S, ..., H] are.

Source: arXiv 2603.15031, the ablations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnres_fx.config import AttnResConfig
from attnres_fx.ops.dtypes import compute_dtype, result_dtype, without_autocast
from attnres_fx.ops.read_style import ReadStyle


@dataclass(frozen=True)
class ReadForm:
    """How the weights of a read come about, where that is not the plain way. The fields stand in the operator's order.

    Args:
        key_norm: whether keys are divided by their root mean square.
        heads: into how many parts the width is cut, each with weights of its own.
        sigmoid: whether a weight is the sigmoid of its logit; else the softmax over all.
    """

    key_norm: bool = True
    heads: int = 1
    sigmoid: bool = False

    @classmethod
    def of(cls, config: AttnResConfig) -> "ReadForm":
        """The form that a config asks for."""
        return cls(config.key_norm, config.heads, config.weights == "sigmoid")


@dataclass(frozen=True)
class GeneralRead:
    """All that a read takes beside its sources.

    Args:
        query: [D], the same for every token; [D, D], from the newest source of each; None for the bias as logits.
        key_weight: [D], or None.
        eps: added to the mean square of a source.
        style: bias [S], scale of the logits, normalised values.
        form: how the weights come about.
    """

    query: Tensor | None
    key_weight: Tensor | None
    eps: float
    style: ReadStyle[Tensor]
    form: ReadForm

    def coefficients(self, sources: Sequence[Tensor]) -> Tensor:
        """What each source is multiplied by in the mixture, [S, ..., H], before the gain."""
        wide, weights = self._wide(sources), self.weights(sources)
        return weights * torch.stack([self._scale(v) for v in wide]) if self.style.value_norm else weights

    def mixture(self, sources: Sequence[Tensor], gain: float) -> Tensor:
        """The read before it is rounded, [..., D]."""
        factors = (self.coefficients(sources) * gain).unbind(0)
        mixed = self._by_head(sources[0].to(factors[0].dtype)) * factors[0].unsqueeze(-1)
        for source, factor in zip(sources[1:], factors[1:], strict=True):
            mixed = torch.addcmul(mixed, self._by_head(source.to(factor.dtype)), factor.unsqueeze(-1))
        return mixed.flatten(-2)

    def weights(self, sources: Sequence[Tensor]) -> Tensor:
        """What each source weighs, [S, ..., H], before the gain."""
        wide, bias = self._wide(sources), self.style.bias
        if self.query is None:
            assert bias is not None
            rows = wide[0].shape[:-1]
            alike = torch.softmax(bias.to(wide[0].dtype), 0).reshape(-1, *(1 for _ in rows), 1)
            return alike.expand(-1, *rows, 1)
        weight = self._logit_weight(wide[-1], result_dtype(sources))
        products = [self._by_head(v * weight).sum(-1) for v in wide]
        if self.form.key_norm:
            products = [p * self._scale(v) for p, v in zip(products, wide, strict=True)]
        logits = torch.stack(products) * self.style.scale
        if bias is not None:
            logits = logits + bias.to(logits.dtype).reshape(-1, *(1 for _ in products[0].shape))
        return torch.sigmoid(logits) if self.form.sigmoid else torch.softmax(logits, 0)

    def _wide(self, sources: Sequence[Tensor]) -> list[Tensor]:
        dtype = compute_dtype(sources)
        return [s.to(dtype) for s in sources]

    def _scale(self, value: Tensor) -> Tensor:
        """Reciprocal root mean square of a source, [..., 1]."""
        return torch.rsqrt(value.square().mean(-1, keepdim=True) + self.eps)

    def _logit_weight(self, newest: Tensor, narrow: torch.dtype) -> Tensor:
        """Query times key gain, [D] or [..., D], in the dtype of the newest source."""
        assert self.query is not None
        per_token = self.query.dim() == 2
        query = self._projected(self.query, newest, narrow) if per_token else self.query.to(newest.dtype)
        return query if self.key_weight is None else query * self.key_weight.to(newest.dtype)

    def _projected(self, weight: Tensor, newest: Tensor, narrow: torch.dtype) -> Tensor:
        """The query of each token, [..., D].

        A matrix product in the dtype of the sources, whatever autocast says: backward computes it again, where autocast
        is off.
        """
        normed = newest * self._scale(newest)
        with without_autocast(newest.device):
            query: Tensor = torch.nn.functional.linear(normed.to(narrow), weight.to(narrow))
        return query.to(newest.dtype)

    def _by_head(self, rows: Tensor) -> Tensor:
        """[..., D] as [..., H, D / H]."""
        parts: Tensor = rows.unflatten(-1, (self.form.heads, -1))
        return parts


def depth_weights(
    sources: Sequence[Tensor],
    query: Tensor | None,
    key_weight: Tensor | None,
    *,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    scale: float = 1.0,
    key_norm: bool = True,
    heads: int = 1,
    sigmoid: bool = False,
) -> Tensor:
    """The attention over depth that a read mixes with.

    Args:
        sources: S >= 1 floating tensors [..., D] of one shape and device.
        query: as for `depth_attention_general`, and so are the others.
        key_weight: [D], or None.
        eps: added to the mean square of a source.
        bias: [S], added to the logits.
        scale: multiplies the products of query and keys.
        key_norm: whether keys are divided by their root mean square.
        heads: H.
        sigmoid: whether weights are sigmoids.

    Returns:
        [S, ...], with more than one head [S, ..., H]; float32 (float64 for float64 sources), summing to one over S if
        they are no sigmoids. Nothing is checked.
    """
    read = GeneralRead(query, key_weight, eps, ReadStyle(bias, scale), ReadForm(key_norm, heads, sigmoid))
    found = read.weights(sources)
    return found.squeeze(-1) if heads == 1 else found
