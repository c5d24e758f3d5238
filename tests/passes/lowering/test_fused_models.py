"""Whole models with their norms and additions folded in: converted, copied, saved, and under the backend."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.passes import Lowering, lower_
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.passes.graph.operations import op_name
from tests.support.families import FAMILIES, GROUPED, TEXT, family, widened
from tests.support.lowered import NORMS_ONLY, D, assert_same, count, example, run_both, with_queries
from tests.support.stream_text import captured


def example_gpt(layers=3):
    torch.manual_seed(0)
    return widened(SmallGPT(GPTConfig(vocabulary=96, layers=layers, heads=2, width=32, context=16)))


MODELS = {
    "llama": FAMILIES["llama"],
    "gpt2": FAMILIES["gpt2"],
    "qwen3": FAMILIES["qwen3"],
    "gemma": lambda: family("gemma", TEXT, 4, head_dim=8, **GROUPED),
    "t5": FAMILIES["t5"],
    "example": lambda: (example_gpt(), {"ids": TEXT["input_ids"]}, 6),
}


@functools.cache
def fused_model(kind):
    """Converted once for both of its modes, for the example's sizes."""
    model, kwargs, reads = MODELS[kind]()
    converted = ax.convert(model, (), kwargs, lowering=Lowering(two_phase=False), dynamic_shapes={}, check=False)
    return with_queries(converted), kwargs, reads


#: The train graph of a model without dropout is its eval graph.
CASES = [*((kind, "eval") for kind in MODELS), *((kind, "train") for kind in ("gpt2", "t5", "example"))]


@pytest.mark.parametrize(("kind", "mode"), CASES)
@pytest.mark.slow
def test_every_read_that_feeds_one_norm_is_fused(kind, mode):
    converted, kwargs, reads = fused_model(kind)
    gm = converted.graph_module(mode, lowered=True)
    assert count(gm, "depth_attention_fused") == reads
    assert count(gm, "depth_attention") == 0
    assert count(converted.graph_module(mode), "depth_attention") == reads
    assert_same(*run_both(converted.eval(), kwargs))


@pytest.mark.parametrize("spelling", ["symbolic", "export"])
def test_the_example_is_fused_from_its_other_spellings(spelling):
    model, ids = example_gpt(), TEXT["input_ids"]
    given = torch.fx.symbolic_trace(model) if spelling == "symbolic" else torch.export.export(model, (ids,))
    converted = with_queries(ax.convert(given, (ids,), lowering=Lowering(two_phase=False)))
    assert count(converted.graph_module(lowered=True), "depth_attention_fused") == 6
    assert_same(*run_both(converted, {"ids": ids}))


@pytest.mark.slow
def test_post_norm_streams_fuse_only_without_gates():
    model, kwargs, reads = FAMILIES["bert"]()
    gated = ax.convert(model, (), kwargs)
    free_of_gates = sum(read.gate is None for read in gated.attnres.reads)
    assert count(gated.graph_module(lowered=True), "depth_attention_fused") == free_of_gates == 1
    free = with_queries(ax.convert(model, (), kwargs, config=ax.AttnResConfig(output="mean", variant="full")))
    fused = count(free.graph_module(lowered=True), "depth_attention_fused")
    assert fused == reads
    assert_same(*run_both(free, kwargs))


def test_lowering_twice_changes_nothing():
    converted = ax.convert(example_gpt(), (TEXT["input_ids"],))
    gm = converted.graph_module(lowered=True)
    assert not any(r.modified for r in lower_(gm))


def test_an_unrelated_graph_is_left_alone():
    gm = captured(example_gpt(), (TEXT["input_ids"],), "export")
    before = str(gm.graph)
    assert not any(r.modified for r in lower_(gm))
    assert str(gm.graph) == before


def test_inserted_nodes_carry_values_and_where_they_come_from():
    gm = ax.convert(example_gpt(), (TEXT["input_ids"],)).graph_module(lowered=True)
    fused = [n for n in gm.graph.nodes if op_name(n) == "attnres_fx::depth_attention_fused"]
    assert fused
    for node in fused:
        assert [tuple(v.shape)[-1] for v in value_of(node)] == [32] * len(value_of(node))
        assert node.meta["nn_module_stack"] and "small_gpt" in node.meta["stack_trace"]
        assert all(value_of(u) is not None for u in node.users)


# --- the converted model stays what it was -----------------------------------------------------------


@pytest.mark.slow
def test_parameters_state_and_reports_do_not_know_of_the_lowering():
    model, ids = example_gpt(), TEXT["input_ids"]
    plain = ax.convert(model, (ids,), lowering=Lowering(fuse_norms=False, fuse_partial_sums=False, two_phase=False))
    fused = ax.convert(model, (ids,), lowering=Lowering(two_phase=True))
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in fused.named_parameters()]
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in fused.named_modules()]
    assert str(plain.report) == str(fused.report)
    assert str(plain.graph_module().graph) == str(fused.graph_module().graph)
    assert str(ax.depth_weights(plain, (ids,))) == str(ax.depth_weights(fused, (ids,)))
    assert_same([fused(ids)], [plain(ids)])


