"""Values are storages, not nodes: what in-place operations and views do to a stream (design section 4).

`h += f(h)` is spelled `h.add_(f(h))` here: `torch.fx.symbolic_trace` would write the former out of place.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

import attnres_fx as ax
from tests.support.stream_text import TWO_LAYERS, VARIANTS, assert_near, check_trap, rows, tokens, toy


def test_an_in_place_add_rebinds_every_alias():
    def program(m, x):
        h = m.embed(x)
        alias, flat = h, h.view(-1, 8)
        h.add_(m.attn_1(m.norm_1(h)))
        h.add_(m.mlp_1(m.norm_2(flat)).view(2, 5, 8))
        return m.head(m.norm_f(alias)), m.head(m.norm_f(flat))

    check_trap(program, (tokens(),), TWO_LAYERS.replace("mlp_1", "view"), gradients=False)


def test_an_in_place_add_through_a_view_changes_the_whole():
    def program(m, x):
        h = m.embed(x)
        flat = h.view(-1, 8)
        flat.add_(m.attn_1(m.norm_1(flat)))
        h.add_(m.mlp_1(m.norm_2(h)))
        return m.head(m.norm_f(h)), m.head(m.norm_f(flat))

    expected = TWO_LAYERS.replace("embed", "view")
    check_trap(program, (tokens(),), expected, gradients=False)


def test_an_in_place_activation_inside_a_branch_changes_nothing_else():
    def program(m, x):
        h = m.embed(x)
        v = m.attn_2(m.norm_1(h))
        torch.relu_(v)
        h = h + m.attn_1(v)
        v = m.mlp_2(m.norm_2(h))
        F.relu(v, inplace=True)
        h = h + m.mlp_1(v.tanh_())
        return m.head(m.norm_f(h))

    check_trap(program, (tokens(),), TWO_LAYERS, gradients=False)


LATER_WRITES = {
    "zero_": lambda v: v.zero_(),
    "mul_": lambda v: v.mul_(3.0),
    "fill_": lambda v: v.fill_(2.0),
    "add_": lambda v: v.add_(1.0),
    "relu_": lambda v: torch.relu_(v),
    "a view": lambda v: v.view(-1).zero_(),
    "a slice": lambda v: v[:, 1:3].zero_(),
    "narrow": lambda v: v.narrow(-1, 0, 3).zero_(),
    "a transpose": lambda v: v.transpose(0, 1).neg_(),
    "copy_": lambda v: v.copy_(torch.ones(2, 5, 8)),
    "a detached alias": lambda v: v.detach().zero_(),
}


@pytest.mark.parametrize("write", LATER_WRITES)
@pytest.mark.slow_after(1)
def test_a_source_written_to_later_keeps_the_value_it_had(write):
    def program(m, x):
        h = m.embed(x)
        v = m.attn_1(m.norm_1(h))
        h = h + v
        LATER_WRITES[write](v)
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    check_trap(program, (tokens(),), TWO_LAYERS, gradients=False)


@pytest.mark.parametrize("write", ["zero_", "mul_", "a view", "a slice", "copy_"])
def test_a_root_written_to_later_keeps_the_value_it_had(write):
    def program(m, x):
        root = m.embed(x)
        h = root + m.attn_1(m.norm_1(root))
        LATER_WRITES[write](root)
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h)), root

    check_trap(program, (tokens(),), TWO_LAYERS, gradients=False)


@pytest.mark.parametrize("write", ["relu_", "fill_", "a slice", "a transpose"])
@pytest.mark.slow_after(1)
def test_a_state_written_to_by_anything_but_an_add_is_preserved(write):
    """Whether the chain stops there or goes on, what comes out is what the original computes."""

    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        LATER_WRITES[write](h)
        h = h + m.mlp_1(m.norm_2(h))
        h = h + m.mlp_2(m.norm_3(h))
        return m.head(m.norm_f(h))

    check_preserved_in_all_variants(program, (tokens(),))


@pytest.mark.parametrize("write", ["relu_", "fill_"])
def test_a_state_written_to_by_anything_but_a_factor_is_opaque_from_there(write):
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        LATER_WRITES[write](h)
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    found = ax.inspect(toy(program), (tokens(),)).streams
    assert all(stream.num_sublayers == 1 for stream in found)
    assert any([r.name for r in stream.depth_reads] == ["norm_f"] for stream in found)


def check_preserved_in_all_variants(program, args, tolerance=1e-5):
    model = toy(program, len(args))
    with torch.no_grad():
        expected = model(*[a.clone() for a in args])
        for variant, config in VARIANTS.items():
            config = ax.AttnResConfig(variant=config.variant)
            for source in (torch.fx.symbolic_trace(model), model):
                converted = ax.convert(source, args, config=config, check=False)
                assert_near(converted(*[a.clone() for a in args]), expected, tolerance, variant)


@pytest.mark.slow
def test_a_buffer_zeroed_filled_and_reused_for_every_sublayer():
    def program(m, x):
        h = m.embed(x)
        out = torch.empty_like(h)
        for norm, mlp in ((m.norm_1, m.mlp_1), (m.norm_2, m.mlp_2), (m.norm_3, m.mlp_3)):
            out.zero_()
            out.add_(mlp(norm(h)))
            h = h + out
        out.zero_()
        return m.head(m.norm_f(h))

    model = toy(program)
    for source in (torch.fx.symbolic_trace(model), model):
        found = ax.inspect(source, (tokens(),)).streams
        assert [[r.name for r in s.depth_reads] for s in found] == [["norm_2", "norm_3", "norm_f"]]
    check_preserved_in_all_variants(program, (tokens(),))


@pytest.mark.slow
def test_experts_scattered_into_a_zeroed_buffer_are_one_term():
    def program(m, x):
        h = m.embed(x)
        for norm, first, second in ((m.norm_1, m.mlp_1, m.mlp_2), (m.norm_2, m.mlp_3, m.mlp_4)):
            n = norm(h).view(-1, 8)
            out = torch.zeros_like(n)
            out.index_add_(0, torch.arange(0, 10, 2), first(n[::2]))
            out.index_add_(0, torch.arange(1, 10, 2), second(n[1::2]))
            h = h + out.view(2, 5, 8)
        return m.head(m.norm_f(h))

    model = toy(program)
    for source in (torch.fx.symbolic_trace(model), model):
        found = ax.inspect(source, (tokens(),)).streams
        assert [[r.name for r in s.depth_reads] for s in found] == [["norm_2", "norm_f"]]
    check_preserved_in_all_variants(program, (tokens(),))


@pytest.mark.slow
def test_out_variants_write_too():
    def program(m, x):
        h = m.embed(x)
        v = m.attn_1(m.norm_1(h))
        h = h + v
        torch.mul(h, 0.0, out=v)
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    check_preserved_in_all_variants(program, (tokens(),))


def test_adding_into_the_caller_s_tensor_still_shows_the_caller():
    def program(m, x):
        h = x
        h.add_(m.attn_1(m.norm_1(h)))
        h.add_(m.mlp_1(m.norm_2(h)))
        return m.head(m.norm_f(h))

    model = toy(program)
    for source in (torch.fx.symbolic_trace(model), model):
        for config in VARIANTS.values():
            mine, theirs = rows(), rows()
            with torch.no_grad():
                expected = model(theirs)
                converted = ax.convert(source, (rows(),), config=config, check=False)
                assert_near(converted(mine), expected, 1e-5)
            assert_near(mine, theirs, 1e-5, "the caller's tensor")


def test_the_example_arguments_are_as_they_were_after_a_conversion():
    def program(m, x):
        x += m.attn_1(m.norm_1(x))
        return m.head(m.norm_f(x))

    model, mine = toy(program), rows()
    before = copy.deepcopy(model.state_dict())
    ax.convert(model, (mine,))
    assert torch.equal(mine, rows())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_buffer_of_the_model_that_is_written_to_keeps_its_writes():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        m.seen.add_(1)
        h = h + m.mlp_1(m.norm_2(h)) * m.seen
        return m.head(m.norm_f(h))

    model = toy(program)
    model.register_buffer("seen", torch.zeros(()))
    other = copy.deepcopy(model)
    converted = ax.convert(model, (tokens(),), config=ax.AttnResConfig(variant="full"), check=False)
    with torch.no_grad():
        for _ in range(3):
            assert_near(converted(tokens()), other(tokens()), 1e-5)
    assert model.seen.item() == other.seen.item() == 3
