"""Small converted models, saved and loaded, and the comparison of their steps."""

import io

import torch
from torch import nn
from torch.utils import _pytree as pytree

import attnres_fx as ax


class Tower(nn.Module):
    """Residual layers whose branch is `self.branch(i, h)`."""

    def __init__(self, width=8, layers=3):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))
        self.mixes = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def branch(self, i, h):
        return self.mixes[i](h)

    def forward(self, x):
        for i, norm in enumerate(self.norms[:-1]):
            x = x + self.branch(i, norm(x))
        return self.norms[-1](x)


def saved(model):
    file = io.BytesIO()
    model.save(file)
    return file.getvalue()


def loaded(model, **options):
    return ax.load(io.BytesIO(saved(model)), **options)


def converted(model, *args, **kwargs):
    torch.manual_seed(0)
    made = ax.convert(model, args, kwargs, check=False)
    with torch.no_grad():
        for read in made.attnres.reads:
            read.query.normal_()
    return made


def step(model, args, kwargs, seed):
    """Outputs, gradients and buffers of one call from one random state; an error that it raises, by its type."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    try:
        outputs = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        floating = [t for t in outputs if t.is_floating_point() and t.requires_grad]
        if floating:
            sum(t.square().sum() for t in floating).backward()
    except RuntimeError as error:
        return type(error), {}, {}
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return [t.detach() for t in outputs], gradients, {n: b.clone() for n, b in model.named_buffers()}


def assert_same_steps(one, other, calls):
    assert set(one.every_program()) == set(other.every_program())
    for mode in one.every_program():
        for seed, (args, kwargs) in enumerate(calls):
            expected = step(one.train(mode == "train"), args, kwargs, seed)
            found = step(other.train(mode == "train"), args, kwargs, seed)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
