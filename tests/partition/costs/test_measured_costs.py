"""Bytes and ties measured on a graph are those of the model when it runs, counted by independent means."""

import logging
import resource

import pytest
import torch
import transformers
from torch import nn

from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.partition.costs import measure as cost
from attnres_fx.partition.costs.activations import saved_bytes
from attnres_fx.partition.costs.measure import measure_costs
from attnres_fx.partition.costs.unit_graph import extract_body, graph_facts
from tests.support.measured import IDS, SIZES, converted_graph, gpt, gpt_costs, llama, llama_costs, measured
from tests.support.original_parts import decoder_parts, gpt_parts, traced


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


@pytest.mark.parametrize(
    ("build", "costs_of", "parts"),
    [(gpt, gpt_costs, gpt_parts), (llama, llama_costs, decoder_parts)],
    ids=["gpt", "llama"],
)
@pytest.mark.slow
def test_activations_are_what_a_partitioned_sublayer_saves_when_it_runs(build, costs_of, parts):
    model, costs = build(), costs_of()
    before, layers, _, tables = parts(model)
    given = before(IDS).detach().requires_grad_()
    for i, (function, found) in enumerate(zip(layers, costs.sublayers, strict=True)):
        given, kept, source = kept_in_a_run(function, [*model.parameters(), *tables], given)
        # The first sublayer's input is v_0, which is kept as a source; the others' is what their depth read gave.
        assert found.activation_bytes == kept + (source if i else 0), found.name
        assert kept > 0 and source > 0


@pytest.mark.slow
def test_a_model_without_weights_costs_what_it_costs_with_them():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    ids = torch.empty_like(IDS, device="meta")
    assert measured(model, input_ids=ids, use_cache=False) == llama_costs()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.slow
def test_twice_the_batch_costs_twice_as_much(rows):
    """One row too, although it is traced as two."""
    single, double = measured(gpt(), IDS[:rows]), measured(gpt(), IDS[:rows].repeat(2, 1))
    for one, two in zip((*single.sublayers, single.after), (*double.sublayers, double.after), strict=True):
        assert (two.forward_flops, two.backward_flops) == (2 * one.forward_flops, 2 * one.backward_flops)
        assert two.activation_bytes == 2 * one.activation_bytes > 0
        assert two.parameter_bytes == one.parameter_bytes
    tokens = IDS[:rows].numel()
    assert double.streams[0].value_bytes == 2 * single.streams[0].value_bytes == 2 * tokens * 32 * 4


def test_the_head_keeps_its_outputs_for_the_loss():
    after = gpt_costs().after
    tokens = IDS.numel()
    # The logits, and of the final norm its input, its output, mean and deviation.
    assert after.activation_bytes == 4 * tokens * (64 + 2 * 32 + 2)


@pytest.mark.slow
def test_sublayers_of_one_structure_are_measured_once(monkeypatch):
    seen = []
    monkeypatch.setattr(cost, "saved_bytes", lambda body, name: seen.append(name) or saved_bytes(body, name))
    costs = measured(SmallGPT(GPTConfig(vocabulary=64, layers=4, heads=4, width=32, context=64)), IDS)
    # The first sublayer reads v_0, which nobody reads for it; so it is not quite like the later ones.
    assert len(seen) == 5
    assert len({(s.forward_flops, s.activation_bytes) for s in costs.sublayers[1:]}) == 2


def test_parameters_are_counted_once_at_the_first_place_that_uses_them():
    model, costs = gpt(), gpt_costs()
    units = [costs.before, *costs.sublayers, costs.after]
    reads = 4 * 2 * 32  # query and key weight of four reads
    total = sum(p.numel() for p in model.parameters()) + reads
    assert sum(u.parameter_bytes for u in units) == 4 * total
    assert costs.tied == ((4 * 64 * 32, ("before", "after")),)
    assert costs.before.parameter_bytes == 4 * (64 + 64) * 32
    assert costs.after.parameter_bytes == 4 * (2 * 32 + 2 * 32)  # norm, last read


