"""Fused additions are split: function, values and metadata stay."""

import pytest
import torch
from torch import nn

from attnres_fx.passes import (
    unfuse_additions_pass,
)
from tests.support.pass_checks import (
    TrueValues,
    check_idle,
    check_metadata,
    check_pass,
    exported,
    graph_text,
    symbolic,
)
from tests.support.stream_text import assert_near, captured, dedented, rows

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
FUSED = {
    "addmm": lambda h: torch.addmm(h[0], h[0].relu() @ WEIGHT, WEIGHT),
    "addmm, scaled": lambda h: torch.addmm(h[0], h[0].relu() @ WEIGHT, WEIGHT, beta=0.5, alpha=2.0),
    "addmm, method": lambda h: h[0].addmm(h[0].relu() @ WEIGHT, WEIGHT),
    "addmm, keywords": lambda h: torch.addmm(h[0], mat1=h[0].relu() @ WEIGHT, mat2=WEIGHT),
    "baddbmm": lambda h: torch.baddbmm(h, h.relu(), WEIGHT.expand(2, 8, 8), alpha=3.0),
    "addcmul": lambda h: torch.addcmul(h, h @ WEIGHT, h.relu(), value=0.5),
    "addcmul, a row": lambda h: torch.addcmul(h, h @ WEIGHT, WEIGHT[0]),
    "addcmul, spread over the tokens": lambda h: torch.addcmul(h, h.mean(1, keepdim=True) @ WEIGHT, WEIGHT[0]),
    "addcdiv": lambda h: torch.addcdiv(h, h @ WEIGHT, h.exp(), value=-1.0),
    "sum of a list": lambda h: sum([h, h @ WEIGHT, h.relu() @ WEIGHT]),
    "sum of masks": lambda h: sum([h > 0, h > 0.5, h > 1.0]) * (h @ WEIGHT),
    "a float zero and an integer": lambda h: 0.0 + (h > 0).long(),
}


def test_a_fused_addition_is_split_and_a_bias_is_not():
    def program(h):
        f = torch.addmm(WEIGHT[0], h, WEIGHT)
        return torch.addmm(h, f, WEIGHT, beta=0.5, alpha=2.0)

    gm = symbolic(program, rows()[0])
    unfuse_additions_pass(gm)
    assert graph_text(gm) == dedented("""
        addmm = addmm(_tensor_constant0, h, _tensor_constant1)
        mm = mm(addmm, _tensor_constant1)
        mul = mul(h, 0.5)
        add = add(mul, mm, alpha=2.0)
        return add
    """)


def test_the_zero_of_a_sum_goes():
    gm = symbolic(lambda h: sum([h, h.relu()]), rows())
    unfuse_additions_pass(gm)
    assert graph_text(gm) == dedented("""
        relu = relu(h)
        add_1 = add(h, relu)
        return add_1
    """)


class Alone(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, h):
        return self.program(h)


@pytest.mark.parametrize("spelling", ["symbolic", "export"])
@pytest.mark.parametrize("name", FUSED)
def test_unfusing_keeps_the_function_and_true_values(name, spelling):
    gm = captured(Alone(FUSED[name]), (rows(),), spelling)
    expected = gm(rows())
    unfuse_additions_pass(gm)
    gm.graph.lint()
    gm.recompile()
    assert_near(gm(rows()), expected, 1e-6)
    TrueValues(gm).run(rows())
    check_idle(unfuse_additions_pass, gm)


def test_unfusing_keeps_metadata():
    def program(m, x):
        return torch.addcmul(x, m.attn_1(x), m.carry, value=0.5)

    check_metadata(check_pass(unfuse_additions_pass, exported(program, rows()), [rows()]), "inner")


def test_an_addend_that_the_product_does_not_hang_on_stays():
    def program(h, other):
        return torch.baddbmm(h, other, other) + torch.addcmul(h, other, other)

    check_idle(unfuse_additions_pass, symbolic(program, torch.randn(2, 5, 5), torch.randn(2, 5, 5)))
