"""Norms and additions folded into reads: which ones, in every spelling, and that nothing else changes."""

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
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
from tests.support.families import FAMILIES, GROUPED, TEXT, family, widened
from tests.support.lowered import assert_same, count, names, run_both, with_queries
from tests.support.stream_text import SPELLINGS, captured

D = 16
NORMS_ONLY = Lowering(fuse_partial_sums=False, two_phase=False)
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


def example(dtype=torch.float32):
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0)).to(dtype)


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


# --- whole models ------------------------------------------------------------------------------------


def example_gpt():
    torch.manual_seed(0)
    return widened(SmallGPT(GPTConfig(vocabulary=96, layers=3, heads=2, width=32, context=16)))


MODELS = {
    "llama": FAMILIES["llama"],
    "gpt2": FAMILIES["gpt2"],
    "qwen3": FAMILIES["qwen3"],
    "gemma": lambda: family("gemma", TEXT, 4, head_dim=8, **GROUPED),
    "t5": FAMILIES["t5"],
    "example": lambda: (example_gpt(), {"ids": TEXT["input_ids"]}, 6),
}


@functools.cache
def fused_model(kind):
    """Converted once for both of its modes."""
    model, kwargs, reads = MODELS[kind]()
    return with_queries(ax.convert(model, (), kwargs, lowering=Lowering(two_phase=False))), kwargs, reads


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.slow
def test_every_read_that_feeds_one_norm_is_fused(kind, mode):
    converted, kwargs, reads = fused_model(kind)
    gm = converted.graph_module(mode, lowered=True)
    assert count(gm, "depth_attention_fused") == reads
    assert count(gm, "depth_attention") == 0
    assert count(converted.graph_module(mode), "depth_attention") == reads
    assert_same(*run_both(converted.eval(), kwargs))


@pytest.mark.parametrize("spelling", ["symbolic", "export"])
def test_the_example_is_fused_from_its_other_spellings(spelling):
    model, ids = example_gpt(), TEXT["input_ids"]
    given = torch.fx.symbolic_trace(model) if spelling == "symbolic" else torch.export.export(model, (ids,))
    converted = with_queries(ax.convert(given, (ids,), lowering=Lowering(two_phase=False)))
    assert count(converted.graph_module(lowered=True), "depth_attention_fused") == 6
    assert_same(*run_both(converted, {"ids": ids}))


@pytest.mark.slow
def test_post_norm_streams_fuse_only_without_gates():
    model, kwargs, reads = FAMILIES["bert"]()
    gated = ax.convert(model, (), kwargs)
    assert count(gated.graph_module(lowered=True), "depth_attention_fused") == 0
    free = with_queries(ax.convert(model, (), kwargs, config=ax.AttnResConfig(output="mean", variant="full")))
    fused = count(free.graph_module(lowered=True), "depth_attention_fused")
    assert fused == reads
    assert_same(*run_both(free, kwargs))


def test_lowering_twice_changes_nothing():
    converted = ax.convert(example_gpt(), (TEXT["input_ids"],))
    gm = converted.graph_module(lowered=True)
    assert not any(r.modified for r in lower_(gm))


def test_an_unrelated_graph_is_left_alone():
    gm = captured(example_gpt(), (TEXT["input_ids"],), "export")
    before = str(gm.graph)
    assert not any(r.modified for r in lower_(gm))
    assert str(gm.graph) == before


def test_inserted_nodes_carry_values_and_where_they_come_from():
    gm = ax.convert(example_gpt(), (TEXT["input_ids"],)).graph_module(lowered=True)
    fused = [n for n in gm.graph.nodes if op_name(n) == "attnres_fx::depth_attention_fused"]
    assert fused
    for node in fused:
        assert [tuple(v.shape)[-1] for v in node.meta["val"]] == [32] * len(node.meta["val"])
        assert node.meta["nn_module_stack"] and "small_gpt" in node.meta["stack_trace"]
        assert all("val" in u.meta for u in node.users)


# --- the converted model stays what it was -----------------------------------------------------------


@pytest.mark.slow
def test_parameters_state_and_reports_do_not_know_of_the_lowering():
    model, ids = example_gpt(), TEXT["input_ids"]
    plain = ax.convert(model, (ids,), lowering=Lowering(fuse_norms=False, fuse_partial_sums=False, two_phase=False))
    fused = ax.convert(model, (ids,), lowering=Lowering(two_phase=True))
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in fused.named_parameters()]
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in fused.named_modules()]
    assert str(plain.report) == str(fused.report)
    assert str(plain.graph_module().graph) == str(fused.graph_module().graph)
    assert str(ax.depth_weights(plain, (ids,))) == str(ax.depth_weights(fused, (ids,)))
    assert_same([fused(ids)], [plain(ids)])


@pytest.mark.slow
def test_copies_pickles_files_and_replaced_parameters_run_lowered(tmp_path):
    ids = TEXT["input_ids"]
    converted = with_queries(ax.convert(example_gpt(), (ids,), lowering=NORMS_ONLY))
    expected = converted(ids)
    converted.save(tmp_path / "model.pt")
    for other in (
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        ax.load(tmp_path / "model.pt"),
    ):
        assert other.lowering == NORMS_ONLY
        assert count(other.graph_module(lowered=True), "depth_attention_fused") == 6
        assert_same([other(ids)], [expected])
        with torch.no_grad():
            other.norm.weight.mul_(2)
        assert_same([other(ids)], [expected + other_bias(other, expected)], 1e-5)
    assert_same([converted(ids)], [expected])
    doubled = {n: 2 * p for n, p in converted.named_parameters() if n in ("norm.weight", "norm.bias")}
    assert_same([torch.func.functional_call(converted, doubled, (ids,))], [2 * expected], 1e-5)


