"""A small GPT on bytes, in plain PyTorch: the model that the demo and the other examples convert.

    attnres-fx inspect examples.small_gpt:example --reads

Nothing in it knows of attnres_fx. `torch.fx.symbolic_trace`, `torch.compile(fullgraph=True)` and
`torch.export` trace it, with any batch size and any length up to the context.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a SmallGPT. tied: the head shares the token embedding's weight; hidden: the MLP's, else 4 width."""

    vocabulary: int = 256
    layers: int = 6
    heads: int = 4
    width: int = 128
    context: int = 128
    dropout: float = 0.0
    tied: bool = True
    hidden: int | None = None


class Attention(nn.Module):
    """Causal self-attention, [batch, length, width] to the same."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = nn.Dropout(config.dropout)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = config.hidden or 4 * config.width
        self.expand = nn.Linear(config.width, hidden)
        self.project = nn.Linear(hidden, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.project(F.gelu(self.expand(x))))


class Block(nn.Module):
    """Pre-norm block: two residual sublayers, the `x + f(norm(x))` that attnres_fx rewrites."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class SmallGPT(nn.Module):
    """ids [batch, length] (int64, length up to the context) to logits [batch, length, vocabulary]."""

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(_initialize)
        for name, parameter in self.named_parameters():
            if name.endswith(".project.weight"):  # what is added to the stream
                nn.init.normal_(parameter, std=(parameter.shape[1] * 2 * config.layers) ** -0.5)
        if config.tied:
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _initialize(module: nn.Module) -> None:
    """Outputs about as large as inputs; 0.02, the custom for wide models, trains narrow ones far more slowly."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats a byte; logits [batch, length, vocabulary], targets [batch, length]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def example() -> tuple[nn.Module, tuple[Tensor]]:
    """A fresh model and example arguments, as `attnres-fx inspect` and `attnres-fx convert` take them."""
    return SmallGPT(), (torch.randint(0, 256, (2, 32)),)
