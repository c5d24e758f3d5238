"""Block Attention Residuals written by hand on the submodules of the example GPT."""

from typing import Any

import torch
from torch import Tensor, nn


class NaiveAttnRes(nn.Module):
    """Block Attention Residuals on the example GPT's own submodules, as one would first write it."""

    def __init__(self, gpt: nn.Module, num_blocks: int) -> None:
        super().__init__()
        self.gpt: Any = gpt
        count = 2 * len(self.gpt.blocks)
        self.starts = {i * count // num_blocks for i in range(num_blocks)}
        width = self.gpt.norm.weight.shape[0]
        self.queries = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(count))
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(count))

    def read(self, i: int, sources: list[Tensor]) -> Tensor:
        values = torch.stack(sources)
        keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * self.gains[i]
        weights = torch.einsum("sbtd,d->sbt", keys, self.queries[i]).softmax(0)
        return len(sources) * torch.einsum("sbt,sbtd->btd", weights, values)

    def forward(self, ids: Tensor) -> Tensor:
        gpt = self.gpt
        root = gpt.token(ids) + gpt.position(torch.arange(ids.shape[1], device=ids.device))
        done, partial, state = [root], None, root
        sublayers = [f for b in gpt.blocks for f in ((b.attention_norm, b.attention), (b.mlp_norm, b.mlp))]
        for i, (norm, layer) in enumerate(sublayers):
            if i in self.starts and partial is not None:
                done, partial = [*done, partial], None
            out = layer(norm(state))
            partial = out if partial is None else partial + out
            state = self.read(i, [*done, partial])
        return gpt.head(gpt.norm(state))
