"""Operations counted on a graph are those of a real run."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnres_fx.partition.costs.flops import Flops, count_flops
from attnres_fx.partition.costs.unit_graph import graph_facts
from tests.support.measured import IDS, gpt, gpt_costs, llama, llama_costs, measured, mixtral
from tests.support.original_parts import counted, decoder_parts, gpt_parts, traced


def mixtral_costs():
    return measured(mixtral(), input_ids=IDS, use_cache=False)


@pytest.mark.parametrize(
    ("build", "costs_of", "parts"),
    [(gpt, gpt_costs, gpt_parts), (llama, llama_costs, decoder_parts), (mixtral, mixtral_costs, decoder_parts)],
    ids=["gpt", "llama", "mixtral"],
)
@pytest.mark.slow
def test_flops_of_every_unit_are_those_of_a_real_run(build, costs_of, parts):
    model, costs = build(), costs_of()
    if build is mixtral:
        model.set_experts_implementation("eager")  # one product for each expert, on the rows it really got
    before, layers, after, _ = parts(model)
    batch, length = IDS.shape
    again = 2 * batch * length * length * 32  # flash attention computes the scores a second time, over all heads
    given = IDS
    for unit, (function, found) in enumerate(
        zip([before, *layers, after], [costs.before, *costs.sublayers, costs.after], strict=True)
    ):
        given, forward, backward = counted(function, given)
        is_attention = unit % 2 == 1 and 0 < unit <= len(layers)
        assert found.forward_flops == forward, found.name
        assert found.backward_flops == backward + (again if is_attention else 0), found.name
    assert costs.sublayers[1].forward_flops > 0


class Calls(nn.Module):
    """One product in each of many spellings, on parameters of fitting sizes."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 5, 4))
        self.b = nn.Parameter(torch.randn(3, 4, 6))
        self.w = nn.Parameter(torch.randn(7, 4))
        self.bias = nn.Parameter(torch.randn(7))


SPELLINGS = {
    "matmul": lambda m, x: x @ m.w.T,
    "batched matmul": lambda m, x: torch.matmul(m.a, m.b),
    "broadcast matmul": lambda m, x: torch.matmul(x[:, None], m.b),
    "einsum": lambda m, x: torch.einsum("bte,oe->bto", x, m.w),
    "einsum of three": lambda m, x: torch.einsum("bte,oe,bo->bt", x, m.w, m.a[:, 0, :1].expand(3, 7)),
    "linear with bias": lambda m, x: F.linear(x, m.w, m.bias),
    "addmm": lambda m, x: torch.addmm(m.bias, x[0], m.w.T),
    "baddbmm": lambda m, x: torch.baddbmm(m.a[:, :, :1], m.a, m.b),
    "convolution": lambda m, x: F.conv1d(x.transpose(1, 2), m.w[:, :, None].expand(7, 4, 3), m.bias, padding=1),
    "transposed convolution": lambda m, x: F.conv_transpose1d(x.transpose(1, 2), m.w.T[:, :, None].expand(4, 7, 2)),
    "in place": lambda m, x: (x * 1).addmm_(m.b[0], m.b[0].T) if x.dim() == 2 else (x @ m.b).add_(1),
    "frozen input": lambda m, x: F.linear(x.detach(), m.w),
    "frozen weight": lambda m, x: F.linear(x * m.a[:, :, :1].sum(1, keepdim=True), m.w.detach()),
    "without gradients": lambda m, x: no_grad_product(m, x),
}


def no_grad_product(m, x):
    with torch.no_grad():
        table = x @ m.b
    return table * m.b.sum()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_product_counts_as_it_runs(spelling):
    class Spelled(Calls):
        def forward(self, x):
            return SPELLINGS[spelling](self, x * 1)

    model = Spelled()
    x = torch.randn(3, 5, 4)
    gm, nodes = traced(model, x)
    found = count_flops(nodes, differentiable=graph_facts(gm).differentiable)
    with FlopCounterMode(display=False) as forward:
        out = model(x)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert found == Flops(forward.get_total_flops(), backward.get_total_flops())
    assert found.forward > 0


def grouped(rows, weight, offsets):
    return F.grouped_mm(rows, weight, offs=offsets)


def test_a_grouped_product_counts_its_rows_once_each():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 16, 24, dtype=torch.bfloat16))

        def forward(self, rows, offsets):
            return grouped(rows, self.weight, offsets)

    gm, nodes = traced(Grouped(), torch.randn(40, 16).bfloat16(), torch.tensor([8, 16, 30, 40], dtype=torch.int32))
    forward = 2 * 40 * 16 * 24
    assert count_flops(nodes, differentiable=frozenset()) == Flops(forward, 0)
    facts = graph_facts(gm)
    assert count_flops(nodes, differentiable=facts.differentiable) == Flops(forward, forward)
    assert count_flops(nodes, differentiable=frozenset(nodes)) == Flops(forward, 2 * forward)


def test_a_depthwise_convolution_costs_no_more_backward_than_twice_its_forward():
    class Depthwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 1, 4))

        def forward(self, x):
            return F.conv1d(x * self.weight.sum(), self.weight, groups=16)

    _, nodes = traced(Depthwise(), torch.randn(2, 16, 11))
    gm, nodes = traced(Depthwise(), torch.randn(2, 16, 11))
    found = count_flops(nodes, differentiable=graph_facts(gm).differentiable)
    products = 2 * 16 * 8 * 4  # batch, channels, positions, taps
    assert found == Flops(2 * products, 4 * products)


def test_attention_counts_as_flash_attention_causal_or_not_and_with_shared_heads():
    for causal in (True, False):

        def attend(q, k, v, causal=causal):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

        class Attend(nn.Module):
            def forward(self, q, k, v, run=attend):
                return run(q, k, v)

        _, nodes = traced(Attend(), torch.randn(2, 8, 10, 16), torch.randn(2, 2, 10, 16), torch.randn(2, 2, 10, 12))
        pairs = 2 * 2 * 8 * 10 * 10  # operations, batch, heads, pairs of positions: a product is that times its width
        forward, backward = pairs * (16 + 12), pairs * (3 * 16 + 2 * 12)
        assert count_flops(nodes, differentiable=frozenset()) == Flops(forward, 0)
        assert count_flops(nodes, differentiable=frozenset(nodes)) == Flops(forward, backward)


def test_an_operation_without_a_formula_is_named(caplog):
    library = torch.library.Library("cost_test", "FRAGMENT")
    library.define("product(Tensor x) -> Tensor")
    library.impl("product", lambda x: x @ x, "CompositeExplicitAutograd")
    torch.library.register_fake("cost_test::product", torch.empty_like, lib=library)

    class Product(nn.Module):
        def forward(self, x):
            return torch.ops.cost_test.product(x)

    _, nodes = traced(Product(), torch.randn(3, 3))
    with caplog.at_level(logging.INFO, "attnres_fx"):
        assert count_flops(nodes, differentiable=frozenset()) == Flops()
    assert "cost_test.product.default is not counted" in caplog.text
