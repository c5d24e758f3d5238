"""Vision models."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.public_models.parts import WIDTH, Attention, Example, FeedForward, Layer, values


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DINOBlock(nn.Module):
    """LayerScale on both branches; in training a branch is computed for a part of the batch and added there alone."""

    def __init__(self, kept: float) -> None:
        super().__init__()
        self.kept = kept
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.feed = Attention(), FeedForward()
        self.scale1, self.scale2 = LayerScale(), LayerScale()

    def add(self, x: Tensor, norm: nn.Module, branch: nn.Module, scale: nn.Module) -> Tensor:
        if not self.training:
            return x + scale(branch(norm(x)))
        batch = x.shape[0]
        count = max(int(batch * self.kept), 1)
        chosen = torch.randperm(batch, device=x.device)[:count]
        y = scale(branch(norm(x[chosen])))
        return torch.index_add(x.flatten(1), 0, chosen, y.flatten(1), alpha=batch / count).view_as(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, self.norm1, self.attention, self.scale1)
        return self.add(x, self.norm2, self.feed, self.scale2)


class DINOv2(nn.Module):
    """A class token, positions, register tokens put in between after them, blocks, one norm for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, WIDTH, 2, 2), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.registers = nn.Parameter(torch.zeros(1, 2, WIDTH))
        self.blocks = nn.ModuleList(DINOBlock(0.5) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(2 * WIDTH, 3)

    def forward(self, image: Tensor) -> Tensor:
        batch = image.shape[0]
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(batch, -1, -1), x], 1) + self.positions
        x = torch.cat([x[:, :1], self.registers.expand(batch, -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(torch.cat([x[:, 0], x[:, 3:].mean(1)], -1))


class SwinBlock(nn.Module):
    """Attention inside windows, of the image rolled by half a window in every second block."""

    def __init__(self, width: int, size: int, shift: int) -> None:
        super().__init__()
        self.size, self.shift, self.window = size, shift, 2
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed = Attention(width), FeedForward(width)
        self.bias = nn.Parameter(torch.zeros(1, 1, 4, 4))

    def windows(self, x: Tensor) -> Tensor:
        batch, n, w = x.shape[0], self.size // self.window, self.window
        return x.view(batch, n, w, n, w, -1).permute(0, 1, 3, 2, 4, 5).reshape(batch * n * n, w * w, -1)

    def image(self, x: Tensor, batch: int) -> Tensor:
        n, w = self.size // self.window, self.window
        return x.view(batch, n, n, w, w, -1).permute(0, 1, 3, 2, 4, 5).reshape(batch, self.size, self.size, -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        skip = x
        x = self.norm1(x).view(batch, self.size, self.size, width)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = self.image(self.attention(self.windows(x), bias=self.bias), batch)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        x = skip + x.view(batch, tokens, width)
        return x + self.feed(self.norm2(x))


class Merging(nn.Module):
    """Four neighbours side by side in one token of twice the width."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size, self.norm, self.reduce = size, nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.shape[0], self.size, self.size, -1)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduce(self.norm(x.flatten(1, 2)))


class Swin(nn.Module):
    """Two stages of two blocks; the width doubles between them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm0 = nn.Conv2d(3, WIDTH, 2, 2), nn.LayerNorm(WIDTH)
        self.stage1 = nn.ModuleList(SwinBlock(WIDTH, 4, shift) for shift in (0, 1))
        self.merging = Merging(WIDTH, 4)
        self.stage2 = nn.ModuleList(SwinBlock(2 * WIDTH, 2, shift) for shift in (0, 1))
        self.norm, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm0(self.patch(image).flatten(2).transpose(1, 2))
        for block in self.stage1:
            x = block(x)
        x = self.merging(x)
        for block in self.stage2:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class ChannelNorm(nn.Module):
    """A layer norm over dimension 1 of `[B, C, H, W]`, written out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * scaled + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """The state goes into a depthwise convolution as it is; norm and MLP run with the channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.feed, self.gamma = FeedForward(width), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma * self.feed(self.norm(self.spread(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Two stages of two blocks over `[B, C, H, W]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, WIDTH, 2, 2), ChannelNorm(WIDTH)
        self.stage1 = nn.ModuleList(ConvNeXtBlock(WIDTH) for _ in range(2))
        self.down_norm, self.down = ChannelNorm(WIDTH), nn.Conv2d(WIDTH, 2 * WIDTH, 2, 2)
        self.stage2 = nn.ModuleList(ConvNeXtBlock(2 * WIDTH) for _ in range(2))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * WIDTH, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(image))
        for block in self.stage1:
            x = block(x)
        x = self.down(self.down_norm(x))
        for block in self.stage2:
            x = block(x)
        return self.head(self.pool(x).flatten(1))


class MBConv(nn.Module):
    """Norm, expansion, depthwise convolution, squeeze and excitation, projection; the first of a stage shrinks."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        inner = 2 * width
        self.norm, self.up = nn.BatchNorm2d(width), nn.Conv2d(width, inner, 1)
        self.spread = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner)
        self.squeeze, self.down = nn.Conv2d(inner, inner, 1), nn.Conv2d(inner, width, 1)
        self.shortcut = nn.Sequential(nn.MaxPool2d(2, 2), nn.Conv2d(width, width, 1)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.spread(F.gelu(self.up(self.norm(x)))))
        y = y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
        return (x if self.shortcut is None else self.shortcut(x)) + self.down(y)


class CoAtNet(nn.Module):
    """A stage of convolutions over `[B, C, H, W]`, then a stage of attention over `[B, N, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.convolutions = nn.ModuleList(MBConv(WIDTH, stride) for stride in (2, 1, 1))
        self.down = nn.Conv2d(WIDTH, 2 * WIDTH, 2, 2)
        self.layers = nn.ModuleList(Layer(2 * WIDTH) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.convolutions:
            x = block(x)
        x = self.down(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


EXAMPLES: dict[str, Example] = {
    "dinov2": lambda: (DINOv2(), (values(4, 3, 4, 4),)),
    "swin": lambda: (Swin(), (values(2, 3, 8, 8),)),
    "convnext": lambda: (ConvNeXt(), (values(2, 3, 12, 12),)),
    "coatnet": lambda: (CoAtNet(), (values(2, 3, 12, 12),)),
}
