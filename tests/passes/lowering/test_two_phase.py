"""Reads of one block in two phases: exact, chosen by byte counts, and only where there is a block."""

import functools
import logging

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.passes import BlockReads, Lowering, choose_phases, plan_phases, two_phase_pass
from attnres_fx.passes.lowering.block_cost import cost_read_by_read, cost_two_phase
from tests.support.families import FAMILIES, TEXT, widened
from tests.support.lowered import MODELS, assert_same, count, exported, run_both, with_queries

IDS = TEXT["input_ids"]
#: Two phases and nothing else, against the reads as they were put in.
PHASES = Lowering(fuse_norms=False, fuse_partial_sums=False, two_phase=True)
LAYOUTS = {
    "two blocks": ax.AttnResConfig(num_blocks=2),
    "three blocks": ax.AttnResConfig(num_blocks=3),
    "pairs": ax.AttnResConfig(block_size=2),
    "blocks of five": ax.AttnResConfig(block_size=5),
    "boundaries": ax.AttnResConfig(boundaries=(1, 4, 5)),
    "one block": ax.AttnResConfig(num_blocks=1),
    "mean": ax.AttnResConfig(num_blocks=2, output="mean"),
}


def example_gpt(layers=4):
    torch.manual_seed(0)
    return widened(SmallGPT(GPTConfig(vocabulary=96, layers=layers, heads=2, width=32, context=16)))


def assert_as_exact(found, expected, tolerance):
    """The first value, an output, to the tolerance; gradients to that of the largest: small ones are rounding."""
    assert_same(found[:1], expected[:1], tolerance)
    largest = max(float(g.abs().max()) for g in expected[1:])
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found[1:], expected[1:], strict=True)):
        assert float((a - b).abs().max()) <= tolerance * largest, f"gradient {i}"


#: Every layout in one model, and blocks that are alike, ragged and averaged in the others.
LAYOUTS_OF = {kind: LAYOUTS if kind == "example" else ("two blocks", "blocks of five", "mean") for kind in MODELS}


