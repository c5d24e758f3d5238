"""The compile backend computes what convert computes, for every graph of a model."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.backend import dynamo_backend
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from tests.support.attached import (
    VARIANTS,
    assert_same_training,
    attached,
    attached_net,
    built,
    outputs_and_gradients,
    with_random_queries,
)
from tests.support.families import IDS


def convert(model, kwargs, variant="block"):
    """What a compiled model is held against, for calls of the example's sizes."""
    config = VARIANTS[variant]
    converted = ax.convert(copy.deepcopy(model), kwargs=kwargs, config=config, dynamic_shapes={}, check=False)
    return with_random_queries(converted)


#: Every variant on pre-norm and post-norm streams; each other family once.
COMPILED = [
    *((name, variant) for name in ("llama, one layer", "encoder, norm last") for variant in VARIANTS),
    ("t5, one layer", "block"),
    ("gpt2", "block"),
    ("qwen3", "local"),
    ("mixtral", "full"),
    ("bert", "block"),
    ("vit", "local"),
]


@pytest.mark.parametrize(("name", "variant"), COMPILED)
@pytest.mark.slow_after(1)
def test_a_compiled_model_is_the_converted_one(name, variant):
    model, kwargs = built(name)
    converted = convert(model, kwargs, variant)
    ax.compile(model, kwargs=kwargs, config=VARIANTS[variant], inner="eager")
    model.load_state_dict(converted.state_dict(), strict=True)
    assert model.attnres.reads.names == converted.attnres.reads.names
    assert_same_training(model, converted, kwargs)


@pytest.mark.parametrize(
    ("name", "inner", "dynamic"),
    [
        ("carry", "aot_eager", True),
        ("bert, one layer", "aot_eager", False),
        ("post-norm net", "inductor", True),
        ("llama, one layer", "inductor", False),
    ],
)
@pytest.mark.slow
def test_inner_compilers_compute_the_same(name, inner, dynamic):
    model, kwargs = built(name)
    model = model.double()  # some gradients are zero but for rounding
    converted = convert(model, kwargs)
    ax.compile(model, kwargs=kwargs, config=VARIANTS["block"], inner=inner, dynamic=dynamic)
    model.load_state_dict(converted.state_dict(), strict=True)
    assert_same_training(model, converted, kwargs)


def generated(model, **options):
    return model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, **options)


@pytest.mark.parametrize("name", ["llama, one layer", "gpt2, one layer"])
@pytest.mark.slow
def test_generate_at_zero_queries_gives_the_tokens_of_the_original(name):
    model, kwargs = built(name)
    expected = generated(copy.deepcopy(model), use_cache=True)
    ax.compile(model, kwargs=kwargs, config=VARIANTS["block"], inner="eager")
    assert torch.equal(generated(model, use_cache=True), expected)
    assert torch.equal(generated(model, use_cache=False), expected)


@pytest.mark.slow
def test_generate_with_random_queries_gives_the_same_tokens_with_any_cache():
    model, _ = attached("llama, one layer")
    expected = generated(model, use_cache=False)
    assert torch.equal(generated(model, use_cache=True), expected)
    assert torch.equal(generated(model, use_cache=True, cache_implementation="static"), expected)
    with ax.plain(model):
        assert not torch.equal(generated(model, use_cache=False), expected)


@pytest.mark.slow
def test_lengths_and_batches_cause_one_compilation_a_mode():
    model, _ = attached("llama, one layer")
    for train in (False, True):
        model.train(train)
        for grad in (True, False):
            before = len(ax.explain(model).graphs)
            with torch.set_grad_enabled(grad):
                for shape in ((2, 9), (3, 12), (4, 7), (3, 9), (2, 12)):
                    model(input_ids=torch.randint(5, 90, shape), use_cache=False)
            assert len(ax.explain(model).graphs) - before <= 1, (train, grad)
    before = len(ax.explain(model).graphs)
    for length in (9, 5):
        model(input_ids=torch.randint(5, 90, (1, length)), use_cache=False)
    assert len(ax.explain(model).graphs) - before <= 1


def test_replaced_and_loaded_parameters_are_seen():
    model, x = attached_net(seed=1)
    other, _ = attached_net(seed=2)
    wanted = other(x)
    assert not torch.allclose(model(x), wanted)
    for mine, theirs in zip(model.attnres.reads, other.attnres.reads, strict=True):
        mine.query = nn.Parameter(theirs.query.detach().clone())
        mine.key_weight = nn.Parameter(theirs.key_weight.detach().clone())
    torch.testing.assert_close(model(x), wanted)


def test_functional_call_computes_with_the_parameters_it_is_given():
    model, x = attached_net(seed=1)
    other, _ = attached_net(seed=2)
    wanted = other(x)
    given = {n: p for n, p in other.named_parameters() if n.startswith("attnres.")}
    torch.testing.assert_close(torch.func.functional_call(model, given, (x,)), wanted)


