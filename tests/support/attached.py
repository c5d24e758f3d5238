"""Models that are compiled by the backend: attached with random queries, compared with what convert makes of them."""

import torch
from torch import nn
from torch.utils import _pytree as pytree

import attnres_fx as ax
from tests.support.families import FAMILIES, GPT, GROUPED, IDS, PAIR, SMALL, T5, TEXT, family, widened

VARIANTS = {
    "full": ax.AttnResConfig(variant="full"),
    "block": ax.AttnResConfig(variant="block", num_blocks=2),
    "local": ax.AttnResConfig(variant="local", num_blocks=2),
}


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, ids):
        h = self.embed(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = norm(h + layer(h))
        return h


#: One layer is as much as a slow compiler, or a question about a model's Python, needs to see.
MODELS = {
    **FAMILIES,
    "post-norm net": lambda: (widened(PostNorm()), {"ids": IDS}, 2),
    "llama, one layer": lambda: family("llama", TEXT, 2, **{**GROUPED, "num_hidden_layers": 1}),
    "bert, one layer": lambda: family("bert", TEXT, 2, "AutoModel", **{**SMALL, "num_hidden_layers": 1}),
    "gpt2, one layer": lambda: family("gpt2", TEXT, 2, **{**GPT, "n_layer": 1}),
    "t5, one layer": lambda: family("t5", PAIR, 5, "AutoModelForSeq2SeqLM", **{**T5, "num_layers": 1}),
}


def built(name="llama"):
    torch.manual_seed(0)
    model, kwargs, _ = MODELS[name]()
    return model, kwargs


def with_random_queries(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_(generator=generator)
            read.key_weight.add_(torch.randn(read.key_weight.shape, generator=generator), alpha=0.1)
            if read.gate is not None:
                read.gate.fill_(0.7)
    return model


def attached_net(seed=0, config=VARIANTS["full"], inner="eager", **options):
    """A compiled net with random queries and an input, where the question is not about a model's own code."""
    torch.manual_seed(0)
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.compile(model, (x,), config=config, inner=inner, **options)
    return with_random_queries(model, seed), x


def attached(name="llama", *, inner="eager", seed=0, config=VARIANTS["block"], **options):
    model, kwargs = built(name)
    ax.compile(model, kwargs=kwargs, config=config, inner=inner, **options)
    return with_random_queries(model, seed), kwargs


def outputs_and_gradients(model, kwargs):
    leaves = [x for x in pytree.tree_leaves(model(**kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    total = torch.zeros((), dtype=leaves[0].dtype)
    for i, leaf in enumerate(leaves):
        if leaf.requires_grad:
            total = total + (leaf * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i)).to(leaf)).sum()
    model.zero_grad()
    total.backward()
    return leaves, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model, converted, kwargs, tolerance=1e-5):
    expected, wanted = outputs_and_gradients(converted, kwargs)
    bound = converted.signature.bound_values
    found, gradients = outputs_and_gradients(model, {**bound, **kwargs})
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= tolerance * y.abs().max()
    largest = max(g.abs().max() for g in wanted.values())
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).abs().max() <= tolerance * max(gradient.abs().max(), 1e-3 * largest), name


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.breaks = False

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
            if self.breaks:
                torch._dynamo.graph_break()
        return self.norms[-1](x)
