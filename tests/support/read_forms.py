"""Reads in every form that a config can ask for, in float64 and written another way, and a small decoder to convert."""

import torch
import torch.nn.functional as F
from torch import nn

from attnres_fx import AttnResConfig

WIDTH = 8
IDS = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))

#: The options of a form; those of mode "mean" cannot start as the original does.
FORMS = {
    "all of it": {
        "query": "input",
        "heads": 4,
        "source_bias": True,
        "value_norm": True,
        "key_norm": False,
        "scale": 0.5,
        "window": 2,
        "weights": "sigmoid",
        "output": "mean",
    },
    "input query": {"query": "input"},
    "heads": {"heads": 4},
    "source bias": {"source_bias": True},
    "value norm": {"value_norm": True, "output": "mean"},
    "no key norm": {"key_norm": False},
    "scale": {"scale": 0.3},
    "window": {"window": 1, "output": "mean"},
    "window without the root": {"window": 2, "window_keeps_root": False, "output": "mean"},
    "sigmoid": {"weights": "sigmoid"},
    "static": {"weights": "static"},
}


def form(name, **blocks):
    """A config of a form; blocks of two sublayers by default."""
    return AttnResConfig(**{**(blocks or {"block_size": 2}), **FORMS[name]})


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def attention(self, h):
        q, k, v = self.qkv(self.norms[0](h)).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-2, -3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(-2, -3).flatten(-2))

    def mlp(self, h):
        x = self.norms[1](h)
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def forward(self, h):
        h = h + self.attention(h)
        return h + self.mlp(h)


class Decoder(nn.Module):
    """A decoder as Llama's: RMSNorm before causal attention and before a gated MLP."""

    def __init__(self, layers=2):
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, 20, bias=False)

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))


def decoder(layers=2):
    torch.manual_seed(0)
    return Decoder(layers).double()


def randomized(model, seed=0):
    """Random values for all that a conversion adds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.attnres.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.4)
    return model


def weights_by_hand(sources, config, read):
    """[S, ..., H], from sources that are stacked."""
    values = torch.stack(sources)
    if config.weights == "static":
        powers = read.bias.exp()
        return (powers / powers.sum()).reshape(-1, *[1] * (values.dim() - 1)).expand(*values.shape[:-1], 1)
    normed = F.rms_norm(values, (values.shape[-1],), None, config.eps)
    keys = (normed if config.key_norm else values) * read.key_weight
    query = torch.einsum("...e,de->...d", normed[-1], read.query) if config.query == "input" else read.query
    products = (keys * query).reshape(*values.shape[:-1], config.heads, -1).sum(-1)
    bias = read.bias if config.source_bias else torch.zeros(len(sources), dtype=values.dtype)
    logits = torch.einsum("s...->...s", products) * config.scale + bias
    powers = logits.exp()
    weights = powers / (1 + powers) if config.weights == "sigmoid" else powers / powers.sum(-1, keepdim=True)
    return weights.movedim(-1, 0)


def read_by_hand(sources, config, read, gain):
    values = torch.stack(sources)
    weights = weights_by_hand(sources, config, read)
    if config.value_norm:
        values = F.rms_norm(values, (values.shape[-1],), None, config.eps)
    by_head = values.reshape(*values.shape[:-1], weights.shape[-1], -1)
    return gain * torch.einsum("s...h,s...hd->...hd", weights, by_head).reshape(values.shape[1:])


def seen_by_hand(root, finished, current, config):
    """What a read sees of the root, the finished blocks and the current sum."""
    sources = [root, *finished, *current]
    if config.window is None:
        return sources
    newest = sources[-config.window :]
    return newest if len(newest) == len(sources) or not config.window_keeps_root else [root, *newest]


def by_hand(model, reads, config, *, looked_at=None):
    """The paper's forward on a decoder's own submodules, in blocks of `config.block_size`."""
    sublayers = [f for layer in model.layers for f in (layer.attention, layer.mlp)]
    reads = iter(reads)
    root = state = model.embed(IDS)
    finished, current = [], []
    for i, sublayer in enumerate(sublayers):
        current.append(sublayer(state))
        ends = len(current) == config.block_size or i + 1 == len(sublayers)
        if ends:
            finished, current = [*finished, sum(current)], []
        sources = seen_by_hand(root, finished, [sum(current)] if current else [], config)
        gain = 1.0 if config.output == "mean" else 2.0 if config.weights == "sigmoid" else len(sources)
        read = next(reads)
        if looked_at is not None:
            looked_at.append(weights_by_hand(sources, config, read))
        state = read_by_hand(sources, config, read, gain)
    return model.head(model.norm(state))
