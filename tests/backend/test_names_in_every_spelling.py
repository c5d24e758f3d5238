"""The keys of a checkpoint do not depend on the way in: convert, attach, a symbolic trace, an exported program."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnres_fx as ax
from tests.support.attached import VARIANTS


def normed(x):
    return F.rms_norm(x, (8,))


class FinalFunction(nn.Module):
    """The last norm is a function of the model's own code."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x))
        last = normed(x)
        return self.head(last)


class AllFunctions(FinalFunction):
    def forward(self, x):
        for mix in self.mixes:
            y = normed(x)
            x = x + mix(y)
        out = normed(x) * 2
        return self.head(out)


class AllInTheTop(FinalFunction):
    """No module at all: parameters, and functions of the top module."""

    def __init__(self):
        nn.Module.__init__(self)
        self.weights = nn.Parameter(torch.randn(3, 8, 8) / 3)

    def forward(self, x):
        for i in range(3):
            z = normed(x)
            x = x + z @ self.weights[i]
        return normed(x)


class HeldInAList(FinalFunction):
    def __init__(self):
        super().__init__()
        self.pairs = [(self.norms[i], self.mixes[i]) for i in range(3)]

    def forward(self, x):
        for norm, mix in self.pairs:
            x = x + mix(norm(x))
        return self.head(normed(x))


class TwoStreams(FinalFunction):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x, y = self.first(x), self.second(x)
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x, y = x + mix(norm(x)), y + mix(norm(y)).tanh()
        a, b = normed(x), normed(y)
        return self.head(a) + self.head(b)


NAMES = {
    FinalFunction: ("norms.1", "norms.2", "stream.read_3"),
    AllFunctions: ("mixes.read_1", "mixes.read_2", "mixes.read_3"),
    AllInTheTop: ("stream.read_1", "stream.read_2", "stream.read_3"),
    HeldInAList: ("norms.1", "norms.2", "stream.read_3"),
    TwoStreams: ("norms.1", "norms.1#2", "norms.2", "norms.2#2", "stream.read_3", "stream#2.read_3"),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("way", ["convert", "attach", "symbolic", "export"])
def test_a_model_has_the_same_keys_whichever_way_it_comes(kind, way):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 5, 8)
    if way == "attach":
        reads = ax.attach(model, (x,), config=VARIANTS["full"]).reads
    else:
        given = {"convert": lambda: model, "symbolic": lambda: torch.fx.symbolic_trace(model)}
        given["export"] = lambda: torch.export.export(model, (x,))
        reads = ax.convert(given[way](), (x,), config=VARIANTS["full"], check=False).attnres.reads
    assert sorted(reads.names) == sorted(NAMES[kind])
