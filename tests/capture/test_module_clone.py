"""A clone of a module tree is its own: what PyTorch edits in place on it stays off the original."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import attnres_fx as ax
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.errors import EditedError


class Net(nn.Module):
    def __init__(self, wrap=parametrizations.weight_norm):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.mixes = nn.ModuleList(wrap(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x))
        return x


def test_parametrizations_removed_from_a_clone_stay_on_the_original():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 5, 8)
    expected = model(x)
    for one, other in ((model, clone_tree(model)[0]), (clone_tree(model)[0], model)):
        parametrize.register_parametrization(other.mixes[1], "bias", nn.Identity())
        assert not parametrize.is_parametrized(one.mixes[1], "bias")
        parametrize.remove_parametrizations(other.mixes[0], "weight")
        torch.testing.assert_close(other(x), expected)
        if parametrize.is_parametrized(model.mixes[0]):
            torch.testing.assert_close(one(x), expected)


def test_parametrizations_removed_from_a_converted_model_are_named_and_the_original_runs_on():
    model, x = Net(), torch.randn(2, 5, 8)
    original, expected = copy.deepcopy(model.state_dict()), model(x)
    converted = ax.convert(model, (x,))
    parametrize.remove_parametrizations(converted.mixes[0], "weight")
    torch.testing.assert_close(model(x), expected)
    assert model.state_dict().keys() == original.keys()
    with pytest.raises(EditedError, match=r"mixes\.0"):
        converted(x)


def test_a_traced_child_that_is_edited_and_compiled_anew_is_the_clone_s_alone():
    model = Net(lambda linear: torch.fx.symbolic_trace(nn.Sequential(linear, nn.Tanh())))
    x = torch.randn(2, 5, 8)
    expected = model(x)
    clone, _ = clone_tree(model)
    torch.testing.assert_close(clone(x), expected)
    clone.mixes[0].graph = copy.deepcopy(clone.mixes[0].graph)
    node = next(n for n in clone.mixes[0].graph.nodes if n.op == "output")
    node.args = (next(n for n in clone.mixes[0].graph.nodes if n.op == "placeholder"),)
    clone.mixes[0].recompile()
    torch.testing.assert_close(model(x), expected)
    assert not torch.equal(clone(x), expected)
    torch.testing.assert_close(ax.convert(model, (x,))(x), expected)