def other_bias(converted, expected):
    """What doubling the last norm's weight adds, its bias being zero."""
    assert not converted.norm.bias.any()
    return expected


def test_a_norm_module_that_is_replaced_or_hooked_is_called_again():
    ids = TEXT["input_ids"]
    converted = ax.convert(torch.fx.symbolic_trace(example_gpt()), (ids,))
    seen = []
    handle = converted.norm.register_forward_hook(lambda *_: seen.append(1))
    converted(ids)
    assert seen == [1]
    handle.remove()
    converted(ids)
    assert seen == [1]
    converted.norm = nn.Identity()
    hidden = converted.graph_module()(ids)
    assert torch.equal(converted(ids), hidden)


@pytest.mark.parametrize("traced", [False, True], ids=["export", "symbolic"])
def test_autocast_gives_the_dtype_it_gave(traced):
    model, ids = example_gpt(), TEXT["input_ids"]
    converted = with_queries(ax.convert(torch.fx.symbolic_trace(model) if traced else model, (ids,)))
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = pytree.tree_leaves(converted(ids))
        (expected,) = pytree.tree_leaves(converted.graph_module()(ids))
    assert_same([found], [expected], 5e-2)


# --- the backend -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_backend_fuses_and_explains():
    model, ids = example_gpt(), TEXT["input_ids"]
    converted = with_queries(ax.convert(model, (ids,)))
    torch._dynamo.reset()
    ax.compile(model, (ids,), inner="aot_eager", lowering=Lowering(two_phase=False))
    for read, other in zip(model.attnres.reads, converted.attnres.reads, strict=True):
        read.load_state_dict(other.state_dict())
    assert_same([model(ids)], [converted(ids)])
    graph = ax.explain(model).graphs[-1]
    assert any(c.startswith("fuse_norms_pass") and "+" in c for c in graph.changed)
    assert "fuse_norms_pass" in str(ax.explain(model))


class Written(nn.Module):
    """The norm that models of transformers have: its eps is an attribute, which Dynamo makes an input of."""

    def __init__(self, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(D)), eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class WrittenStack(nn.Module):
    def __init__(self, eps):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(Written(eps) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        return self.norms[-1](x)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.slow
def test_an_eps_that_dynamo_made_an_input_is_known_and_guarded(inner):
    torch._dynamo.reset()
    model = WrittenStack(1e-3)
    expected = WrittenStack(1e-3)
    ax.compile(model, (example(),), inner=inner)
    for eps in (1e-3, 0.5, 1e-3):
        for norm in (*model.norms, *expected.norms):
            norm.eps = eps
        assert_same([model(example())], [expected(example())], 1e-5)
        assert any("+2 attnres_fx::depth_attention_fused" in c for c in ax.explain(model).graphs[-1].changed)
    assert len({g.changed for g in ax.explain(model).graphs}) == 1


@pytest.mark.parametrize("lowering", [{"fuse_norms": False, "two_phase": False}, Lowering(), None], ids=str)
@pytest.mark.slow
def test_options_of_the_backend_choose_the_passes(lowering):
    model, ids = example_gpt(), TEXT["input_ids"]
    torch._dynamo.reset()
    ax.attach(model, (ids,))
    options = {"inner": "aot_eager"} | ({} if lowering is None else {"lowering": lowering})
    torch.compile(model, backend="attnres", options=options)(ids)
    changed = " ".join(ax.explain(model).graphs[-1].changed)
    assert ("fuse_norms_pass" in changed) == (not isinstance(lowering, dict))


@pytest.mark.slow
def test_a_converted_model_compiles_with_the_backend():
    ids = TEXT["input_ids"]
    plain = Lowering(fuse_norms=False, fuse_partial_sums=False, two_phase=False)
    for lowering in (plain, Lowering()):
        converted = with_queries(ax.convert(example_gpt(), (ids,), lowering=lowering))
        torch._dynamo.reset()
        run = torch.compile(converted, backend="attnres", options={"inner": "aot_eager"}, fullgraph=True)
        assert_same([run(ids)], [converted(ids)])


@pytest.mark.parametrize(
    "call",
    [
        lambda: Lowering(fuse_norms=1),
        lambda: Lowering(fuse_partial_sums=None),
        lambda: Lowering(two_phase="always"),
        lambda: Lowering(two_phase=1),
        lambda: ax.convert(example_gpt(), (TEXT["input_ids"],), lowering="all"),
        lambda: ax.convert(example_gpt(), (TEXT["input_ids"],), lowering={"fuse_everything": True}),
        lambda: ax.compile(example_gpt(), (TEXT["input_ids"],), lowering=3),
    ],
    ids=range(7),
)
def test_wrong_switches_are_refused(call):
    with pytest.raises(ax.AttnResError, match="owering"):
        call()