@pytest.mark.slow
def test_only_the_queries_train_when_the_rest_is_frozen():
    model, x = attached_net(inner="aot_eager", dynamic=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("attnres."))
    model(x).square().sum().backward()
    assert all((p.grad is not None) == n.startswith("attnres.") for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_half_precision_models_compile_as_they_convert(dtype):
    model, kwargs = built("llama, one layer")
    model = model.to(dtype)
    converted = convert(model, kwargs)
    ax.compile(model, kwargs=kwargs, config=VARIANTS["block"], inner="eager")
    model.load_state_dict(converted.state_dict(), strict=True)
    torch.testing.assert_close(model(**kwargs, use_cache=False).logits, converted(**kwargs).logits)
    assert model.attnres.reads[0].query.dtype == dtype


@pytest.mark.slow
def test_autocast_computes_what_the_converted_model_computes_under_it():
    model, kwargs = built("llama, one layer")
    converted = convert(model, kwargs, "full")
    ax.compile(model, kwargs=kwargs, config=VARIANTS["full"], inner="eager")
    model.load_state_dict(converted.state_dict(), strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = model(**kwargs, use_cache=False).logits, converted(**kwargs).logits
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.slow
def test_checkpointed_layers_train_the_same_and_keep_their_tags():
    model, kwargs = attached(dynamic=False)
    other, _ = built()
    other.gradient_checkpointing_enable({"use_reentrant": False})
    ax.compile(other.train(), kwargs=kwargs, config=VARIANTS["block"], inner="aot_eager", dynamic=False)
    other.load_state_dict(model.state_dict())
    _, wanted = outputs_and_gradients(model.train(), {**kwargs, "use_cache": False})
    _, found = outputs_and_gradients(other, {**kwargs, "use_cache": False})
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp_min(1e-3), name


@pytest.mark.slow
def test_tied_weights_stay_one_parameter():
    model = SmallGPT(GPTConfig(layers=1, width=8, heads=2, vocabulary=96, context=16))
    ax.compile(model, (IDS,), config=VARIANTS["full"], inner="aot_eager", dynamic=False)
    assert model.head.weight is model.token.weight
    model(IDS).square().sum().backward()
    assert model.head.weight.grad is model.token.weight.grad is not None


BY_STRING = """
import torch
assert "attnres" in torch._dynamo.list_backends()
class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(2) for _ in range(3))
    def forward(self, x):
        for norm in self.norms:
            x = x + norm(x).relu()
        return self.norms[0](x)
try:
    torch.compile(Residual(), backend="attnres")(torch.ones(1, 2))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_the_backend_is_found_by_name_and_says_what_to_call():
    done = subprocess.run([sys.executable, "-c", BY_STRING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BackendError") and "attnres_fx.attach(model" in done.stdout


def test_explain_says_what_was_compiled():
    model, x = attached_net()
    model(x)
    told = ax.explain(model)
    assert told.graphs[-1].reads == 3 and "insert_depth_attention_pass" in " ".join(told.graphs[-1].changed)
    assert "eager" in str(told) and "Broken" in str(told)


@pytest.mark.slow
def test_the_fused_inference_path_of_an_encoder_is_not_taken():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 5, 16)
    expected = model(x)
    ax.compile(model, (x,), inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.slow
def test_lora_adapters_go_onto_a_compiled_base_model():
    from peft import LoraConfig, get_peft_model

    model, kwargs = attached("llama, one layer")
    original, _ = built("llama, one layer")
    plain = model(**kwargs, use_cache=False).logits.detach()
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
    found = lora(**kwargs, use_cache=False).logits
    found.square().mean().backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in lora.named_parameters())
    with lora.disable_adapter():
        torch.testing.assert_close(lora(**kwargs, use_cache=False).logits, plain)
    merged = copy.deepcopy(lora).merge_and_unload()
    converted = ax.convert(original, kwargs=kwargs, config=VARIANTS["block"], dynamic_shapes={}, check=False)
    converted.load_state_dict(merged.state_dict(), strict=True)
    assert (converted(**kwargs).logits - found).abs().max() <= 1e-5 * found.abs().max()
    assert (found - plain).abs().max() > 1e-2


def test_the_copy_that_is_rewritten_keeps_what_dynamo_knows_of_its_inputs(monkeypatch):
    seen = []

    def watched(options):
        def inner(gm, inputs):
            nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
            seen.append((nodes, gm.meta))
            return gm.forward

        return inner

    monkeypatch.setattr(dynamo_backend, "inner_compiler", watched)
    model, x = attached_net()
    model(x)
    (nodes, meta), *_ = seen
    assert all(hasattr(n, "_dynamo_source") for n in nodes)
    static = [n.name for n in nodes if n.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")]
    assert sum("attnres" in n for n in static) == 2 * len(model.attnres.reads)
    assert len(static) >= len(list(model.parameters()))
    assert "dynamo_flat_name_to_original_fqn" in meta
