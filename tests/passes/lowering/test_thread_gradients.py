"""Reads that hand their sources on: the same values and gradients, and nothing left for autograd to add."""

import itertools

import pytest
import torch

import attnres_fx as ax
from attnres_fx.errors import ConfigError
from attnres_fx.passes import Lowering, lower_
from tests.support.lowered import MODELS, count, run_both, with_queries

ALONE = Lowering(fuse_norms=False, fuse_partial_sums=False, two_phase=False, thread_gradients=True)
VARIANTS = {
    "full": ax.AttnResConfig(variant="full"),
    "block": ax.AttnResConfig(num_blocks=3),
    "local": ax.AttnResConfig(variant="local", num_blocks=2),
}


@pytest.mark.parametrize(
    "lowering",
    [ALONE, Lowering(thread_gradients=True, two_phase=False), Lowering(thread_gradients=True, two_phase=True)],
    ids=["alone", "with fusions", "with everything"],
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["llama", "example"])  # no dropout: they are compared in train mode
@pytest.mark.slow_after(1)
def test_threaded_reads_compute_what_the_reads_do(kind, variant, lowering):
    model, kwargs = MODELS[kind](layers=2)
    model.train()
    config = VARIANTS[variant]
    converted = with_queries(ax.convert(model, (), kwargs, config=config, lowering=lowering, check=False))
    gm = converted.graph_module(lowered=True)
    assert count(gm, "depth_attention_threaded") >= (0 if lowering.two_phase else 1)
    assert not any(r.modified for r in lower_(gm, lowering))
    found, expected = run_both(converted, kwargs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_all_reads_of_a_source_but_the_last_hand_it_on():
    model, kwargs = MODELS["example"](layers=2)
    model.train()
    converted = ax.convert(model, (), kwargs, config=VARIANTS["full"], lowering=ALONE, check=False)
    gm = converted.graph_module(lowered=True)
    reads = [n for n in gm.graph.nodes if "depth_attention" in str(n.target)]
    assert [("threaded" in str(n.target)) for n in reads] == [True] * (len(reads) - 1) + [False]
    taken = [s for n in reads for s in n.args[0]]
    assert len(taken) == len(set(taken)), "two reads take a source from one place"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_switch_beside_it_leaves_all_sources_handed_on(variant):
    """No two reads take a source from one place, whatever else is folded into the reads."""
    model, kwargs = MODELS["example"](layers=4)
    model.train()
    converted = ax.convert(model, (), kwargs, config=VARIANTS[variant], check=False)
    for norms, sums in itertools.product([False, True], repeat=2):
        gm = converted.graph_module()
        lower_(gm, Lowering(fuse_norms=norms, fuse_partial_sums=sums, two_phase=False, thread_gradients=True))
        reads = [n for n in gm.graph.nodes if "depth_attention" in str(n.target)]
        taken = [s for n in reads for s in n.args[0]]
        assert len(reads) > 6 and len(taken) == len(set(taken)), (norms, sums)


@pytest.mark.slow
def test_on_a_cpu_and_in_eval_nothing_is_threaded_by_itself():
    model, kwargs = MODELS["example"](layers=2)
    for training, lowering in [(True, Lowering()), (False, ALONE)]:
        model.train(training)
        converted = ax.convert(model, (), kwargs, config=VARIANTS["full"], lowering=lowering, check=False)
        assert not count(converted.graph_module(lowered=True), "depth_attention_threaded")


@pytest.mark.slow
def test_the_backend_threads_too():
    from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT

    torch.manual_seed(0)
    model = SmallGPT(GPTConfig(vocabulary=32, layers=2, heads=2, width=16, context=8))
    ids = torch.randint(0, 32, (2, 8))
    ax.compile(model, (ids,), config=VARIANTS["full"], inner="aot_eager", dynamic=False, lowering=ALONE)
    model(ids)
    assert "thread_gradients" in str(ax.explain(model))


def test_values_that_are_none_of_its_are_refused():
    with pytest.raises(ConfigError, match="thread_gradients is 'yes'"):
        Lowering(thread_gradients="yes")
