"""A stage as a module: copies, buffers, recomputation, devices, gradients over hops."""

import copy

import pytest
import torch
from torch import nn

import attnres_fx as ax
from tests.support.cutting import assert_same, cut, evenly, spread
from tests.support.families import FAMILIES
from tests.support.small_stages import IDS, gpt


@pytest.mark.slow
def test_a_copied_stage_runs_on_its_own_tensors():
    stages = cut(spread(ax.convert(gpt(layers=2), kwargs=IDS, check=False)), (0, 2))
    copied = copy.deepcopy(stages[0])
    before = stages[0](*[stages.flatten((), IDS)[i] for i in stages[0].inputs])
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    after = stages[0](*[stages.flatten((), IDS)[i] for i in stages[0].inputs])
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(float(t.abs().max()) == 0 for t in copied(*[stages.flatten((), IDS)[i] for i in copied.inputs]))


def test_a_saved_symbolic_trace_still_returns_a_tensor(tmp_path):
    converted = spread(ax.convert(torch.fx.symbolic_trace(gpt(layers=2)), kwargs=IDS, check=False))
    converted.save(tmp_path / "model.pt")
    found = ax.load(tmp_path / "model.pt")(**IDS)
    assert isinstance(found, torch.Tensor)
    assert torch.allclose(found, converted(**IDS), atol=1e-6)


def test_a_stage_without_its_unsaved_buffers_gives_no_numbers():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.register_buffer("table", torch.rand(8), persistent=False)

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x * self.table).tanh() @ layer.weight
            return x

    real = Scaled()
    with torch.device("meta"):
        model, x = Scaled(), torch.randn(2, 3, 8)
    stages = cut(ax.convert(model, (x,)), (0, 1))
    for stage in stages:
        with pytest.warns(UserWarning, match="table"):
            stage.to_empty(device="cpu")
        stage.load_state_dict(real.state_dict(), strict=False)
        for name, parameter in stage.named_parameters():
            if name.startswith("attnres."):
                parameter.data.zero_() if name.endswith("query") else parameter.data.fill_(1.0)
    x = torch.randn(2, 3, 8)
    assert stages.run(x).isnan().all()
    for stage in stages:
        stage.table.copy_(real.table)
    assert torch.allclose(stages.run(x), real(x), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "t5", "opt"])
@pytest.mark.slow
def test_stages_that_recompute_keep_less_and_compute_the_same(name):
    model, kwargs, _ = FAMILIES[name]()
    config = ax.AttnResConfig(num_blocks=2)
    converted = spread(ax.convert(model, kwargs=kwargs, config=config, dynamic_shapes={}, check=False)).eval()
    plain, again = (cut(converted, evenly(converted, 2), recompute=r).eval() for r in (False, True))
    assert all(s.programs[s.mode].parts for s in again)
    assert_same(converted, again, kwargs)
    kept = []
    for stages in (plain, again):
        sizes = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.__setitem__(t.untyped_storage().data_ptr(), t.nbytes) or t, lambda t: t
        )
        with hooks:
            stages.run(**kwargs)
        parameters = {p.untyped_storage().data_ptr() for p in converted.parameters()}
        kept.append(sum(size for at, size in sizes.items() if at not in parameters))
    assert kept[1] < kept[0] / 2


def test_what_was_captured_on_meta_runs_where_it_is_moved():
    class Positions(nn.Module):
        """Makes tensors on the device of its input, as rotary tables and masks are."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            where = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
            for layer in self.layers:
                x = x + layer(x * where.unsqueeze(-1)).tanh()
            return x

    real = Positions()
    with torch.device("meta"):
        model, example = Positions(), torch.randn(2, 3, 8)
    converted = ax.convert(model, (example,))
    stages = cut(converted, (0, 1))
    x = torch.randn(2, 4, 8)
    for module in (*stages, converted):
        module.to_empty(device="cpu")
        module.load_state_dict(real.state_dict(), strict=False)
        for name, parameter in module.named_parameters():
            if name.startswith("attnres."):
                parameter.data.zero_() if name.endswith("query") else parameter.data.fill_(1.0)
    assert torch.allclose(stages.run(x), real(x), atol=1e-5)
    assert torch.allclose(converted(x), real(x), atol=1e-5)


def detached(stages, kwargs):
    """Outputs with every value that travels cut off from the graph, its gradient carried by hand, as ranks do."""
    leaves, roots, held = stages.flatten((), kwargs), {}, {}
    kinds = {v.name: v.differentiable for v in stages.values}
    outputs = ()
    for stage in stages:
        taken = [held[n] for n in stage.route.takes]
        outputs = stage(*taken, *(leaves[i] for i in stage.inputs))
        for name, value in zip(stage.route.produced, outputs, strict=False):
            roots[name], held[name] = value, value.detach().clone().requires_grad_(kinds[name])
    return stages.unflatten(outputs), roots, held


def gradients_over_hops(stages, kwargs, loss):
    """Gradients of all parameters, by name, with nothing flowing between stages but what is said to."""
    output, roots, held = detached(stages, kwargs)
    loss(output).backward()
    for name in reversed(roots):
        if held[name].requires_grad and held[name].grad is not None and roots[name].requires_grad:
            roots[name].backward(held[name].grad, retain_graph=True)
    return {n: p.grad for s in stages for n, p in s.named_parameters() if p.grad is not None}


class Spectral(nn.Module):
    """Gradients that flow through complex numbers alone."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.weights = nn.ParameterList(torch.randn(5) for _ in range(3))

    def forward(self, x):
        for norm, weight in zip(self.norms, self.weights, strict=True):
            x = x + torch.fft.irfft(torch.fft.rfft(norm(x)) * weight, n=8)
        return x


class Filled(nn.Module):
    """A table that the first layer's stage fills in place and every layer reads."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 8))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        table = torch.zeros(6, 8)
        table[:3] += self.table
        table[3:] -= self.table.tanh()
        for layer in self.layers:
            x = x + (layer(x) + table).tanh() @ layer.weight
        return x


class Assembled(nn.Module):
    """A branch that is written piece by piece."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            branch = torch.zeros(2, 6, 8)
            branch[..., :4] = layer(x).tanh()
            branch[..., 4:] = layer(x.flip(-1))
            x = x + branch
        return x


@pytest.mark.parametrize("kind", [Spectral, Filled, Assembled])
def test_every_gradient_crosses_where_its_value_did(kind):
    torch.manual_seed(0)
    kwargs = {"x": torch.randn(2, 6, 8)}
    converted = spread(ax.convert(kind(), kwargs=kwargs, check=False))
    weight = torch.randn(2, 6, 8)
    (converted(**kwargs) * weight).sum().backward()
    wanted = {n: p.grad.clone() for n, p in converted.named_parameters() if p.grad is not None}
    converted.zero_grad()
    found = gradients_over_hops(cut(converted, (0, 1, 2)), kwargs, lambda y: (y * weight).sum())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-4, rtol=1e-4), name
