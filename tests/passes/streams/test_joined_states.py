"""A state that is set aside and joins its stream later: sources as defined, or a refusal that says what to do."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import RewriteError
from attnres_fx.ops import depth_attention

WIDTH = 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.last = nn.LayerNorm(WIDTH)

    def step(self, i, h):
        return h + self.mixes[i](self.norms[i](h))


class JoinsAtTheEnd(Net):
    def forward(self, x):
        h = self.step(0, x)
        y = h + x
        for i in (1, 2, 3):
            h = self.step(i, h)
        return self.last(h + y)


class JoinsInTheMiddle(Net):
    def forward(self, x):
        h = self.step(0, x)
        y = h - 0.5 * x
        h = self.step(2, self.step(1, h) + y)
        return self.last(self.step(3, h))


class BothAreRead(Net):
    def forward(self, x):
        h = self.step(0, x)
        one, two = self.step(1, h), self.step(2, h)
        return self.last(self.step(3, one) + self.mixes[3](self.norms[3](two)) + two)


def converted(kind, **config):
    torch.manual_seed(0)
    return ax.convert(kind(), (torch.randn(2, 5, WIDTH),), config=ax.AttnResConfig(**config))


def parameters(model, name):
    read = model.attnres.reads[name]
    return read.query, read.key_weight


@pytest.mark.parametrize("variant", ["full", "block"])
@pytest.mark.parametrize("kind", [JoinsAtTheEnd, JoinsInTheMiddle, BothAreRead])
def test_at_zero_queries_it_computes_what_the_model_computes(kind, variant):
    model = converted(kind, variant=variant)  # compares outputs and gradients with the original
    assert {"norms.1", "norms.3", "last"} <= set(model.attnres.reads.names)


def test_the_terms_of_a_state_that_joins_late_are_sources_of_what_comes_after_it():
    model = converted(JoinsAtTheEnd, variant="full")
    for read in model.attnres.reads:
        nn.init.normal_(read.query)
    x = torch.randn(2, 5, WIDTH)
    branches = [model.mixes[0](model.norms[0](x))]
    eps = model.report.config.eps
    for i in (1, 2, 3):
        seen = [x, *branches]
        read = depth_attention(seen, *parameters(model, f"norms.{i}"), eps=eps, gain=float(len(seen)))
        branches.append(model.mixes[i](model.norms[i](read)))
    a, b, c, d = branches
    seen = [2 * x, 2 * a, b, c, d + x]  # both states begin with x and a; y's own term comes with the last sublayer
    expected = depth_attention(seen, *parameters(model, "last"), eps=eps, gain=float(len(seen)))
    torch.testing.assert_close(model(x), model.last(expected))


def test_local_says_that_a_summary_cannot_be_joined():
    with pytest.raises(RewriteError, match=r"set aside joins it again before 'last'.*variant 'block' or 'full'"):
        converted(JoinsAtTheEnd, variant="local", block_size=2)