@pytest.mark.parametrize("lowering", [PHASES, Lowering(two_phase=True)], ids=["alone", "with the fusions"])
@pytest.mark.parametrize(("kind", "layout"), [(k, layout) for k in reversed(MODELS) for layout in LAYOUTS_OF[k]])
@pytest.mark.slow_after(1)
def test_two_phases_compute_what_the_reads_do(kind, layout, lowering):
    program, kwargs = exported(kind)
    converted = with_queries(ax.convert(program, (), kwargs, config=LAYOUTS[layout], lowering=lowering))
    assert count(converted.graph_module(lowered=True), "depth_attention_merge") >= 1
    assert_as_exact(*run_both(converted, kwargs), tolerance=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_are_exact_beyond_float32(layout):
    gm = torch.fx.symbolic_trace(example_gpt().double())
    converted = with_queries(ax.convert(gm, (IDS,), config=LAYOUTS[layout], lowering=Lowering(two_phase=True)))
    assert count(converted.graph_module(lowered=True), "depth_attention_batch") >= 1
    assert_same(*run_both(converted, {"ids": IDS}), tolerance=1e-12)


def plans_of(config, **options):
    program, kwargs = exported("example")
    converted = ax.convert(program, (), kwargs, config=config)
    return plan_phases(converted.graph_module(), **options)


def test_the_reads_of_a_block_are_those_after_its_first_sublayer_and_the_one_before():
    plans = plans_of(ax.AttnResConfig(block_size=3))
    shown = [(len(p.completed), len(p.reads), p.choice.block.alone) for p in plans]
    # Eight sublayers: the first block's first read sees v_0 alone; the last read is the last block's.
    assert shown == [(1, 2, 0), (2, 3, 1), (3, 3, 1)]


@functools.cache
def exported_parallel():
    model, kwargs, _ = FAMILIES["gpt_neox"]()
    kwargs = {**kwargs, "use_cache": False}
    return torch.export.export(model, (), kwargs, strict=False), kwargs


@pytest.mark.parametrize("variant", ["full", "local"])
@pytest.mark.parametrize("choose", ["auto", True])
@pytest.mark.parametrize("kind", ["example", "llama", "parallel"])
@pytest.mark.slow_after(1)
def test_other_variants_are_left_alone(kind, choose, variant):
    program, kwargs = exported_parallel() if kind == "parallel" else exported(kind)
    for blocks in ({}, {"num_blocks": 2}) if variant == "local" else ({},):
        converted = ax.convert(program, (), kwargs, config=ax.AttnResConfig(variant=variant, **blocks))
        gm = converted.graph_module()
        before = str(gm.graph)
        assert not two_phase_pass(gm, choose=choose).modified
        assert str(gm.graph) == before


def test_block_as_full_is_left_alone():
    assert plans_of(ax.AttnResConfig(block_size=1), choose=True) == ()


def test_parameters_keep_their_number_and_names():
    program, kwargs = exported("example")
    plain = ax.convert(program, (), kwargs, config=LAYOUTS["two blocks"], lowering=Lowering(two_phase=False))
    phased = ax.convert(program, (), kwargs, config=LAYOUTS["two blocks"], lowering=PHASES)
    assert [(n, p.shape) for n, p in plain.named_parameters()] == [(n, p.shape) for n, p in phased.named_parameters()]
    used = {n.target for n in phased.graph_module(lowered=True).graph.nodes if n.op == "get_attr"}
    assert {n for n, _ in phased.named_parameters() if n.startswith("attnres")} <= used


def test_every_parameter_gets_its_gradient():
    converted = with_queries(ax.convert(example_gpt(), (IDS,), config=LAYOUTS["pairs"], lowering=PHASES))
    sum(o.double().sin().mean() for o in pytree.tree_leaves(converted(IDS))).backward()
    for name, parameter in converted.attnres.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def plain_output(model):
    """Of the converted model with queries, read by read."""
    plain = with_queries(ax.convert(torch.export.export(model, (IDS,)), (IDS,), config=LAYOUTS["three blocks"]))
    return pytree.tree_leaves(plain.graph_module()(IDS))


def test_a_symbolic_trace_is_phased_too():
    model = example_gpt()
    gm = torch.fx.symbolic_trace(model)
    lowering = Lowering(two_phase=True)
    phased = with_queries(ax.convert(gm, (IDS,), config=LAYOUTS["three blocks"], lowering=lowering))
    assert count(phased.graph_module(lowered=True), "depth_attention_batch") == 3
    assert_same([phased(IDS)], plain_output(model))


@pytest.mark.slow
def test_the_graph_of_the_backend_is_phased_too():
    model, config = example_gpt(), LAYOUTS["three blocks"]
    expected = plain_output(model)
    torch._dynamo.reset()
    ax.compile(model, (IDS,), config=config, inner="aot_eager", dynamic=False, lowering=Lowering(two_phase=True))
    with_queries(model)
    assert_same([model(IDS)], expected)
    assert any("+3 attnres_fx::depth_attention_batch" in c for c in ax.explain(model).graphs[-1].changed)


def test_queries_that_are_made_later_stay_read_by_read():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.query, self.key = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(8))
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            depth = torch.ops.attnres_fx.depth_attention.default
            b = x.cos()
            p = self.layer(depth([x, b], self.query[0], self.key, 1e-6, 1.0))
            d = self.layer(depth([x, b, p], p.mean((0, 1)), self.key, 1e-6, 1.0))
            return depth([x, b, p + d], self.key, self.key, 1e-6, 1.0)

    x = torch.randn(2, 5, 8)
    gm = torch.export.export(Late(), (x,)).module()
    expected = gm(x)
    (plan,) = plan_phases(gm, choose=True)
    assert len(plan.reads) == 2
    two_phase_pass(gm, choose=True)
    gm.recompile()
    assert_same([gm(x)], [expected])


