"""What Dynamo records for compilers: checkpoints, backwards, hooks, fused additions, right in every inner compiler."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnres_fx as ax
from tests.support.attached import VARIANTS


class Branch(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.mix, self.drop = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.mix(self.norm(x)).tanh())


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * gradient * x.cos()


def checkpointed(branch, x):
    return x + checkpoint(branch, x, use_reentrant=False)


def checkpointed_layer(branch, x):
    return checkpoint(lambda y: y + branch(y), x, use_reentrant=False)


def with_own_backward(branch, x):
    return x + Doubled.apply(branch(x))


def with_a_hook(branch, x):
    y = branch(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: 3 * gradient)
    return x + y


def fused(branch, x):
    return x.clone().addcmul_(branch(x), branch.norm.weight, value=0.5)


def fused_division(branch, x):
    return x.clone().addcdiv_(branch(x), branch.norm.weight + 1, value=0.5)


def fused_with_a_tensor(branch, x):
    return x.clone().add_(branch(x), alpha=0.5)


LAYERS = [
    checkpointed,
    checkpointed_layer,
    with_own_backward,
    with_a_hook,
    fused,
    fused_division,
    fused_with_a_tensor,
]


class Net(nn.Module):
    def __init__(self, layer, width=16):
        super().__init__()
        self.layer = layer
        self.inp, self.last = nn.Linear(width, width), nn.LayerNorm(width)
        self.branches = nn.ModuleList(Branch(width) for _ in range(3))

    def forward(self, x):
        x = self.inp(x)
        for branch in self.branches:
            x = self.layer(branch, x)
        return self.last(x)


def outputs_and_gradients(model, x):
    model.zero_grad()
    torch.manual_seed(5)
    found = model(x)
    (found * torch.linspace(0, 1, 16)).square().sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if "attnres" not in n}
    return {"output": found.detach(), **named}


#: AOTAutograd runs what Dynamo records as it is; the eager inner compiler needs it restored.
RUNS = [*((layer, "eager") for layer in LAYERS), (next(iter(LAYERS)), "aot_eager")]


@pytest.mark.parametrize(("layer", "inner"), RUNS)
@pytest.mark.slow_after(2)
def test_gradients_with_dropout_are_the_originals(layer, inner):
    torch.manual_seed(0)
    model, x = Net(layer).train(), torch.randn(2, 5, 16)
    expected = outputs_and_gradients(copy.deepcopy(model), x)
    ax.compile(model, (x,), config=VARIANTS["full"], inner=inner)
    assert model.attnres.reads.names == ("branches.1.norm", "branches.2.norm", "last")
    found = outputs_and_gradients(model, x)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert all(read.query.grad is not None for read in model.attnres.reads)


class Scaled(nn.Module):
    """Numbers of its modules are in checkpointed regions: an eps, a probability, a factor."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.factor = layer, 0.5
        self.branches = nn.ModuleList(Branch() for _ in range(2))

    def forward(self, x, scale=1.0):
        for branch in self.branches:
            x = self.layer(lambda y, branch=branch: self.factor * branch(y), x)
        return x * scale


@pytest.mark.parametrize("layer", [checkpointed, checkpointed_layer])
def test_numbers_of_modules_in_a_region_are_no_inputs_of_graphs_of_any_size(layer):
    torch.manual_seed(0)
    model = Scaled(layer)
    original = copy.deepcopy(model)
    ax.compile(model, (torch.randn(2, 5, 16),), inner="eager")
    for sizes in ((2, 5), (3, 4)):
        x = torch.randn(*sizes, 16)
        torch.manual_seed(1)
        expected = original(x)
        torch.manual_seed(1)
        torch.testing.assert_close(model(x), expected)
    assert len(ax.explain(model).graphs) == 1


def test_values_of_a_float_argument_need_no_graphs_of_their_own():
    torch.manual_seed(0)
    model = Scaled(lambda branch, x: x + branch(x)).eval()
    original = copy.deepcopy(model)
    x = torch.randn(2, 5, 16)
    ax.compile(model, (x,), inner="eager")
    graphs = []
    for scale in (0.5, 1.5, 2.5, 3.5):
        torch.testing.assert_close(model(x, scale=scale), original(x, scale=scale))
        graphs.append(len(ax.explain(model).graphs))
    assert graphs[1:] == graphs[1:2] * 3
