"""One decoder with the options that public libraries of layers offer, and two lanes over one stack."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.public_models.parts import WIDTH, Attention, Example, FeedForward, ids, join_heads, split_heads


class Shift(nn.Module):
    """Half of the features come from the token before."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        here, before = x.chunk(2, -1)
        return self.inner(torch.cat([here, F.pad(before, (0, 0, 1, -1))], -1))


class Gate(nn.Module):
    """A GRU takes the branch as its input and the stream as its state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.cell(y.reshape(-1, WIDTH), x.reshape(-1, WIDTH)).view_as(x)


class Residual(nn.Module):
    """`x + f(norm(x))` and what can be done to its parts."""

    def __init__(self, branch: nn.Module, option: str, weight: float) -> None:
        super().__init__()
        self.option, self.weight = option, weight
        self.branch = Shift(branch) if option == "shift and memory tokens" else branch
        self.norm = nn.LayerNorm(WIDTH)
        if option == "sandwich norm, scaled":
            self.norm_out, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.ones(WIDTH))
        if option == "gate residual":
            self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        if self.option == "deepnorm":
            return self.norm(1.7 * x + self.branch(x))
        y = self.branch(self.norm(x))
        if self.option == "gate residual":
            return self.gate(x, y)
        if self.option == "sandwich norm, scaled":
            return x * self.scale + self.norm_out(y)
        return x + self.weight * y


class Decoder(nn.Module):
    """Two layers of attention and feed-forward, or three parts with a half feed-forward on either side."""

    def __init__(self, option: str) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(11, WIDTH), nn.Embedding(16, WIDTH)
        self.memory = nn.Parameter(torch.zeros(2, WIDTH)) if option == "shift and memory tokens" else None
        half = [(FeedForward, 0.5), (Attention, 1.0), (FeedForward, 0.5)]
        kinds = half if option == "macaron" else [(Attention, 1.0), (FeedForward, 1.0)]
        self.layers = nn.ModuleList(Residual(kind(), option, weight) for _ in range(2) for kind, weight in kinds)
        self.norm = nn.Identity() if option == "deepnorm" else nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))
        if self.memory is not None:
            x = torch.cat([self.memory.expand(x.shape[0], -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.head(x if self.memory is None else x[:, 2:])


class MixedValue(nn.Module):
    """Each token says how much of the first layer's value it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.feed = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), FeedForward()
        self.qkv, self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.norm1(x)
        q, k, v = (split_heads(part) for part in self.qkv(h).chunk(3, -1))
        if first is not None:
            v = torch.lerp(v, first, self.mix(h).sigmoid().transpose(1, 2)[..., None])
        x = x + self.out(join_heads(F.scaled_dot_product_attention(q, k, v)))
        return x + self.feed(self.norm2(x)), v if first is None else first


class ValueResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(11, WIDTH), nn.ModuleList(MixedValue() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x, first = self.embed(tokens), None
        for layer in self.layers:
            x, first = layer(x, first)
        return self.head(self.norm(x))


class ReversibleLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.feed = Attention(), FeedForward()

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        left = left + self.attention(self.norm1(right))
        return left, right + self.feed(self.norm2(left))


class TwoLanes(nn.Module):
    """Attention reads the right lane and writes the left one, the feed-forward the other way round.

    Both lanes begin with one embedding, or each with a projection of its own.
    """

    def __init__(self, one_root: bool) -> None:
        super().__init__()
        self.one_root, self.embed = one_root, nn.Embedding(11, WIDTH)
        self.into_left, self.into_right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(ReversibleLayer() for _ in range(2))
        self.norm_left, self.norm_right, self.head = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(2 * WIDTH, 11)

    def start(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)
        return (x, x) if self.one_root else (self.into_left(x), self.into_right(x))

    def forward(self, tokens: Tensor) -> Tensor:
        left, right = self.start(tokens)
        for layer in self.layers:
            left, right = layer(left, right)
        return self.head(torch.cat([self.norm_left(left), self.norm_right(right)], -1))


OPTIONS = ("sandwich norm, scaled", "deepnorm", "macaron", "shift and memory tokens", "gate residual")
EXAMPLES: dict[str, Example] = {
    **{option: lambda option=option: (Decoder(option), (ids(),)) for option in OPTIONS},
    "value residual": lambda: (ValueResidual(), (ids(),)),
    "two lanes": lambda: (TwoLanes(one_root=False), (ids(),)),
    "two lanes of one root": lambda: (TwoLanes(one_root=True), (ids(),)),
}
