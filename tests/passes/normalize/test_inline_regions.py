"""Regions come out of the graph with their effect, once, with metadata and function kept."""

import pytest
import torch
from torch.utils import checkpoint

from attnres_fx.passes import (
    inline_regions_pass,
)
from attnres_fx.passes.graph.nodes import tensor_of
from tests.support.pass_checks import (
    check_idle,
    check_metadata,
    check_pass,
    exported,
    graph_text,
)
from tests.support.stream_text import captured, dedented, dynamo_graph, rows, toy


def frozen(m, x):
    with torch.no_grad():
        x = x + m.attn_1(x)
    return m.head(x)


def in_half(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return x + m.attn_1(x)


def nested(m, x):
    with torch.no_grad():
        x = x + m.attn_1(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = x + m.attn_2(x)
    return m.head(x)


def checkpointed(m, x):
    return checkpoint.checkpoint(lambda t: t + m.attn_1(t), x, use_reentrant=False)


def test_regions_come_out_with_their_effect():
    gm = captured(toy(frozen), (rows(),), "export")
    assert graph_text(gm) == dedented("""
        add = wrap_with_set_grad_enabled(False, submod_1, x, attn_1.weight, attn_1.bias)
        getitem = getitem(add, 0)
        linear_1 = linear(getitem, head.weight, head.bias)
        return [linear_1]
    """)
    inline_regions_pass(gm)
    assert graph_text(gm) == dedented("""
        is_grad_enabled = is_grad_enabled()
        _set_grad_enabled = _set_grad_enabled(False)
        linear = linear(x, attn_1.weight, attn_1.bias)
        add_1 = add(x, linear)
        _set_grad_enabled_1 = _set_grad_enabled(is_grad_enabled)
        linear_1 = linear(add_1, head.weight, head.bias)
        return [linear_1]
    """)


def test_a_region_inside_a_region_comes_out_too():
    gm = captured(toy(nested), (rows(),), "export")
    inline_regions_pass(gm)
    assert graph_text(gm) == dedented("""
        is_grad_enabled = is_grad_enabled()
        _set_grad_enabled = _set_grad_enabled(False)
        linear = linear(x, attn_1.weight, attn_1.bias)
        add = add(x, linear)
        _enter_autocast = _enter_autocast(cpu, torch.bfloat16, True, False)
        linear_1 = linear(add, attn_2.weight, attn_2.bias)
        add_3 = add(add, linear_1)
        _exit_autocast = _exit_autocast(_enter_autocast)
        _set_grad_enabled_1 = _set_grad_enabled(is_grad_enabled)
        linear_2 = linear(add_3, head.weight, head.bias)
        return [linear_2]
    """)


@pytest.mark.parametrize("program", [frozen, in_half, nested])
def test_inlining_keeps_function_and_metadata_and_is_done_once(program):
    gm = exported(program, rows())
    new = check_pass(inline_regions_pass, gm, [rows()], tolerance=0.0)
    check_metadata([n for n in new if tensor_of(n) is not None], "inner")
    assert all("nn_module_stack" in n.meta for n in new)
    check_idle(inline_regions_pass, gm)


def test_a_frozen_region_stays_frozen_and_what_follows_does_not():
    gm = captured(toy(frozen), (rows(),), "export")
    inline_regions_pass(gm)
    gm.recompile()
    gm(rows()).sum().backward()
    weights = dict(gm.named_parameters())
    assert weights["attn_1.weight"].grad is None and weights["head.weight"].grad is not None
    with torch.no_grad():
        gm(rows())
        assert not torch.is_grad_enabled()


def test_a_checkpointed_body_is_inlined_with_recompute_tags():
    gm = dynamo_graph(toy(checkpointed), (rows(),))
    old = set(gm.graph.nodes)
    assert inline_regions_pass(gm).modified
    new = [n for n in gm.graph.nodes if n not in old]
    assert len(new) == 2
    for node in new:
        assert node.meta["recompute"] is checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
        assert __file__ in node.meta["stack_trace"] and tensor_of(node) is not None
    check_idle(inline_regions_pass, gm)


def test_a_checkpointed_body_without_an_addition_of_tensors_stays():
    def program(m, x):
        return m.head(x + checkpoint.checkpoint(m.attn_1, x, use_reentrant=False))

    gm = dynamo_graph(toy(program), (rows(),))
    assert "tag_activation_checkpoint" in graph_text(gm)
    check_idle(inline_regions_pass, gm)


def test_a_region_that_only_sets_a_mode_is_inlined_whatever_it_holds():
    def program(m, x):
        with torch.no_grad():
            y = m.attn_1(x) * 2.0
        return m.head(x + y)

    gm = captured(toy(program), (rows(),), "export")
    assert inline_regions_pass(gm).modified
    assert "wrap_with_set_grad_enabled" not in graph_text(gm) and "set_grad_enabled" in graph_text(gm)