# --- the choice --------------------------------------------------------------------------------------


def test_costs_are_those_of_the_passes_over_memory():
    block = BlockReads(completed=3, merged=2, folded=1, alone=1, folded_alone=1)
    each = cost_read_by_read(block)
    assert each.forward == (4 + 1) + (4 + 1 + 2) + (3 + 1 + 2)
    assert each.backward == 2 * (3 * 4 + 1) + (3 * 3 + 1)
    phased = cost_two_phase(block)
    assert phased.forward == (2 * 3 + 3) + 3 + (3 + 2) + 2 + 3
    assert phased.backward == (7 * 3 + 2 * 3) + 2 * 6 + 2
    assert phased.live == 3


def test_more_reads_and_more_sources_make_two_phases_cheaper():
    def chosen(completed, merged, **options):
        return choose_phases(BlockReads(completed=completed, merged=merged, saved=1e9), training=True, **options)

    assert not chosen(1, 6).two_phase
    assert chosen(4, 6).two_phase
    assert not chosen(4, 1).two_phase
    gains = [chosen(c, 6).per_read - chosen(c, 6).phased for c in range(1, 9)]
    assert gains == sorted(gains)


def test_without_the_kernels_two_phases_never_pay():
    for completed in range(1, 12):
        for merged in range(1, 12):
            block = BlockReads(completed=completed, merged=merged, alone=1, saved=1e9, batched=False)
            assert not any(choose_phases(block, training=training).two_phase for training in (True, False))


def test_the_choice_is_the_smaller_count():
    for completed in range(1, 12):
        for merged in range(1, 9):
            for training in (True, False):
                block = BlockReads(completed=completed, merged=merged, alone=1, folded=merged, saved=1e9)
                choice = choose_phases(block, training=training)
                assert choice.two_phase == (choice.phased < choice.per_read)
                assert choice.per_read == cost_read_by_read(block).moved(training)
                assert choice.phased == cost_two_phase(block).moved(training)


def test_live_outputs_must_stay_a_share_of_what_is_kept():
    def chosen(kept, training=True, **options):
        block = BlockReads(completed=8, merged=5, alone=1, saved=kept)
        return choose_phases(block, training=training, **options)

    assert not chosen(20).two_phase and "20%" in chosen(20).why
    assert chosen(40).two_phase
    assert not chosen(40, memory_share=0.1).two_phase
    assert chosen(0, training=False).two_phase  # nothing is kept for backward


def test_the_log_says_what_was_chosen_and_why(caplog):
    converted = ax.convert(example_gpt(), (IDS,), config=ax.AttnResConfig(block_size=3))
    with caplog.at_level(logging.INFO, "attnres_fx.passes"):
        two_phase_pass(converted.graph_module(), choose="auto")
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("two_phase_pass: block")]
    assert len(lines) == 3
    assert "2 reads over 1 completed sources: read by read" in lines[0]
    assert all(
        "read by read" in line and "two-phase" in line and " U" in line and "bytes a token" in line for line in lines
    )


@pytest.mark.slow
def test_reads_that_are_recomputed_stay_read_by_read(monkeypatch):
    monkeypatch.setattr("attnres_fx.passes.lowering.two_phase.batches", lambda sources: True)  # as on a GPU
    converted = ax.convert(example_gpt(8), (IDS,), config=ax.AttnResConfig(num_blocks=4))
    gm = converted.graph_module()
    assert any(p.choice.two_phase for p in plan_phases(gm, training=False))
    monkeypatch.undo()
    assert not any(p.choice.two_phase for p in plan_phases(gm, training=False)), "two phases chosen without kernels"
    monkeypatch.setattr("attnres_fx.passes.lowering.two_phase.batches", lambda sources: True)
    for node in gm.graph.nodes:
        node.meta["recompute"] = 1
    assert not any(p.choice.two_phase for p in plan_phases(gm, training=False))
