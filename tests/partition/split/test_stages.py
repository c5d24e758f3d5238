"""Stages against the converted model they were cut from, run one after another in one process."""

import copy
import itertools
from collections import Counter

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.errors import PlanError
from attnres_fx.partition.split import chained_model, stage_graphs
from tests.support.cutting import assert_same, cut, evenly, spread
from tests.support.families import FAMILIES


@pytest.mark.parametrize("variant", ["full", "local"])
@pytest.mark.parametrize("name", ["opt", "mamba", "bert", "carry", "in place", "t5", "albert"])
@pytest.mark.slow_after(1)
def test_other_variants_too(name, variant):
    model, kwargs, _ = FAMILIES[name]()
    blocks = {} if variant == "full" else {"num_blocks": 2}
    converted = spread(ax.convert(model, kwargs=kwargs, config=ax.AttnResConfig(variant=variant, **blocks)))
    converted.eval()
    assert_same(converted, cut(converted, evenly(converted, 3)).eval(), kwargs)


def gpt(**options):
    torch.manual_seed(0)
    return SmallGPT(GPTConfig(**{"layers": 3, "heads": 2, "width": 16, "context": 16, "vocabulary": 40, **options}))


IDS = {"ids": torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("variant", ["full", "block", "local"])
@pytest.mark.slow_after(1)
def test_what_crosses_a_cut_is_what_the_schedule_says(variant):
    blocks = {} if variant == "full" else {"boundaries": (2, 5)}
    converted = ax.convert(gpt(), kwargs=IDS, config=ax.AttnResConfig(variant=variant, **blocks))
    schedule = converted.report.streams[0].schedule
    for starts in itertools.combinations(range(1, 6), 2):
        stages = cut(converted, (0, *starts))
        for i, start in enumerate(starts, start=1):
            labels = {v.label for v in stages.values if v.produced < i and any(u >= i for u in v.used)}
            later = {str(s) for s in schedule.carried(start)}
            assert labels == later, (starts, i)


def test_tied_weights_are_one_tensor_named_in_both_stages():
    converted = ax.convert(gpt(tied=True), kwargs=IDS)
    stages = cut(converted, (0, 3))
    (group,) = stages.tied
    assert [stage for stage, _ in group] == [0, 1]
    first, second = (stages[i].get_parameter(name) for i, name in group)
    assert first is second


def test_a_stage_takes_the_inputs_it_needs_and_holds_nothing_else():
    converted = ax.convert(gpt(tied=False), kwargs=IDS)
    stages = cut(converted, (0, 2, 4))
    counts = [sum(p.numel() for p in s.parameters()) for s in stages]
    assert sum(counts) == sum(p.numel() for p in converted.parameters())
    assert isinstance(stages[1], torch.fx.GraphModule)
    assert set(dict(stages[1].named_parameters())) < set(dict(converted.named_parameters()))


def test_stages_follow_other_sizes_and_both_modes():
    converted = spread(ax.convert(gpt(dropout=0.0), kwargs=IDS))
    stages = cut(converted, (0, 2, 4))
    other = {"ids": torch.randint(0, 40, (3, 5))}
    for training in (True, False):
        converted.train(training)
        stages.train(training)
        assert torch.allclose(stages.run(**other), converted(**other), atol=1e-6)
        shapes = stages.shapes(stages.flatten((), other))
        assert {s for s, _ in shapes.values()} == {(3, 5, 16)}


def test_a_symbolic_trace_is_cut_too():
    model = gpt()
    traced = torch.fx.symbolic_trace(model)
    converted = spread(ax.convert(traced, kwargs=IDS))
    stages = cut(converted, (0, 2, 4))
    assert isinstance(stages.run(**IDS), torch.Tensor)
    assert_same(converted, stages, IDS)


def test_a_value_two_later_stages_use_travels_once_to_each():
    class Shared(nn.Module):
        """Keys made by the first layer for all of them."""

        def __init__(self):
            super().__init__()
            self.keys = nn.Linear(8, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            shared = None
            for layer in self.layers:
                if shared is None:
                    shared = self.keys(x).tanh()
                x = x + (layer(x) @ shared.transpose(-1, -2)) @ shared
            return x

    x = torch.randn(2, 3, 8)
    converted = spread(ax.convert(Shared(), (x,)))
    stages = cut(converted, (0, 1, 2, 3))
    extra = [v for v in stages.values if v.label == v.name]
    assert [(v.produced, v.used) for v in extra] == [(0, (1, 2, 3))]
    assert_same(converted, stages, {"x": x})


def test_a_mask_is_built_again_and_does_not_travel():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x, keep):
            mask = keep.unsqueeze(-1) & torch.ones(x.shape[1], 1, dtype=torch.bool)
            for layer in self.layers:
                x = x + torch.where(mask, layer(x).tanh(), 0.0) @ layer.weight
            return x

    kwargs = {"x": torch.randn(2, 3, 8), "keep": torch.rand(2, 3) > 0.3}
    converted = spread(ax.convert(Masked(), kwargs=kwargs))
    stages = cut(converted, (0, 1, 2))
    assert all(v.label != v.name for v in stages.values)
    assert all(len(s.inputs) >= 1 for s in stages)
    assert_same(converted, stages, kwargs)


def test_a_copied_stage_runs_on_its_own_tensors():
    stages = cut(spread(ax.convert(gpt(), kwargs=IDS)), (0, 3))
    copied = copy.deepcopy(stages[0])
    before = stages[0](*[stages.flatten((), IDS)[i] for i in stages[0].inputs])
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    after = stages[0](*[stages.flatten((), IDS)[i] for i in stages[0].inputs])
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(float(t.abs().max()) == 0 for t in copied(*[stages.flatten((), IDS)[i] for i in copied.inputs]))


def test_a_saved_symbolic_trace_still_returns_a_tensor(tmp_path):
    converted = spread(ax.convert(torch.fx.symbolic_trace(gpt()), kwargs=IDS))
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
@pytest.mark.slow_after(1)
def test_stages_that_recompute_keep_less_and_compute_the_same(name):
    model, kwargs, _ = FAMILIES[name]()
    converted = spread(ax.convert(model, kwargs=kwargs, config=ax.AttnResConfig(num_blocks=2))).eval()
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


def test_a_stage_with_nothing_to_do_is_refused():
    class Waiting(nn.Module):
        """Two streams that read each other at every layer."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

        def forward(self, x, y):
            for a, b in zip(self.layers[:3], self.layers[3:], strict=True):
                x, y = x + a(x).tanh() * y.mean(1, keepdim=True), y + b(y).tanh() * x.mean(1, keepdim=True)
            return x, y

    kwargs = {"x": torch.randn(2, 3, 8), "y": torch.randn(2, 3, 8)}
    converted = spread(ax.convert(Waiting(), kwargs=kwargs))
    with pytest.raises(PlanError, match="would be empty"):
        cut(converted, tuple(range(6)))
    assert_same(converted, cut(converted, (0, 5)), kwargs)


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
    converted = spread(ax.convert(kind(), kwargs=kwargs))
    weight = torch.randn(2, 6, 8)
    (converted(**kwargs) * weight).sum().backward()
    wanted = {n: p.grad.clone() for n, p in converted.named_parameters() if p.grad is not None}
    converted.zero_grad()
    found = gradients_over_hops(cut(converted, (0, 1, 2)), kwargs, lambda y: (y * weight).sum())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("traced", "graphs"), [(False, 2), (True, 1)])
def test_each_graph_is_exported_ordered_and_cut_once(monkeypatch, traced, graphs, recompute):
    model = torch.fx.symbolic_trace(gpt()) if traced else gpt()
    plan = ax.plan(model, kwargs=IDS, num_stages=2, config=ax.AttnResConfig(num_blocks=2), recompute=recompute)
    calls = Counter()

    def count(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.update([name]) or original(*a, **k))

    for name in ("chain_graph", "split_chain", "export_flat"):
        count(chained_model, name)
    count(stage_graphs, "split_chain")  # by sublayer
    ax.build_stages(model, plan, check=False)
    assert calls["chain_graph"] == graphs
    assert calls["split_chain"] == graphs * (1 + recompute)
    assert calls["export_flat"] == int(traced)