@pytest.mark.slow
def test_layers_that_share_weights_are_tied():
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    model = transformers.AlbertModel(transformers.AlbertConfig(**sizes, embedding_size=16), add_pooling_layer=False)
    costs = measured(model.eval(), input_ids=IDS)
    assert {places for _, places in costs.tied} >= {("0", "2"), ("1", "3")}
    assert costs.sublayers[2].parameter_bytes < costs.sublayers[0].parameter_bytes / 10


@pytest.mark.slow
def test_frozen_weights_have_no_gradient_to_compute():
    model = gpt()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("blocks.1", "norm", "head", "token")))
    model.head.weight = nn.Parameter(model.head.weight.detach().clone(), requires_grad=False)
    model.token.weight.requires_grad_(False)
    costs = measured(model, IDS)
    # Reads before the first trained weight are trained themselves, so that gradients reach as far as the first read.
    first, second, *_ = costs.sublayers
    assert (first.backward_flops, first.activation_bytes) == (0, 0)
    assert second.backward_flops == second.forward_flops
    assert costs.after.backward_flops == costs.after.forward_flops
    assert costs.sublayers[3].backward_flops == 2 * costs.sublayers[3].forward_flops


@pytest.mark.slow
def test_a_summary_that_later_reads_have_as_a_source_is_not_kept_twice():
    gm, chain = converted_graph(gpt(), IDS, variant="local")
    costs = measure_costs(gm, chain)
    value = costs.streams[0].value_bytes
    first, _, third, fourth = (s.activation_bytes for s in costs.sublayers)
    full = gpt_costs().sublayers
    assert third == first == full[2].activation_bytes - value  # its input is c_2, a source of block 2
    assert fourth == full[3].activation_bytes


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_what_cannot_be_traced_is_estimated_and_said(caplog):
    library = torch.library.Library("cost_test", "FRAGMENT")
    library.define("odd(Tensor x) -> Tensor")
    library.impl("odd", lambda x: x * x, "CompositeExplicitAutograd")
    torch.library.register_fake("cost_test::odd", torch.empty_like, lib=library)

    def refuse(ctx, grad):
        raise ValueError("no gradient for you")

    torch.library.register_autograd("cost_test::odd", refuse, lib=library)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            return torch.ops.cost_test.odd(self.linear(x)).relu() + x

    gm, nodes = traced(Odd(), torch.randn(6, 16))
    with caplog.at_level(logging.INFO, "attnres_fx"):
        kept = saved_bytes(extract_body(nodes, graph_facts(gm)), "layers.3")
    assert kept == 4 * 6 * 16 * 3  # what the odd operation takes, what it gives, and the result
    assert "activations of layers.3 are estimated" in caplog.text and "no gradient for you" in caplog.text


DEEPSEEK = {
    "vocab_size": 1024,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 896,
    "num_experts_per_tok": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


@pytest.mark.slow
def test_experts_of_a_trillion_weights_are_measured_without_them():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = transformers.DeepseekV3Config(**DEEPSEEK, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(config).bfloat16()
    ids = torch.zeros(1, 128, dtype=torch.int64, device="meta")
    costs = measured(model, input_ids=ids, use_cache=False)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    dense, experts = costs.sublayers[1], costs.sublayers[3]
    assert dense.forward_flops == 2 * 128 * 3 * 7168 * 18432
    assert experts.forward_flops == 2 * 128 * (3 * 7168 * 2048 * (16 + 1) + 7168 * 896)  # chosen, shared, router
    assert experts.backward_flops == 2 * experts.forward_flops
    assert experts.parameter_bytes == pytest.approx(2 * 3 * 7168 * 2048 * 897, rel=1e-3)
    rows = 2 * 128 * 16  # bytes of one number for every token of every expert
    assert rows * (7168 + 2 * 2048) < experts.activation_bytes < 2 * rows * (2 * 7168 + 3 * 2048)
    assert grown * 1024 < 500 * 2**20
    # Attention keeps no scores: of every token only what is as wide as its heads.
    assert costs.sublayers[2].activation_bytes < 128 * 2 * 12 * 64 * 192
