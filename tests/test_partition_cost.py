"""Costs measured on a graph are what the same model costs when it runs, counted by independent means."""

import dataclasses
import json
import logging
import resource
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import attnres_fx as ax
from attnres_fx.partition import cost
from attnres_fx.partition.activations import saved_bytes
from attnres_fx.partition.bodies import extract_body, graph_facts
from attnres_fx.partition.cost import measure_costs
from attnres_fx.partition.flops import Flops, count_flops
from attnres_fx.partition.given_costs import costs_from_dict, costs_to_dict
from attnres_fx.partition.model_costs import CarriedValue, ModelCosts, StreamCost, SublayerCost
from attnres_fx.passes.inline_regions import inline_regions_pass
from examples.small_gpt import GPTConfig, SmallGPT

IDS = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class ChainInOrder:
    """The units of a converted graph, cut where its terms are written in the order of execution.

    Enough for a model with one stream and variant "full", whose last read names every term.
    """

    def __init__(self, gm, replacements):
        by_name = {n.name: n for n in gm.graph.nodes}
        terms = [by_name[name] for _, name in replacements[-1].sources]
        ends = [*terms[:-1], by_name[replacements[-1].node]]
        floating = {n for n in gm.graph.nodes if n.op == "placeholder"}
        for node in gm.graph.nodes:
            if node.op == "call_function" and floating.issuperset(node.all_input_nodes):
                floating.add(node)
        self.units = [[] for _ in range(len(ends) + 1)]
        at = 0
        for node in gm.graph.nodes:
            if node.op != "call_function" or (node in floating and node.target is not torch.ops.aten.copy_.default):
                continue
            self.units[at].append(node)
            if at < len(ends) and node is ends[at]:
                at += 1
        self.num_sublayers = len(ends) - 1
        self.names = ("first", *(r.read for r in replacements[:-1]))
        self.streams = (SimpleNamespace(name="stream", first=0, count=self.num_sublayers),)

    def members(self, unit):
        return self.units[unit + 1]


def measured(model, *args, **kwargs):
    converted = ax.convert(model, args, kwargs, config=ax.AttnResConfig(variant="full"), check=False)
    mode = "train" if model.training else "eval"
    gm = converted.graph_module(mode)
    return measure_costs(gm, ChainInOrder(gm, converted.replacements(mode)))


def gpt():
    torch.manual_seed(0)
    return SmallGPT(GPTConfig(vocabulary=64, layers=2, heads=4, width=32, context=64))


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def mixtral(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).to(dtype)


def gpt_parts(model):
    """Embedding, sublayers and head of the original, each a function of a tensor."""
    before = lambda ids: model.token(ids) + model.position(torch.arange(ids.shape[1]))  # noqa: E731
    layers = []
    for block in model.blocks:
        layers.append(lambda h, b=block: b.attention(b.attention_norm(h)))
        layers.append(lambda h, b=block: b.mlp(b.mlp_norm(h)))
    return before, layers, lambda h: model.head(model.norm(h)), ()


def decoder_parts(model):
    inner, length = model.model, IDS.shape[1]
    rotary = inner.rotary_emb(torch.empty(1, length, 32), torch.arange(length)[None])
    mask = torch.full((2, 1, length, length), float("-inf")).triu(1)  # as numbers: attention would make them of a bool
    layers = []
    for layer in inner.layers:
        attend = {"position_embeddings": rotary, "attention_mask": mask}
        layers.append(lambda h, y=layer, a=attend: y.self_attn(y.input_layernorm(h), **a)[0])
        layers.append(lambda h, y=layer: y.mlp(y.post_attention_layernorm(h)))
    return inner.embed_tokens, layers, lambda h: model.lm_head(inner.norm(h)), (mask, *rotary)


def counted(function, given):
    """Forward and backward operations of a real run. Attention runs as its definition: two products, four back."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            out = function(given)
        with FlopCounterMode(display=False) as backward:
            out.backward(torch.ones_like(out))
    return out.detach().requires_grad_(), forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(
    ("build", "parts"), [(gpt, gpt_parts), (llama, decoder_parts), (mixtral, decoder_parts)], ids=lambda f: f.__name__
)
def test_flops_of_every_unit_are_those_of_a_real_run(build, parts):
    model = build()
    costs = measured(model, IDS) if build is gpt else measured(model, input_ids=IDS, use_cache=False)
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


def traced(function, *args):
    gm = torch.export.export(function, args, strict=False).module()
    inline_regions_pass(gm)
    return gm, list(gm.graph.nodes)


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


# --- memory ------------------------------------------------------------------------------------------


def kept_in_a_run(function, elsewhere, given):
    """Bytes that autograd is given to save when the function runs compiled by AOTAutograd's own backend.

    Returns them without the input's and what is kept `elsewhere`, and the input's, 0 where it is not saved.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    known = {p.untyped_storage().data_ptr() for p in elsewhere}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = compiled(given)
    own = given.untyped_storage().data_ptr()
    others = sum(size for at, (size, _) in saved.items() if at not in known and at != own)
    return out.detach().requires_grad_(), others, saved[own][0] if own in saved else 0


@pytest.mark.parametrize(("build", "parts"), [(gpt, gpt_parts), (llama, decoder_parts)], ids=["gpt", "llama"])
def test_activations_are_what_a_partitioned_sublayer_saves_when_it_runs(build, parts):
    model = build()
    costs = measured(model, IDS) if build is gpt else measured(model, input_ids=IDS, use_cache=False)
    before, layers, _, tables = parts(model)
    given = before(IDS).detach().requires_grad_()
    for i, (function, found) in enumerate(zip(layers, costs.sublayers, strict=True)):
        given, kept, source = kept_in_a_run(function, [*model.parameters(), *tables], given)
        # The first sublayer's input is v_0, which is kept as a source; the others' is what their depth read gave.
        assert found.activation_bytes == kept + (source if i else 0), found.name
        assert kept > 0 and source > 0
