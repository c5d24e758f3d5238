"""A vision transformer written as timm writes them, with AttnRes: `python examples/convert_vision_transformer.py`.

Patches and a class token, pre-norm blocks with layer scale, stochastic depth in training. With timm installed, replace
VisionTransformer by `timm.create_model("vit_tiny_patch16_224")`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnres_fx as ax


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Leaves a branch out of some rows in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.empty(x.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class Attention(nn.Module):
    """Self-attention over all patches."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm block of two branches."""

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), Attention(width, heads), LayerScale(width)
        self.norm2, self.ls2 = nn.LayerNorm(width), LayerScale(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop_path1, self.drop_path2 = DropPath(rate), DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Images [batch, 3, 32, 32] to logits [batch, classes]."""

    def __init__(self, width: int = 32, layers: int = 3, heads: int = 2, classes: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, 8)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, heads, 0.1 * i / layers) for i in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(images.shape[0], -1, -1), patches], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


torch.manual_seed(0)
model = VisionTransformer().eval()
images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 4, (8,))
converted = ax.convert(model, (images,), config=ax.AttnResConfig(variant="block", num_blocks=3))
print(converted.report)
print(converted.report.reads_table())
print(ax.verify(model, converted, (images,)))
optimizer = torch.optim.AdamW(ax.parameter_groups(converted), lr=1e-3)
converted.train()
for step in range(5):
    loss = F.cross_entropy(converted(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.4f}")
