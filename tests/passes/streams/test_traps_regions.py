"""Regions that hide part of a stream: autocast, no_grad, checkpoints, compiled once (design section 4)."""

import pytest
import torch
from torch.utils import checkpoint

import attnres_fx as ax
from attnres_fx.passes import analyze_
from tests.support.stream_text import (
    TWO_LAYERS,
    VARIANTS,
    captured,
    check_trap,
    dynamo_graph,
    found_text,
    stream_text,
    tokens,
    toy,
)


def under_autocast(m, x):
    h = m.embed(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
    return m.head(m.norm_f(h))


def partly_under_autocast(m, x):
    h = m.embed(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = m.attn_1(m.norm_1(h))
    h = h + v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = h + m.mlp_1(m.norm_2(h))
    return m.head(m.norm_f(h))


@pytest.mark.parametrize("program", [under_autocast, partly_under_autocast])
def test_a_stream_under_autocast_is_found(program):
    check_trap(program, (tokens(),), TWO_LAYERS, spellings=("export",), tolerance=2e-2)
    assert found_text(toy(program), (tokens(),), "dynamo").split() == TWO_LAYERS.split()


def under_no_grad(m, x):
    h = m.embed(x)
    with torch.no_grad():
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
    h = h + m.mlp_2(m.norm_3(h))
    return m.head(m.norm_f(h))


NO_GRAD = """
    stream stream from embed
      1: attn_1
      2: mlp_1
      3: mlp_2
      norm_2 reads 1
      norm_3 reads 2
      norm_f reads 3
"""


@pytest.mark.parametrize("spelling", ["export", "dynamo"])
def test_a_stream_under_no_grad_is_found(spelling):
    assert found_text(toy(under_no_grad), (tokens(),), spelling).split() == NO_GRAD.split()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow_after(1)
def test_what_was_frozen_by_no_grad_stays_frozen(variant):
    model = toy(under_no_grad)
    converted = ax.convert(model, (tokens(),), config=VARIANTS[variant], check=False)
    torch.testing.assert_close(converted(tokens()), model(tokens()), rtol=1e-5, atol=1e-6)
    model(tokens()).sum().backward()
    frozen = {n for n, p in model.named_parameters() if p.grad is None}
    assert "attn_1.weight" in frozen and "embed.weight" in frozen
    model.zero_grad()
    converted(tokens()).sum().backward()
    leaked = {n for n in frozen if (g := model.get_parameter(n).grad) is not None and g.any()}
    assert not leaked


def test_a_checkpointed_layer_is_inlined_and_keeps_its_tags():
    def layer(m, h):
        h = h + m.attn_1(m.norm_1(h))
        return h + m.mlp_1(m.norm_2(h))

    def program(m, x):
        h = m.embed(x)
        h = checkpoint.checkpoint(layer, m, h, use_reentrant=False)
        return m.head(m.norm_f(h))

    gm = dynamo_graph(toy(program), (tokens(),))
    assert any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in gm.graph.nodes)
    streams = analyze_(gm).streams
    assert stream_text(streams, gm).split() == TWO_LAYERS.split()
    tagged = [n for n in gm.graph.nodes if "recompute" in n.meta]
    assert {"attn_1", "mlp_1"} <= {_last_module(n) for n in tagged}
    assert not {"head", "norm_f"} & {_last_module(n) for n in tagged}


def _last_module(node):
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(next(reversed(stack.values()))[0]).rsplit(".", 1)[-1].strip("]'\"")


def test_a_region_that_is_compiled_once_is_inlined():
    @torch.compiler.nested_compile_region
    def layer(h, weight):
        return h + torch.tanh(h @ weight)

    def program(m, x):
        h = m.embed(x)
        for _ in range(3):
            h = layer(h, m.mlp_1.weight)
        return m.head(m.norm_f(h))

    gm = dynamo_graph(toy(program), (tokens(),))
    (stream,) = analyze_(gm).streams
    assert stream.num_sublayers == 3
    assert [r.position for r in stream.depth_reads] == [1, 2, 3]


def test_a_region_that_cannot_be_inlined_is_named_in_the_report():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = torch.cond(h.sum() > 0, lambda h: h + m.mlp_1(h), lambda h: h + m.mlp_2(h), (h,))
        h = h + m.mlp_3(m.norm_3(h))
        return m.head(m.norm_f(h))

    assert "cond" in str(ax.inspect(toy(program), (tokens(),)))


def test_a_cast_that_changes_nothing_inside_an_exported_vmap_is_followed():
    """As masks are made: a function of two positions, over all of them."""

    def program(m, x):
        at = torch.arange(x.shape[1])
        visible = torch.vmap(lambda i: (i >= 0).to(i.device) & (at <= i).to(i.device))(at)
        h = m.embed(x)
        h += visible.float() @ m.attn_1(m.norm_1(h))  # what is written to is looked for in the whole graph
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    (stream,) = analyze_(captured(toy(program), (tokens(),), "export")).streams
    assert [r.position for r in stream.depth_reads] == [1, 2]
