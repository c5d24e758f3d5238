"""Reads with a bias, a scale, normalised values or no key gain keep them through every lowering pass."""

import copy
import functools

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.ops.operator import DEPTH_ATTENTION
from attnres_fx.passes import Lowering, lower_
from attnres_fx.passes.graph.nodes import set_value, value_of
from tests.support.families import IDS
from tests.support.lowered import assert_same, count, fresh_gpt, with_queries
from tests.support.read_styles import STYLES


def styled(gm, style):
    """The graph with every read in another style; keys without gains, and random biases."""
    generator = torch.Generator().manual_seed(4)
    for i, node in enumerate([n for n in gm.graph.nodes if n.target is DEPTH_ATTENTION]):
        sources, query, gain, eps, factor = node.args
        bias = None
        if style.bias:
            made = torch.randn(len(sources), generator=generator)
            gm.register_parameter(f"bias_{i}", nn.Parameter(made))
            with gm.graph.inserting_before(node):
                bias = gm.graph.get_attr(f"bias_{i}")
                set_value(bias, value_of(query).new_empty(len(sources)), query)
        node.args = (sources, query, gain if style.key_gain else None, eps, factor, bias, style.scale, style.value_norm)
    gm.recompile()
    return gm


@functools.cache
def converted_gpt():
    """In float64: what the lowered form adds up in another order is seen at 1e-12."""
    config = ax.AttnResConfig(num_blocks=2)
    converted = with_queries(ax.convert(fresh_gpt(4).double(), (), {"ids": IDS}, config=config, check=False))
    for i, read in enumerate(converted.attnres.reads):
        nn.init.normal_(read.key_weight, 1, 0.3, generator=torch.Generator().manual_seed(i))
    return converted


@pytest.mark.parametrize("two_phase", [False, True])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_a_lowered_read_keeps_its_style(style, two_phase):
    converted = converted_gpt()
    plain = styled(copy.deepcopy(converted.graph_module(lowered=False)), style)
    lowered = copy.deepcopy(plain)
    lower_(lowered, Lowering(two_phase=two_phase, thread_gradients=True))
    assert count(lowered, "depth_attention") == 0
    assert (count(lowered, "depth_attention_merge") > 0) == (two_phase and not style.bias)
    leaves = converted.flatten_arguments(ids=IDS)
    results = []
    for gm in (lowered, plain, converted.graph_module(lowered=False)):
        gm.zero_grad()
        (out,) = gm(*leaves)
        out.double().sin().mean().backward()
        results.append([out, *(p.grad for p in gm.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    assert_same(results[0][:1], results[1][:1], 1e-12)
    assert_same(results[0][1:], results[1][1:], 1e-9)
    assert (results[1][0] - results[2][0]).abs().max() > 1e-3, "the style counts"
