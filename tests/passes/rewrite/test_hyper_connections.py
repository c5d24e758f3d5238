"""Hyper-connections on the streams that are found: graphs, operators, whole models, files, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import AlreadyConvertedError, ConfigError
from attnres_fx.passes import analyze_, insert_hyper_connections_pass, topology_of
from attnres_fx.passes.graph.nodes import insert_attribute
from tests.support.families import FAMILIES
from tests.support.hyper_forward import by_hand, hyper
from tests.support.papers_forward import (
    IDS,
    gpt2,
    gpt2_sublayers,
    gpt_neox,
    gpt_neox_sublayers,
    llama,
    llama_sublayers,
)
from tests.support.pass_checks import graph_text
from tests.support.read_forms import randomized
from tests.support.stream_text import captured, dedented, rows, toy


def two_layers(m, x):
    h = x + m.attn_1(m.norm_1(x))
    h = h + m.mlp_1(m.norm_2(h))
    return m.norm_f(h)


def parallel(m, x):
    n = m.norm_1(x)
    h = x + m.attn_1(n) + m.mlp_1(n)
    return m.norm_f(h), h.shape[0]


def post_norm(m, x):
    h = m.norm_1(x + m.attn_1(x))
    return m.norm_2(h + m.mlp_1(h))


def inserted(function, config):
    gm = captured(toy(function), (rows(),), "symbolic")
    found = analyze_(gm)
    plan = topology_of(config).plan(found, found.streams, config)
    made = {r.read: topology_of(config).make_read(r, config) for r in plan.reads}

    def fetch(read, like, name):
        value = made[read.read].tensors().get(name)
        if value is None:
            return None
        target = f"{name}_{read.position}"
        if not hasattr(gm, target):
            gm.register_parameter(target, value)
        return insert_attribute(gm.graph, target, like=like, value=value)

    insert_hyper_connections_pass(gm, streams=found, plan=plan, config=config, fetch=fetch)
    gm.recompile()
    return gm


# --- graphs ------------------------------------------------------------------------------------------


def test_writes_and_reads_go_in_and_additions_go_out():
    gm = inserted(two_layers, hyper(copies=2, dynamic=False, constrained=False))
    assert graph_text(gm) == dedented("""
        norm_1 = norm_1(x)
        attn_1 = attn_1(norm_1)
        hyper_write_default = hyper_write([x, x], attn_1, post_1, None, None, carry_1, None, None, False, 20, 1e-06)
        getitem = getitem(hyper_write_default, 0)
        getitem_1 = getitem(hyper_write_default, 1)
        hyper_read_default = hyper_read([getitem, getitem_1], pre_1, None, None, False, 1e-06)
        norm_2 = norm_2(hyper_read_default)
        mlp_1 = mlp_1(norm_2)
        hyper_write_default_1 = hyper_write([getitem, getitem_1], mlp_1, post_2, None, None, carry_2, None, None, False, 20, 1e-06)
        getitem_2 = getitem(hyper_write_default_1, 0)
        getitem_3 = getitem(hyper_write_default_1, 1)
        hyper_read_default_1 = hyper_read([getitem_2, getitem_3], pre_2, None, None, False, 1e-06)
        norm_f = norm_f(hyper_read_default_1)
        return norm_f
    """)  # noqa: E501


def test_two_branches_of_one_sublayer_are_written_at_once():
    gm = inserted(parallel, hyper(copies=2, dynamic=False))
    text = graph_text(gm)
    assert text.count("hyper_write(") == 1 and "carry_1" not in text
    x = rows()
    torch.testing.assert_close(gm(x)[0], parallel(gm, x)[0])


def test_a_post_norm_stream_is_read_through_gates_but_for_its_first_norm():
    text = graph_text(inserted(post_norm, hyper(copies=2, dynamic=False)))
    assert "gate_1" not in text and "gate_2" in text


def aside(m, x):
    h = x + m.attn_1(m.norm_1(x))
    seen = m.norm_2(h + m.mlp_1(m.norm_1(h)))
    return m.norm_f(h + m.mlp_1(seen))


def test_a_term_that_the_stream_does_not_go_on_with_is_seen_as_it_is():
    gm = inserted(aside, hyper(copies=2, dynamic=False))
    assert graph_text(gm).count("hyper_write(") == 2
    x = rows()
    torch.testing.assert_close(gm(x), aside(gm, x))


def test_reads_take_most_of_one_copy_after_another():
    model = ax.convert(llama(2), (IDS,), config=hyper(), check=False)
    assert [int(r.pre.argmax()) for r in model.attnres.reads] == [1, 2, 0, 1]
    for read in model.attnres.reads:
        torch.testing.assert_close(read.pre.sigmoid().sum(), torch.tensor(1.0))


# --- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize(
    ("model", "parts"),
    [(llama, llama_sublayers), (gpt2, gpt2_sublayers), (gpt_neox, gpt_neox_sublayers)],
    ids=["llama", "gpt2", "gpt_neox"],
)
def test_a_model_equals_hyper_connections_written_by_hand_on_its_submodules(model, parts, constrained):
    original = model(2).double()
    config = hyper(constrained=constrained)
    converted = randomized(ax.convert(original, (IDS,), config=config, check=False))
    found = converted(IDS).logits
    wanted = by_hand(parts(original), list(converted.attnres.reads), config)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    named = dict(converted.named_parameters())
    weights = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((y * weights).sum(), list(named.values())) for y in (found, wanted)]
    for name, one, other in zip(named, *gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


class ChannelsFirst(nn.Module):
    """A stream [B, D, T], normed over D."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.mixers = nn.ModuleList(nn.Conv1d(6, 6, 3, padding=1) for _ in range(2))

    def normed(self, i, h):
        return self.norms[i](h.transpose(1, 2)).transpose(1, 2)

    def forward(self, x):
        h = x
        for i, mixer in enumerate(self.mixers):
            h = h + mixer(self.normed(i, h))
        return self.normed(2, h)


