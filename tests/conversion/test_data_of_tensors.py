"""`tensor.data` assigned or written in forward, and tensors that are reached another way than by their module."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import CaptureError, CheckError
from tests.support.ways_in import check_same

WIDTH = 8


def a_parameter_gets_other_data(m, x):
    x = m.inp(x)
    for i in range(2):
        weight = m.mixes[i].weight
        weight.data = F.normalize(weight.data, dim=1)
        x = x + m.branch(i, x)
    return m.norms[-1](x)


def a_parameter_is_clamped_behind_its_gradient(m, x):
    m.mixes[0].weight.data.clamp_(-0.1, 0.1)
    x = m.inp(x)
    for i in range(2):
        x = x + m.branch(i, x)
    return m.norms[-1](x)


def a_buffer_gets_data_of_another_size(m, x):
    m.table.data = torch.cat([m.table, x.detach().mean((0, 1))[None]])
    x = m.inp(x)
    for i in range(2):
        x = x + m.branch(i, x) + m.table.mean(0)
    return m.norms[-1](x)


PROGRAMS = [
    a_parameter_gets_other_data,
    a_parameter_is_clamped_behind_its_gradient,
    a_buffer_gets_data_of_another_size,
]


@pytest.mark.parametrize("way", ["module", "backend"])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_data_is_written_at_every_call(program, way):
    check_same(program, way)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def branch(self, i, x):
        return F.linear(self.norms[i](x), self.weight(i)).tanh()

    def weight(self, i):
        return self.mixes[i].weight

    def forward(self, x):
        for i in range(2):
            x = x + self.branch(i, x)
        return x


class Helper:
    def __init__(self, model):
        self.model = model

    def branch(self, i, x):
        return self.model.mixes[i](self.model.norms[i](x)).tanh()


class InList(Net):
    def __init__(self):
        super().__init__()
        self.also = [m.weight for m in self.mixes]

    def weight(self, i):
        return self.also[i]


class InObject(Net):
    def __init__(self):
        super().__init__()
        self.also = types.SimpleNamespace(weights=[m.weight for m in self.mixes])

    def weight(self, i):
        return self.also.weights[i]


class InClosure(Net):
    def __init__(self):
        super().__init__()
        weights = [m.weight for m in self.mixes]
        self.weight = lambda i: weights[i]


class InHelper(Net):
    def __init__(self):
        super().__init__()
        self.helper = Helper(self)

    def branch(self, i, x):
        return self.helper.branch(i, x)


class OtherDataInList(InList):
    def forward(self, x):
        self.also[0].data = self.also[0].data * 0.9
        return super().forward(x)


@pytest.mark.parametrize("kind", [InList, InObject, InClosure, InHelper, OtherDataInList])
def test_a_weight_reached_another_way_is_compared_on_copies(kind):
    model, x = kind(), torch.randn(2, 3, WIDTH)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    converted = ax.convert(model, (x,))
    assert [r.name for r in converted.attnres.reads] == ["norms.1", "output"]
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name
    converted(x).sum().backward()
    assert all(m.weight.grad.any() for m in model.mixes)


def test_a_helper_of_a_converted_model_has_the_converted_model():
    model = InHelper()
    converted = ax.convert(model, (torch.randn(2, 3, WIDTH),), check=False)
    assert converted.helper.model is converted
    assert model.helper.model is model


def test_data_of_what_forward_made_is_refused_by_its_line():
    class Hidden(Net):
        def branch(self, i, x):
            y = super().branch(i, x)
            y.data = y.data * 0.5
            return y

    with pytest.raises(CaptureError, match=r"\.data.*test_data_of_tensors.py:\d+: y.data = y.data \* 0.5"):
        ax.convert(Hidden(), (torch.randn(2, 3, WIDTH),), check=False)


def test_a_graph_that_raises_where_the_original_runs_is_refused_by_what_it_raises(monkeypatch):
    def raises(*_):
        raise RuntimeError("a leaf is written to.")

    monkeypatch.setattr("attnres_fx.conversion.paired.run_program", raises)
    with pytest.raises(CheckError, match=r"graph of Net raises RuntimeError in train.*: a leaf is written to\. Use"):
        ax.convert(Net(), (torch.randn(2, 3, WIDTH),))
