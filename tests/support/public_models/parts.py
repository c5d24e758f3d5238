"""What several models share: attention, feed-forward, weights that matter, and inputs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS = 8, 2
#: A model and the arguments it is called with.
Example = Callable[[], tuple[nn.Module, tuple[Any, ...]]]


def drawn(model: nn.Module) -> nn.Module:
    """In eval mode, every parameter drawn anew: gates, scales and tables that begin at zero would hide what they do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3, generator=generator)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, 11, (batch, length), generator=torch.Generator().manual_seed(0))


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    """`[B, N, D]` to `[B, heads, N, D / heads]`."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Of tokens over themselves, or over a context; `positions` go to query and key and not to the value."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, x: Tensor, key: Tensor | None = None, value: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        key = x if key is None else key
        value = key if value is None else value
        q, k, v = split_heads(self.q(x)), split_heads(self.k(key)), split_heads(self.v(value))
        return self.out(join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


class FeedForward(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """A plain pre-norm layer."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed = Attention(width), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))