def test_features_in_another_dimension_are_weighed_there():
    torch.manual_seed(0)
    model, x = ChannelsFirst().double(), torch.randn(2, 6, 5, dtype=torch.float64)
    converted = randomized(ax.convert(model, (x,), config=hyper()))

    def first(h):
        return h.transpose(1, 2)

    layers = [lambda h, i=i: first(model.mixers[i](model.normed(i, first(h)))) for i in range(2)]
    wanted = by_hand((first(x), layers, lambda h: model.normed(2, first(h))), list(converted.attnres.reads), hyper())
    torch.testing.assert_close(converted(x), wanted, rtol=1e-10, atol=1e-10)


#: One a kind: parallel layers, flat tokens, norms behind, two streams, stages, moved rows, shared layers, in place.
SEVERAL = ["falcon", "opt", "granite", "bert", "t5", "swin", "albert", "in place", "carry"]


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.slow_after(1)
def test_a_fresh_conversion_computes_what_the_original_computes(name):
    model, kwargs, reads = FAMILIES[name]()
    converted = ax.convert(model, kwargs=kwargs, config=hyper(), check="outputs")
    assert len(converted.attnres.reads) == reads
    assert converted.report.difference <= 1e-5
    added = sum(p.numel() for p in converted.attnres.parameters())
    assert converted.report.num_parameters == added


def test_copies_become_different_and_then_everything_learns():
    model = gpt2(2)
    converted = ax.convert(model, (IDS,), config=hyper())
    optimizer = torch.optim.SGD(converted.attnres.parameters(), lr=1.0)
    first = {}
    for step in range(3):
        optimizer.zero_grad()
        converted(IDS, labels=IDS).loss.backward()
        if step == 0:
            first = {n: p.grad.abs().max() for n, p in converted.attnres.named_parameters() if n.endswith(".post")}
        optimizer.step()
    assert len(first) == 4 and all(g > 0 for g in first.values())
    assert [n for n, p in converted.attnres.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_the_backend_computes_the_same():
    original = llama(2)
    converted = randomized(ax.convert(original, (IDS,), config=hyper()))
    attached = copy.deepcopy(original)
    ax.compile(attached, (IDS,), config=hyper(), inner="eager")
    attached.attnres.load_state_dict(converted.attnres.state_dict())
    torch.testing.assert_close(attached(IDS).logits, converted(IDS).logits, rtol=1e-4, atol=1e-5)
    assert "copies 3, constrained True" in str(ax.explain(attached))


def test_train_mode_export_and_a_compiled_model_compute_the_same():
    original = gpt2(1)
    converted = randomized(ax.convert(original, (IDS,), config=hyper()))
    wanted = converted(IDS).logits
    exported = torch.export.export(converted, (IDS,), strict=False)
    torch.testing.assert_close(exported.module()(IDS).logits, wanted)
    torch.testing.assert_close(exported.run_decompositions({}).module()(IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    for module in original.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trained = randomized(ax.convert(original.train(), (IDS,), config=hyper()))
    torch.testing.assert_close(trained(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


# --- files and configs -------------------------------------------------------------------------------


def test_a_saved_model_and_an_adapter_come_back(tmp_path):
    original = gpt2(1)
    converted = randomized(ax.convert(original, (IDS,), config=hyper()))
    wanted = converted(IDS).logits
    converted.save(tmp_path / "model.attnres")
    loaded = ax.load(tmp_path / "model.attnres")
    assert loaded.report.config == hyper() and torch.equal(loaded(IDS).logits, wanted)
    ax.save_adapter(converted, tmp_path / "adapter")
    other = ax.convert(original, (IDS,), config=hyper())
    ax.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(IDS).logits, wanted)


def test_a_state_of_another_topology_is_refused():
    original = gpt2(1)
    state = ax.convert(original, (IDS,), config=hyper()).state_dict()
    attention = ax.convert(original, (IDS,))
    before = attention.attnres.reads[0].query.clone()
    with pytest.raises(ConfigError, match=r"HyperConnectionsConfig\(copies=3.*AttnResConfig\(variant='block'"):
        attention.load_state_dict(state, strict=False)
    assert torch.equal(attention.attnres.reads[0].query, before)


def test_what_is_there_for_depth_attention_alone_says_so():
    original = gpt2(1)
    converted = ax.convert(original, (IDS,), config=hyper())
    for tool in (ax.depth_weights, ax.profile_depth):
        with pytest.raises(ConfigError, match="HyperConnectionsConfig"):
            tool(converted, (IDS,))
    with pytest.raises(ConfigError, match="a pipeline plan"):
        ax.plan(converted, (IDS,), num_stages=2)
    with pytest.raises(AlreadyConvertedError):
        ax.convert(converted.graph_module("eval"), (IDS,))