@pytest.mark.slow
def test_copies_pickles_files_and_replaced_parameters_run_lowered(tmp_path):
    ids = TEXT["input_ids"]
    converted = with_queries(ax.convert(example_gpt(), (ids,), lowering=NORMS_ONLY))
    expected = converted(ids)
    converted.save(tmp_path / "model.pt")
    for other in (
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        ax.load(tmp_path / "model.pt"),
    ):
        assert other.lowering == NORMS_ONLY
        assert count(other.graph_module(lowered=True), "depth_attention_fused") == 6
        assert_same([other(ids)], [expected])
        with torch.no_grad():
            other.norm.weight.mul_(2)
        assert_same([other(ids)], [expected + other_bias(other, expected)], 1e-5)
    assert_same([converted(ids)], [expected])
    doubled = {n: 2 * p for n, p in converted.named_parameters() if n in ("norm.weight", "norm.bias")}
    assert_same([torch.func.functional_call(converted, doubled, (ids,))], [2 * expected], 1e-5)


def other_bias(converted, expected):
    """What doubling the last norm's weight adds, its bias being zero."""
    assert not converted.norm.bias.any()
    return expected


def test_a_norm_module_that_is_replaced_or_hooked_is_called_again():
    ids = TEXT["input_ids"]
    converted = ax.convert(torch.fx.symbolic_trace(example_gpt()), (ids,))
    seen = []
    handle = converted.norm.register_forward_hook(lambda *_: seen.append(1))
    converted(ids)
    assert seen == [1]
    handle.remove()
    converted(ids)
    assert seen == [1]
    converted.norm = nn.Identity()
    hidden = converted.graph_module()(ids)
    assert torch.equal(converted(ids), hidden)


@pytest.mark.parametrize("traced", [False, True], ids=["export", "symbolic"])
@pytest.mark.slow
def test_autocast_gives_the_dtype_it_gave(traced):
    model, ids = example_gpt(), TEXT["input_ids"]
    converted = with_queries(ax.convert(torch.fx.symbolic_trace(model) if traced else model, (ids,)))
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = pytree.tree_leaves(converted(ids))
        (expected,) = pytree.tree_leaves(converted.graph_module()(ids))
    assert_same([found], [expected], 5e-2)


# --- the backend -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_backend_fuses_and_explains():
    model, ids = example_gpt(2), TEXT["input_ids"]
    converted = with_queries(ax.convert(model, (ids,), check=False))
    torch._dynamo.reset()
    ax.compile(model, (ids,), inner="aot_eager", dynamic=False, lowering=Lowering(two_phase=False))
    for read, other in zip(model.attnres.reads, converted.attnres.reads, strict=True):
        read.load_state_dict(other.state_dict())
    assert_same([model(ids)], [converted(ids)])
    graph = ax.explain(model).graphs[-1]
    assert any(c.startswith("fuse_norms_pass") and "+" in c for c in graph.changed)
    assert "fuse_norms_pass" in str(ax.explain(model))


class Written(nn.Module):
    """The norm that models of transformers have: its eps is an attribute, which Dynamo makes an input of."""

    def __init__(self, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(D)), eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class WrittenStack(nn.Module):
    def __init__(self, eps):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(Written(eps) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        return self.norms[-1](x)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.slow
def test_an_eps_that_dynamo_made_an_input_is_known_and_guarded(inner):
    torch._dynamo.reset()
    model = WrittenStack(1e-3)
    expected = WrittenStack(1e-3)
    ax.compile(model, (example(),), inner=inner)
    for eps in (1e-3, 0.5, 1e-3):
        for norm in (*model.norms, *expected.norms):
            norm.eps = eps
        assert_same([model(example())], [expected(example())], 1e-5)
        assert any("+2 attnres_fx::depth_attention_fused" in c for c in ax.explain(model).graphs[-1].changed)
    assert len({g.changed for g in ax.explain(model).graphs}) == 1


@pytest.mark.parametrize("lowering", [{"fuse_norms": False, "two_phase": False}, Lowering(), None], ids=str)
@pytest.mark.slow
def test_options_of_the_backend_choose_the_passes(lowering):
    model, ids = example_gpt(2), TEXT["input_ids"]
    torch._dynamo.reset()
    ax.attach(model, (ids,))
    options = {"inner": "eager"} | ({} if lowering is None else {"lowering": lowering})
    torch.compile(model, backend="attnres", dynamic=False, options=options)(ids)
    changed = " ".join(ax.explain(model).graphs[-1].changed)
    assert ("fuse_norms_pass" in changed) == (not isinstance(lowering, dict))


@pytest.mark.slow
def test_a_converted_model_compiles_with_the_backend():
    ids = TEXT["input_ids"]
    plain = Lowering(fuse_norms=False, fuse_partial_sums=False, two_phase=False)
    for lowering in (plain, Lowering()):
        converted = with_queries(ax.convert(example_gpt(2), (ids,), lowering=lowering, check=False))
        torch._dynamo.reset()
        options = {"inner": "aot_eager"}
        run = torch.compile(converted, backend="attnres", options=options, fullgraph=True, dynamic=False)
        assert_same([run(ids)], [converted(ids)])


@pytest.mark.parametrize(
    "call",
    [
        lambda: Lowering(fuse_norms=1),
        lambda: Lowering(fuse_partial_sums=None),
        lambda: Lowering(two_phase="always"),
        lambda: Lowering(two_phase=1),
        lambda: ax.convert(example_gpt(), (TEXT["input_ids"],), lowering="all"),
        lambda: ax.convert(example_gpt(), (TEXT["input_ids"],), lowering={"fuse_everything": True}),
        lambda: ax.compile(example_gpt(), (TEXT["input_ids"],), lowering=3),
    ],
    ids=range(7),
)
def test_wrong_switches_are_refused(call):
    with pytest.raises(ax.AttnResError, match="owering"):
        call()
