"""Reads with a bias a source, a scale, normalised values, no key gain, or several queries, against float64."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from attnres_fx.errors import OperatorError
from attnres_fx.ops import (
    depth_attention,
    depth_attention_batch,
    depth_attention_fused,
    depth_attention_merge,
    depth_weights,
)
from attnres_fx.ops.operator import DEPTH_ATTENTION
from tests.support.operator_oracle import oracle_weights, worst_ratio
from tests.support.paths import ROOT
from tests.support.read_styles import (
    STYLES,
    compare,
    fused,
    fused_oracle,
    given,
    one_read,
    several_queries,
    two_phases,
)

EXACT = (1e-12, 1e-11)
every_style = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def right(inputs):
    return [inputs.oracle(0, gain=3.0)]


def taken_apart(style, leaves, count, options):
    """The read of one query, from its tensors in the order of `Given.leaves`."""
    sources, (query, *rest) = list(leaves[:count]), leaves[count:]
    gain = rest.pop(0) if style.key_gain else None
    bias = rest.pop(0)[0] if style.bias else None
    return depth_attention(sources, query, gain, bias=bias, **options)


@every_style
def test_a_read_and_its_gradients_are_those_of_float64(style):
    compare(given(style, 3, 5), one_read, right)
    compare(given(style, 3, 5, dtype=torch.bfloat16), one_read, right, (8e-3, 2e-2))
    compare(given(style, 3, 5).exact(), one_read, right, EXACT)


@every_style
def test_a_normed_read_and_several_queries_and_two_phases_are_too(style):
    compare(given(style, 5), fused, fused_oracle)
    compare(given(style, 5, queries=3), several_queries, lambda exact: [exact.oracle(q) for q in range(3)])
    compare(given(style, 5), two_phases, right)
    compare(given(style, 5, dtype=torch.bfloat16), two_phases, right, (8e-3, 2e-2))


@every_style
def test_the_weights_over_depth_are_those_of_float64(style):
    inputs, (gain,) = given(style, 5), given(style, 5).gains or (None,)
    found = depth_weights(inputs.sources, inputs.queries[0], gain, bias=inputs.bias_of(0), scale=style.scale)
    exact = oracle_weights(inputs.sources, inputs.queries[0], gain, bias=inputs.bias_of(0), scale=style.scale)
    assert worst_ratio(found, exact) <= 1e-5


@every_style
def test_one_source_has_no_gradient_of_query_and_bias(style):
    inputs = given(style, 5, count=1)
    compare(inputs, one_read, right)
    weights = [*inputs.queries, *(() if inputs.bias is None else (inputs.bias,))]
    for gradient in torch.autograd.grad(one_read(inputs)[0].square().sum(), weights):
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("style", [STYLES["all"], STYLES["Inkling"]], ids=["all", "Inkling"])
@pytest.mark.slow
def test_compiled_reads_are_those_of_float64(style, backend):
    compiled = torch.compile(one_read, backend=backend, fullgraph=True)
    compare(given(style, 3, 5), compiled, right)
    compiled = torch.compile(several_queries, backend=backend, fullgraph=True)
    compare(given(style, 5, queries=3), compiled, lambda exact: [exact.oracle(q) for q in range(3)])


@every_style
def test_gradients_of_gradients_are_those_of_float64(style):
    inputs = given(style, 2, count=2, width=6).exact()

    def read(*leaves):
        return taken_apart(style, leaves, 2, inputs.options)

    assert torch.autograd.gradgradcheck(read, inputs.leaves)


class Reader(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.options, self.count = inputs.options, len(inputs.queries)
        self.queries = nn.ParameterList(inputs.queries)
        self.gains = None if inputs.gains is None else nn.ParameterList(inputs.gains)
        self.bias = None if inputs.bias is None else nn.Parameter(inputs.bias)

    def forward(self, *sources):
        gains = None if self.gains is None else list(self.gains)
        outputs = depth_attention_batch(list(sources), list(self.queries), gains, bias=self.bias, **self.options)
        gain, bias = None if gains is None else gains[0], None if self.bias is None else self.bias[0]
        return [
            depth_attention(list(sources), self.queries[0], gain, bias=bias, **self.options),
            *outputs[: self.count],
        ]


@every_style
def test_an_exported_read_is_one_node_and_computes_the_same(style):
    inputs = given(style, 3, 5, queries=2)
    reader, sources = Reader(inputs), tuple(s.detach() for s in inputs.sources)
    program = torch.export.export(reader, sources)
    assert [n.target for n in program.graph.nodes].count(DEPTH_ATTENTION) == 1
    found = program.module()(*sources)
    for one, query in zip(found, (0, 0, 1), strict=True):
        assert worst_ratio(one, inputs.exact().oracle(query)) <= 1e-5
    below = program.run_decompositions()
    assert DEPTH_ATTENTION not in [n.target for n in below.graph.nodes]
    torch.testing.assert_close(below.module()(*sources), found)


@every_style
def test_vmap_over_sources_queries_and_biases_is_a_loop(style):
    many = [given(style, 5) for _ in range(3)]
    for i, one in enumerate(many):
        for leaf in one.leaves:
            leaf.data.mul_(1 + 0.1 * i)
    stacked = [torch.stack(group) for group in zip(*(m.leaves for m in many), strict=True)]

    def read(*leaves):
        return taken_apart(style, leaves, len(many[0].sources), many[0].options)

    found = torch.vmap(read)(*stacked)
    for one, inputs in zip(found, many, strict=True):
        assert worst_ratio(one, inputs.exact().oracle(0)) <= 1e-5
    gradients = torch.vmap(torch.func.grad(lambda *leaves: read(*leaves).square().sum(), tuple(range(len(stacked)))))
    for i, inputs in enumerate(many):
        exact = inputs.exact()
        wanted = torch.autograd.grad(exact.oracle(0).square().sum(), exact.leaves)
        for one, other in zip(gradients(*stacked), wanted, strict=True):
            assert worst_ratio(one[i], other) <= 1e-4


@every_style
def test_vmap_over_several_queries_is_a_loop(style):
    many = [given(style, 5, queries=2) for _ in range(2)]
    for leaf in many[1].leaves:
        leaf.data.mul_(1.1)
    count = len(many[0].sources)

    def read(*leaves):
        bias = leaves[-1] if style.bias else None
        gains = list(leaves[count + 2 : count + 4]) if style.key_gain else None
        outputs = depth_attention_batch(
            list(leaves[:count]), list(leaves[count : count + 2]), gains, bias=bias, **many[0].options
        )
        return outputs[0], outputs[1]

    stacked = [torch.stack(group) for group in zip(*(m.leaves for m in many), strict=True)]
    for query, found in enumerate(torch.vmap(read)(*stacked)):
        for one, inputs in zip(found, many, strict=True):
            assert worst_ratio(one, inputs.exact().oracle(query)) <= 1e-5


def test_a_bias_of_minus_infinity_takes_a_source_out():
    inputs = given(STYLES["no key gain"], 5)
    bias = torch.tensor([float("-inf"), 0.0, 0.0, 0.0], requires_grad=True)
    out = depth_attention(inputs.sources, inputs.queries[0], None, bias=bias)
    torch.testing.assert_close(out, depth_attention(inputs.sources[1:], inputs.queries[0], None))
    for gradient in torch.autograd.grad(out.sum(), [bias, *inputs.sources]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": torch.zeros(2)}, ["bias", "(2,)", "(3,)"]),
        ({"bias": torch.zeros(3, dtype=torch.int64)}, ["bias", "int64"]),
        ({"bias": [0.0, 0.0, 0.0]}, ["bias", "list"]),
        ({"scale": float("nan")}, ["scale", "finite"]),
        ({"scale": float("inf")}, ["scale", "finite"]),
    ],
)
def test_what_does_not_fit_is_named(options, words):
    sources, weight = [torch.randn(2, 8) for _ in range(3)], torch.ones(8)
    fits = {"bias": torch.zeros(1, 2)} if "bias" in options else options
    for call in (
        lambda: depth_attention(sources, weight, weight, **options),
        lambda: depth_attention_fused(sources, weight, weight, **options),
        lambda: depth_attention_batch(sources, [weight], None, **fits),
        lambda: depth_attention_merge(sources[0], torch.zeros(2), sources[1], weight, weight, **options),
    ):
        with pytest.raises(OperatorError) as caught:
            call()
        assert all(w in str(caught.value) for w in words[:1]), caught.value
    with pytest.raises(OperatorError) as caught:
        depth_attention(sources, weight, weight, **options)
    assert all(w in str(caught.value) for w in words), caught.value


def test_keys_without_gains_are_none_and_no_empty_list():
    with pytest.raises(OperatorError, match="None"):
        depth_attention_batch([torch.randn(2, 8)], [torch.ones(8)], [])


@pytest.mark.slow
def test_every_style_on_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "tests/support/read_style_kernels.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.split() == [w for name in (*STYLES, "the rest") for w in f"{name}: ok".split()]
