"""Reads in every style on the Triton kernels, in Triton's interpreter: `python tests/support/read_style_kernels.py`."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.library import opcheck

from attnres_fx.ops import depth_attention, depth_attention_batch, kernels
from tests.support.read_styles import (
    STYLES,
    Style,
    compare,
    fused,
    fused_oracle,
    given,
    one_read,
    several_queries,
    two_phases,
)

BF16 = (8e-3, 2e-2)


def check_style(style: Style) -> None:
    inputs = given(style, 5)
    assert kernels.usable(inputs.sources)
    compare(inputs, one_read, lambda exact: [exact.oracle(0, gain=3.0)])
    compare(inputs, fused, fused_oracle)
    deep = given(style, 3, count=18)  # a chain of two groups
    compare(deep, one_read, lambda exact: [exact.oracle(0, gain=3.0)])
    half = given(style, 5, dtype=torch.bfloat16)
    compare(half, one_read, lambda exact: [exact.oracle(0, gain=3.0)], BF16)
    many = given(style, 5, queries=3)
    compare(many, several_queries, lambda exact: [exact.oracle(q) for q in range(3)])
    alone = given(style, 5)
    compare(alone, two_phases, lambda exact: [exact.oracle(0, gain=3.0)])
    single = given(style, 5, count=1)
    compare(single, one_read, lambda exact: [exact.oracle(0, gain=3.0)])
    gradient = torch.autograd.grad(one_read(single)[0].sum(), single.queries[0])[0]
    assert gradient.count_nonzero() == 0


def check_a_source_that_is_taken_out() -> None:
    inputs = given(Style(), 5)
    bias = torch.tensor([float("-inf"), 0.0, 0.0, 0.0], requires_grad=True)
    out = depth_attention(inputs.sources, inputs.queries[0], None, bias=bias)
    torch.testing.assert_close(out, depth_attention(inputs.sources[1:], inputs.queries[0], None))
    for gradient in torch.autograd.grad(out.sum(), [bias, *inputs.sources]):
        assert torch.isfinite(gradient).all()
    both = depth_attention_batch(inputs.sources, inputs.queries, None, bias=bias.unsqueeze(0))
    torch.testing.assert_close(both[0], out)


def check_compiled_reads() -> None:
    for run, queries in ((one_read, 1), (several_queries, 2)):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        gain = 3.0 if run is one_read else 1.0
        inputs = given(STYLES["all"], 5, queries=queries)
        compare(inputs, compiled, lambda exact, n=queries, g=gain: [exact.oracle(q, gain=g) for q in range(n)])


def check_registration() -> None:
    rows, weight = [torch.randn(5, 16) for _ in range(3)], torch.randn(16)
    bias = torch.randn(3)
    forward = (rows, weight, weight, 1e-6, 2.0, None, None, None, 0, None, None, 0.0, torch.float32, True, bias, True)
    assert set(opcheck(torch.ops.attnres_fx.read_forward, forward).values()) == {"SUCCESS"}
    out, _, lse, stats, norm_stats = torch.ops.attnres_fx.read_forward(*forward)
    backward = (out, None, [None] * 3, rows, weight, weight, 2.0, None, None, 0, None, None)
    backward = (*backward, lse, stats, norm_stats, [True] * 3, True, bias, True)
    assert set(opcheck(torch.ops.attnres_fx.read_backward, backward).values()) == {"SUCCESS"}


if __name__ == "__main__":
    for name, style in STYLES.items():
        check_style(style)
        print(f"{name}: ok")
    check_a_source_that_is_taken_out()
    check_compiled_reads()
    check_registration()
    print("the rest: ok")
