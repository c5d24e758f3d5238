"""Stages against the converted model they were cut from, run one after another in one process."""

import itertools
from collections import Counter

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import PlanError
from attnres_fx.partition.split import chained_model, stage_graphs
from tests.support.cutting import assert_same, cut, evenly, spread
from tests.support.families import FAMILIES
from tests.support.small_stages import IDS, ZEROS, branches, gpt


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("in place", "full"),
        ("in place", "local"),
        ("carry", "full"),
        ("carry", "local"),
        ("opt", "full"),
        ("bert", "local"),
        ("mamba", "local"),
        ("t5", "full"),
        ("t5", "local"),
        ("albert", "local"),
    ],
)
@pytest.mark.slow_after(1)
def test_other_variants_too(name, variant):
    model, kwargs, _ = FAMILIES[name]()
    blocks = {} if variant == "full" else {"num_blocks": 2}
    config = ax.AttnResConfig(variant=variant, **blocks)
    converted = spread(ax.convert(model, kwargs=kwargs, config=config, dynamic_shapes={}, check=False)).eval()
    assert_same(converted, cut(converted, evenly(converted, 3)).eval(), kwargs)


@pytest.mark.parametrize("variant", ["full", "block", "local"])
@pytest.mark.slow_after(1)
def test_what_crosses_a_cut_is_what_the_schedule_says(variant):
    blocks = {} if variant == "full" else {"boundaries": (2, 5)}
    config = ax.AttnResConfig(variant=variant, **blocks)
    converted = ax.convert(branches(6), kwargs=ZEROS, config=config, check=False)
    schedule = converted.report.streams[0].schedule
    for starts in itertools.combinations(range(1, 6), 2):
        stages = cut(converted, (0, *starts))
        for i, start in enumerate(starts, start=1):
            labels = {v.label for v in stages.values if v.produced < i and any(u >= i for u in v.used)}
            later = {str(s) for s in schedule.carried(start)}
            assert labels == later, (starts, i)


def test_tied_weights_are_one_tensor_named_in_both_stages():
    converted = ax.convert(gpt(layers=2, tied=True), kwargs=IDS, check=False)
    stages = cut(converted, (0, 2))
    (group,) = stages.tied
    assert [stage for stage, _ in group] == [0, 1]
    first, second = (stages[i].get_parameter(name) for i, name in group)
    assert first is second


def test_a_stage_takes_the_inputs_it_needs_and_holds_nothing_else():
    converted = ax.convert(gpt(layers=2, tied=False), kwargs=IDS, check=False)
    stages = cut(converted, (0, 1, 3))
    counts = [sum(p.numel() for p in s.parameters()) for s in stages]
    assert sum(counts) == sum(p.numel() for p in converted.parameters())
    assert isinstance(stages[1], torch.fx.GraphModule)
    assert set(dict(stages[1].named_parameters())) < set(dict(converted.named_parameters()))


def test_stages_follow_other_sizes_and_both_modes():
    converted = spread(ax.convert(gpt(layers=2, dropout=0.0), kwargs=IDS, check=False))
    stages = cut(converted, (0, 1, 3), modes=("train", "eval"))
    other = {"ids": torch.randint(0, 40, (3, 5))}
    for training in (True, False):
        converted.train(training)
        stages.train(training)
        assert torch.allclose(stages.run(**other), converted(**other), atol=1e-6)
        shapes = stages.shapes(stages.flatten((), other))
        assert {s for s, _ in shapes.values()} == {(3, 5, 16)}


def test_a_symbolic_trace_is_cut_too():
    traced = torch.fx.symbolic_trace(gpt(layers=2))
    converted = spread(ax.convert(traced, kwargs=IDS, check=False))
    stages = cut(converted, (0, 1, 3))
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
    converted = spread(ax.convert(Shared(), (x,), check=False))
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
    converted = spread(ax.convert(Masked(), kwargs=kwargs, check=False))
    stages = cut(converted, (0, 1, 2))
    assert all(v.label != v.name for v in stages.values)
    assert all(len(s.inputs) >= 1 for s in stages)
    assert_same(converted, stages, kwargs)


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
    converted = spread(ax.convert(Waiting(), kwargs=kwargs, check=False))
    with pytest.raises(PlanError, match="would be empty"):
        cut(converted, tuple(range(6)))
    assert_same(converted, cut(converted, (0, 5)), kwargs)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("traced", "graphs"), [(False, 2), (True, 1)])
@pytest.mark.slow
def test_each_graph_is_exported_ordered_and_cut_once(monkeypatch, traced, graphs, recompute):
    model = torch.fx.symbolic_trace(branches()) if traced else branches()
    plan = ax.plan(model, kwargs=ZEROS, num_stages=2, config=ax.AttnResConfig(num_blocks=2), recompute=recompute)
    calls = Counter()

    def count(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.update([name]) or original(*a, **k))

    for name in ("chain_graph", "split_chain", "flat_aten"):
        count(chained_model, name)
    count(stage_graphs, "split_chain")  # by sublayer
    ax.build_stages(model, plan, check=False)
    assert calls["chain_graph"] == graphs
    assert calls["split_chain"] == graphs * (1 + recompute)
    assert calls["flat_aten"] == graphs
