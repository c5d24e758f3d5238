"""Language models."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.public_models.parts import (
    WIDTH,
    Attention,
    Example,
    FeedForward,
    Layer,
    ids,
    join_heads,
    split_heads,
)

VOCABULARY = 11


def norm(x: Tensor) -> Tensor:
    """Without weights, and without a module."""
    return F.rms_norm(x, (x.shape[-1],))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], -1)


class RotaryAttention(nn.Module):
    """Rotary positions, query and key normed, and the value mixed with that of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mix = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.register_buffer("angles", torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.1])), persistent=False)

    def forward(self, x: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, -1))
        v = v if first is None else self.mix[0] * v + self.mix[1] * first.view_as(v)
        cos, sin = self.angles[: x.shape[1]].cos(), self.angles[: x.shape[1]].sin()
        q, k = turned(norm(q), cos, sin), turned(norm(k), cos, sin)
        return self.out(join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True))), v


class SquaredReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class NanochatBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = RotaryAttention(), SquaredReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(norm(x))[0]
        return x + self.feed(norm(x))


class Nanochat(nn.Module):
    """Norms are functions, two factors a layer weigh the state and the first state, logits are capped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.h = nn.ModuleList(NanochatBlock() for _ in range(2))
        self.lambdas, self.lambdas0 = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = x0 = norm(self.embed(tokens))
        for i, block in enumerate(self.h):
            x = block(self.lambdas[i] * x + self.lambdas0[i] * x0)
        return 15 * torch.tanh(self.head(norm(x)) / 15)


class SpeedrunBlock(nn.Module):
    """Weighs the state and the first state, and hands on the value of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = RotaryAttention(), SquaredReLU()
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, x0: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        y, value = self.attention(norm(x), first)
        x = x + y
        return x + self.feed(norm(x)), value if first is None else first


class CappedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 30 * torch.sigmoid(self.out(norm(x)) / 7.5)


class Speedrun(nn.Module):
    """modded-nanogpt: a smear of the previous token, lambdas, a value residual, weighted skips from first to last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.smear_gate = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(4, 1, bias=False)
        self.smear, self.skips = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.ones(2))
        self.blocks = nn.ModuleList(SpeedrunBlock() for _ in range(4))
        self.head = CappedHead()

    def start(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        gate = self.smear * torch.sigmoid(self.smear_gate(x[:, 1:, :4]))
        return norm(torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = x0 = self.start(tokens)
        kept, first = [], None
        for i, block in enumerate(self.blocks):
            if i >= 2:
                x = x + self.skips[i - 2] * kept.pop()
            x, first = block(x, x0, first)
            if i < 2:
                kept.append(x)
        return self.head(x)


class Universal(nn.Module):
    """One pre-norm layer, called on its own output; positions and the number of the step are added before each call."""

    def __init__(self, steps: int = 3) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)
        self.steps, self.layer = nn.Parameter(torch.zeros(steps, WIDTH)), Layer()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x, places = self.embed(tokens), self.positions(torch.arange(tokens.shape[1]))
        for step in self.steps.unbind(0):
            x = self.layer(x + (places + step))
        return self.head(self.norm(x))


class PostLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = Attention(), FeedForward()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(self.feed(x) + x)


class Albert(nn.Module):
    """Narrow embeddings, normed and projected; one post-norm layer for all depths; a pooler on the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.kinds, self.places = nn.Embedding(VOCABULARY, 4), nn.Embedding(2, 4), nn.Embedding(16, 4)
        self.embed_norm, self.wider, self.layer = nn.LayerNorm(4), nn.Linear(4, WIDTH), PostLayer()
        self.pool = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens) + self.kinds(torch.zeros_like(tokens)) + self.places(torch.arange(tokens.shape[1]))
        x = self.wider(self.embed_norm(x))
        for _ in range(3):
            x = self.layer(x)
        return x, torch.tanh(self.pool(x[:, 0]))


class DecoderLayer(nn.Module):
    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.attention, self.feed = Attention(), FeedForward()
        self.norm1, self.norm3 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        if cross:
            self.cross, self.norm2 = Attention(), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), bias=bias)
        if memory is not None:
            x = x + self.cross(self.norm2(x), memory)
        return x + self.feed(self.norm3(x))


class Stack(nn.Module):
    """The first layer's relative bias is added to the scores of all layers."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.distances, self.norm = nn.Embedding(16, 2), nn.RMSNorm(WIDTH)
        self.layers = nn.ModuleList(DecoderLayer(cross) for _ in range(2))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        places = torch.arange(x.shape[1])
        bias = self.distances((places[:, None] - places[None]).abs()).permute(2, 0, 1)[None]
        for layer in self.layers:
            x = layer(x, bias, memory)
        return self.norm(x)


class EncoderDecoder(nn.Module):
    """Tied embeddings, no absolute positions, a bias of distances for each side."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder, self.decoder = nn.Embedding(VOCABULARY, WIDTH), Stack(False), Stack(True)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        memory = self.encoder(self.embed(tokens))
        x = self.decoder(self.embed(targets), memory)
        return (x * WIDTH**-0.5) @ self.embed.weight.t()


EXAMPLES: dict[str, Example] = {
    "nanochat": lambda: (Nanochat(), (ids(),)),
    "modded-nanogpt": lambda: (Speedrun(), (ids(),)),
    "universal": lambda: (Universal(), (ids(),)),
    "albert": lambda: (Albert(), (ids(),)),
    "encoder-decoder": lambda: (EncoderDecoder(), (ids(), ids(2, 4))),
}
