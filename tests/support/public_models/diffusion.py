"""Diffusion transformers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.public_models.parts import (
    WIDTH,
    Attention,
    Example,
    FeedForward,
    Layer,
    join_heads,
    split_heads,
    values,
)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Condition(nn.Module):
    """A time step as sines through an MLP, and a class: two values that merely meet."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(4, WIDTH)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(WIDTH // 2) / 2.0)
        return self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.label(y)


class DiTBlock(nn.Module):
    """adaLN-zero: shift, scale and gate of both branches come from the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attention, self.feed = Attention(), FeedForward()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, 1)
        x = x + gate1.unsqueeze(1) * self.attention(modulated(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.feed(modulated(self.norm2(x), shift2, scale2))


class LastLayer(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.modulation, self.out = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH)), nn.Linear(WIDTH, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.out(modulated(self.norm(x), *self.modulation(c).chunk(2, 1)))


class DiT(nn.Module):
    """Patches by a convolution, a table of positions, gated blocks, and the image put together from patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.positions = nn.Conv2d(2, WIDTH, 2, 2), nn.Parameter(torch.zeros(1, 4, WIDTH))
        self.condition = Condition()
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(2))
        self.last = LastLayer(8)

    def embed(self, image: Tensor) -> Tensor:
        return self.patch(image).flatten(2).transpose(1, 2) + self.positions

    def forward(self, image: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self.embed(image), self.condition(t, y)
        for block in self.blocks:
            x = block(x, c)
        x = self.last(x, c).view(-1, 2, 2, 2, 2, 2)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(-1, 2, 4, 4)


class DoubleBlock(nn.Module):
    """Text and image have weights of their own and attend together; in the last block the text is only read."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.image_norm1, self.image_norm2, self.text_norm1, self.text_norm2 = (nn.LayerNorm(WIDTH) for _ in range(4))
        self.image_qkv, self.text_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.image_out, self.image_feed = nn.Linear(WIDTH, WIDTH), FeedForward()
        self.image_modulation, self.text_modulation = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        if not last:
            self.text_out, self.text_feed = nn.Linear(WIDTH, WIDTH), FeedForward()

    def forward(self, image: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        scale, gate1, scale2, gate2 = (m.unsqueeze(1) for m in self.image_modulation(F.silu(c)).chunk(4, -1))
        text_scale, text_gate1, text_scale2, text_gate2 = (
            m.unsqueeze(1) for m in self.text_modulation(F.silu(c)).chunk(4, -1)
        )
        image_qkv = self.image_qkv(self.image_norm1(image) * (1 + scale)).chunk(3, -1)
        text_qkv = self.text_qkv(self.text_norm1(text) * (1 + text_scale)).chunk(3, -1)
        q, k, v = (split_heads(torch.cat(pair, 1)) for pair in zip(text_qkv, image_qkv, strict=True))
        mixed = join_heads(F.scaled_dot_product_attention(q, k, v))
        of_text, of_image = mixed[:, : text.shape[1]], mixed[:, text.shape[1] :]
        image = image + gate1 * self.image_out(of_image)
        image = image + gate2 * self.image_feed(self.image_norm2(image) * (1 + scale2))
        if not self.last:
            text = text + text_gate1 * self.text_out(of_text)
            text = text + text_gate2 * self.text_feed(self.text_norm2(text) * (1 + text_scale2))
        return image, text


class MMDiT(nn.Module):
    """Two streams, each with sublayers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.image_in, self.text_in, self.condition = nn.Linear(4, WIDTH), nn.Linear(6, WIDTH), Condition()
        self.blocks = nn.ModuleList(DoubleBlock(last) for last in (False, True))
        self.last = LastLayer(4)

    def forward(self, image: Tensor, text: Tensor, t: Tensor, y: Tensor) -> Tensor:
        image, text, c = self.image_in(image), self.text_in(text), self.condition(t, y)
        for block in self.blocks:
            image, text = block(image, text, c)
        return self.last(image, c)


class SingleBlock(nn.Module):
    """Attention and MLP side by side behind one norm, one product in and one out, text and image cut apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 3 * WIDTH)
        self.into, self.out = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def branch(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(c)).chunk(3, -1)
        qkv, hidden = self.into(modulated(self.norm(x), shift, scale)).split([3 * WIDTH, 2 * WIDTH], -1)
        mixed = join_heads(F.scaled_dot_product_attention(*(split_heads(part) for part in qkv.chunk(3, -1))))
        return gate.unsqueeze(1) * self.out(torch.cat([mixed, F.gelu(hidden)], -1))

    def forward(self, image: Tensor, text: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([text, image], 1)
        x = x + self.branch(x, c)
        return x[:, text.shape[1] :], x[:, : text.shape[1]]


class Flux(nn.Module):
    """Double blocks and then single blocks over text and image joined."""

    def __init__(self, double: int, single: int) -> None:
        super().__init__()
        self.image_in, self.text_in, self.condition = nn.Linear(4, WIDTH), nn.Linear(6, WIDTH), Condition()
        self.doubles = nn.ModuleList(DoubleBlock(False) for _ in range(double))
        self.singles = nn.ModuleList(SingleBlock() for _ in range(single))
        self.last = LastLayer(4)

    def forward(self, image: Tensor, text: Tensor, t: Tensor, y: Tensor) -> Tensor:
        image, text, c = self.image_in(image), self.text_in(text), self.condition(t, y)
        for block in (*self.doubles, *self.singles):
            image, text = block(image, text, c)
        return self.last(image, c)


class UBlock(nn.Module):
    """A plain layer; on the way out it takes a state of the way in along its features, through a projection."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * WIDTH, WIDTH) if skip else None
        self.layer = Layer()

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        if self.skip is not None and kept is not None:
            x = self.skip(torch.cat([x, kept], -1))
        return self.layer(x)


class UViT(nn.Module):
    """Time is one more token; long skips go from the way in to the way out by cat and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.time, self.positions = (
            nn.Linear(4, WIDTH),
            nn.Linear(1, WIDTH),
            nn.Parameter(torch.zeros(1, 5, WIDTH)),
        )
        self.down = nn.ModuleList(UBlock(False) for _ in range(2))
        self.middle = UBlock(False)
        self.up = nn.ModuleList(UBlock(True) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, patches: Tensor, t: Tensor) -> Tensor:
        x = torch.cat([self.time(t[:, None])[:, None], self.patch(patches)], 1) + self.positions
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
        x = self.middle(x)
        for block in self.up:
            x = block(x, kept.pop())
        return self.out(self.norm(x))[:, 1:]


def _times() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.3, 2.0]), torch.tensor([1, 3])


EXAMPLES: dict[str, Example] = {
    "dit": lambda: (DiT(), (values(2, 2, 4, 4), *_times())),
    "mmdit": lambda: (MMDiT(), (values(2, 4, 4), values(2, 3, 6), *_times())),
    "flux single": lambda: (Flux(0, 3), (values(2, 4, 4), values(2, 3, 6), *_times())),
    "flux": lambda: (Flux(1, 2), (values(2, 4, 4), values(2, 3, 6), *_times())),
    "u-vit": lambda: (UViT(), (values(2, 4, 4), _times()[0])),
}
