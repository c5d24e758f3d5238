"""Norms and additions folded into reads: which ones, in every spelling, and that nothing else changes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from attnres_fx.ops import depth_attention
from attnres_fx.passes import (
    Lowering,
    fuse_norms_pass,
    fuse_partial_sums_pass,
    lower_,
    plan_norm_fusions,
    plan_sum_fusions,
    run_pass,
)
from attnres_fx.passes.graph.operations import op_name
from tests.support.lowered import NORMS_ONLY, D, assert_same, count, example, names
from tests.support.stream_text import SPELLINGS, captured

SUMS_ONLY = Lowering(fuse_norms=False, two_phase=False)


class Read(nn.Module):
    """A read of three values, then `program(self, read)`."""

    def __init__(self, program, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.program = program
        self.query = nn.Parameter(torch.randn(D).to(dtype))
        self.key = nn.Parameter(torch.randn(D).to(dtype))
        self.weight = nn.Parameter(torch.randn(D).to(dtype))
        self.square = nn.Parameter(torch.randn(D, D).to(dtype))
        self.bias = nn.Parameter(torch.randn(D).to(dtype))
        self.small = nn.Parameter(torch.tensor(1e-5, dtype=dtype))
        self.rms = nn.RMSNorm(D, eps=1e-3).to(dtype)
        self.rms_default = nn.RMSNorm(D).to(dtype)
        self.layer = nn.LayerNorm(D).to(dtype)
        self.layer_bare = nn.LayerNorm(D, elementwise_affine=False).to(dtype)
        for norm in (self.rms, self.layer):
            nn.init.normal_(norm.weight)
        nn.init.normal_(self.layer.bias)

    def forward(self, x):
        sources = [x, x.sin(), x.cos() + 1]
        return self.program(self, depth_attention(sources, self.query, self.key, gain=2.0))


def normalized(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def llama_style(m, h):
    dtype = h.dtype
    h = h.to(torch.float32)
    variance = h.pow(2).mean(-1, keepdim=True)
    return m.weight * (h * torch.rsqrt(variance + 1e-6)).to(dtype)


def t5_style(m, h):
    variance = h.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return m.weight * (h * torch.rsqrt(variance + 1e-6))


def gemma_style(m, h):
    return (normalized(h.float()) * (1.0 + m.weight.float())).type_as(h)


def meta_style(m, h):
    return normalized(h.float()).type_as(h) * m.weight


def divided(m, h):
    h = h.float()
    return h / torch.sqrt(torch.mean(h * h, dim=-1, keepdim=True) + 1e-5) * m.weight


def reciprocal(m, h):
    h = h.float()
    return m.weight * (h * (1 / torch.sqrt(torch.square(h).mean([-1], True) + 1e-5)))


def to_a_power(m, h):
    return h.float() * (1e-6 + h.float().square().mean(dim=2, keepdim=True)).pow(-0.5)


FUSED = {
    "nn.RMSNorm": (1, lambda m, h: m.rms(h)),
    "nn.RMSNorm, default eps": (1, lambda m, h: m.rms_default(h)),
    "nn.LayerNorm": (2, lambda m, h: m.layer(h)),
    "nn.LayerNorm, no weights": (2, lambda m, h: m.layer_bare(h)),
    "F.rms_norm": (1, lambda m, h: F.rms_norm(h, (D,), m.weight, 1e-5)),
    "F.rms_norm, no weight": (1, lambda m, h: F.rms_norm(h, (D,), eps=1e-5)),
    "F.rms_norm, weight after": (1, lambda m, h: m.weight * F.rms_norm(h, (D,), eps=1e-5)),
    "F.layer_norm": (2, lambda m, h: F.layer_norm(h, [D], m.weight, m.bias)),
    "F.layer_norm, no bias": (2, lambda m, h: F.layer_norm(h, [D], weight=m.weight, eps=1e-3)),
    "torch.layer_norm": (2, lambda m, h: torch.layer_norm(h, [D], m.weight, m.bias, 1e-3)),
    "native_layer_norm": (2, lambda m, h: torch.native_layer_norm(h, [D], m.weight, m.bias, 1e-3)[0]),
    "in float32": (2, lambda m, h: F.layer_norm(h.float(), (D,), m.weight.float(), m.bias.float()).type_as(h)),
    "Llama": (1, llama_style),
    "T5": (1, t5_style),
    "Gemma": (1, gemma_style),
    "Meta": (1, meta_style),
    "divided by the root": (1, divided),
    "reciprocal of the root": (1, reciprocal),
    "to a power": (1, to_a_power),
}


def lowered(module: nn.Module, args, spelling: str, lowering: Lowering) -> tuple[GraphModule, GraphModule]:
    gm = copy.deepcopy(captured(module, args, spelling))
    before = copy.deepcopy(gm)
    lower_(gm, lowering)
    gm.graph.lint()
    return before, gm


def arguments(gm: GraphModule, module: nn.Module, x: Tensor) -> list[Tensor]:
    """The inputs of a graph: parameters too, where Dynamo lifted them."""
    given = dict(module.named_parameters())
    found = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            own = [p for n, p in given.items() if str(node.target).endswith(f"_{n.replace('.', '_')}_")]
            own = own or [p for n, p in given.items() if f"parameters_{n.rpartition('.')[2]}_" in str(node.target)]
            found.append(own[0] if own else x)
    return found


def outcome(gm: GraphModule, module: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, and gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    given = arguments(gm, module, x) if any("arameters" in str(n.target) for n in gm.graph.nodes) else [x]
    owner = gm if given == [x] else module
    owner.zero_grad()
    outputs = [o for o in pytree.tree_leaves(gm(*given)) if o.is_floating_point()]
    sum((o.double() * (i + 1)).sin().sum() for i, o in enumerate(outputs)).backward()
    grads = {n.rpartition(".")[2]: p.grad for n, p in owner.named_parameters()}
    return [*outputs, x.grad, *(g for g in grads.values() if g is not None)]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("style", FUSED)
@pytest.mark.slow_after(1)
def test_a_norm_is_folded_in_whatever_its_spelling(style, spelling):
    kind, program = FUSED[style]
    module = Read(program)
    before, after = lowered(module, (example(),), spelling, NORMS_ONLY)
    (fusion,) = plan_norm_fusions(before)
    assert fusion.kind == kind
    assert count(after, "depth_attention_fused") == 1 and count(after, "depth_attention") == 0
    left = {"rms_norm", "layer_norm", "mean", "rsqrt", "sqrt", "reciprocal", "mul", "div"}
    assert not left & set(names(after))
    assert_same(outcome(after, module, example()), outcome(before, module, example()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("style", FUSED)
@pytest.mark.slow_after(1)
def test_the_result_keeps_the_dtype_the_graph_had(style, dtype):
    module = Read(FUSED[style][1], dtype)
    before, after = lowered(module, (example(dtype),), "export", NORMS_ONLY)
    wide = dtype == torch.float64 and any(str(n.args[1:]) == "(torch.float32,)" for n in before.graph.nodes)
    assert count(after, "depth_attention_fused") == (not wide)  # a float64 read is not normed in float32
    assert_same(after(example(dtype)), before(example(dtype)), 2e-2 if dtype == torch.bfloat16 else 1e-12)
    assert after(example(dtype))[0].dtype == before(example(dtype))[0].dtype


def test_bfloat16_norms_written_without_a_cast_stay():
    for program in (lambda m, h: m.weight * normalized(h), lambda m, h: normalized(h)):
        before, _ = lowered(Read(program, torch.bfloat16), (example(torch.bfloat16),), "export", NORMS_ONLY)
        assert plan_norm_fusions(before) == ()


def test_a_symbolic_graph_follows_its_sources_when_it_is_cast():
    module = Read(llama_style)
    _, after = lowered(module, (example(),), "symbolic", NORMS_ONLY)
    assert after.double()(example().double()).dtype == torch.float64


UNFUSED = {
    "another consumer": lambda m, h: m.layer(h) + h,
    "the read is returned": lambda m, h: (m.layer(h), h),
    "two norms": lambda m, h: m.layer(h) + m.rms(h),
    "another dimension": lambda m, h: h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6),
    "two dimensions": lambda m, h: h * torch.rsqrt(h.pow(2).mean((1, 2), keepdim=True) + 1e-6),
    "two normalized dimensions": lambda m, h: F.layer_norm(h, (5, D)),
    "not kept": lambda m, h: h * torch.rsqrt(h.pow(2).mean(-1).unsqueeze(-1) + 1e-6),
    "another power": lambda m, h: h * torch.rsqrt(h.pow(4).mean(-1, keepdim=True) + 1e-6),
    "a sum": lambda m, h: h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + 1e-6),
    "eps from a tensor": lambda m, h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + m.small),
    "eps with alpha": lambda m, h: h * torch.rsqrt(torch.add(h.pow(2).mean(-1, keepdim=True), 1e-6, alpha=2)),
    "no eps": lambda m, h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True)),
    "another value is scaled": lambda m, h: m.bias * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
    "scaled by the root": lambda m, h: h * torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
    "the statistic is used again": lambda m, h: (lambda r: h * r + r)(
        torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    ),
    "rounded on the way": lambda m, h: h * torch.rsqrt(h.bfloat16().pow(2).mean(-1, keepdim=True) + 1e-6),
    "the statistic of a layer norm": lambda m, h: torch.native_layer_norm(h, [D], m.weight, m.bias, 1e-3)[:2],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("miss", UNFUSED)
@pytest.mark.slow_after(1)
def test_what_is_not_quite_a_norm_stays(miss, spelling):
    module = Read(UNFUSED[miss])
    gm = copy.deepcopy(captured(module, (example(),), spelling))
    assert not run_pass(fuse_norms_pass, gm).modified
    assert count(gm, "depth_attention") == 1


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "product",
    [lambda m, h: normalized(h) * m.square[0:1], lambda m, h: normalized(h) * m.small],
    ids=["[1, D]", "a number"],
)
def test_a_weight_of_another_shape_stays_outside(product, spelling):
    module = Read(product)
    before, after = lowered(module, (example(),), spelling, NORMS_ONLY)
    assert [f.weight for f in plan_norm_fusions(before)] == [None]
    assert names(after).count("mul") == 1
    assert_same(outcome(after, module, example()), outcome(before, module, example()))


def test_a_weight_written_between_read_and_norm_keeps_the_norm():
    def program(m, h):
        m.weight.data.add_(1)
        return m.weight * normalized(h)

    gm = copy.deepcopy(captured(Read(program), (example(),), "dynamo"))
    assert plan_norm_fusions(gm) == ()


def test_a_norm_with_a_hook_stays():
    module = Read(FUSED["nn.LayerNorm"][1])
    gm = captured(module, (example(),), "symbolic")
    gm.get_submodule("layer").register_forward_hook(lambda *_: None)
    assert plan_norm_fusions(gm) == ()


def test_shape_and_dtype_of_the_read_are_asked_of_a_source():
    def program(m, h):
        return m.layer(h).reshape(h.shape[0], -1).to(h.dtype)

    module = Read(program)
    for spelling in SPELLINGS:
        before, after = lowered(module, (example(),), spelling, NORMS_ONLY)
        assert count(after, "depth_attention_fused") == 1
        assert_same(outcome(after, module, example()), outcome(before, module, example()))


# --- additions ---------------------------------------------------------------------------------------


class Sums(Read):
    """A read whose last source is what `program` makes of two values."""

    def forward(self, x):
        partial, delta = x.sin(), x.cos()
        total = self.program(self, partial, delta)
        read = depth_attention([x, total], self.query, self.key, gain=2.0)
        return self.layer(read) * total, total + delta


FOLDED = {
    "+": lambda m, p, d: p + d,
    "torch.add": lambda m, p, d: torch.add(p, d),
    "mixed": lambda m, p, d: p + d.bfloat16(),
    "alpha=1": lambda m, p, d: torch.add(p, d, alpha=1),
}
KEPT = {
    "alpha=2": lambda m, p, d: torch.add(p, d, alpha=2),
    "a difference": lambda m, p, d: p - d,
    "a vector": lambda m, p, d: p + m.bias,
    "a number": lambda m, p, d: p + 1.0,
    "another shape": lambda m, p, d: p + d[:1],
    "seen before": lambda m, p, d: (lambda t: (m.__dict__.__setitem__("seen", t.sin()), t)[1])(p + d),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("style", FOLDED)
def test_an_addition_is_folded_in(style, spelling):
    module = Sums(FOLDED[style])
    before, after = lowered(module, (example(),), spelling, SUMS_ONLY)
    assert len(plan_sum_fusions(before)) == 1
    assert names(before).count("add") - names(after).count("add") == 1
    assert_same(outcome(after, module, example()), outcome(before, module, example()))
    both = lowered(module, (example(),), spelling, Lowering())[1]
    assert count(both, "depth_attention_fused") == 1 and "layer_norm" not in names(both)
    assert_same(outcome(both, module, example()), outcome(before, module, example()))


@pytest.mark.parametrize("spelling", ["symbolic", "export"])
@pytest.mark.parametrize("miss", KEPT)
def test_what_is_no_plain_addition_stays(miss, spelling):
    gm = copy.deepcopy(captured(Sums(KEPT[miss]), (example(),), spelling))
    if miss == "seen before" and "sin" in names(gm):
        (total,) = (n for n in gm.graph.nodes if op_name(n) == "add" and len(n.users) > 2)
        with gm.graph.inserting_after(total):
            gm.graph.call_function(torch.sin, (total,))
    assert not run_pass(fuse_partial_sums_pass, gm).modified


def test_a_sum_that_stands_twice_among_the_sources_stays():
    class Twice(Read):
        def forward(self, x):
            total = x.sin() + x.cos()
            return depth_attention([total, x, total], self.query, self.key)

    assert plan_sum_fusions(captured(Twice(None), (example(),), "export")) == ()
