"""The compile backend computes what convert computes, for every graph of a model, and never anything else."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import attnres_fx as ax
from attnres_fx.backend import dynamo_backend
from attnres_fx.backend.attachment import Attachment
from attnres_fx.errors import AttachError, BackendError, EagerCallError, NoStreamError
from tests.support.families import FAMILIES, GROUPED, IDS, SMALL, TEXT, family

VARIANTS = {
    "full": ax.AttnResConfig(variant="full"),
    "block": ax.AttnResConfig(variant="block", num_blocks=2),
    "local": ax.AttnResConfig(variant="local", num_blocks=2),
}
#: One layer of each is as much as a slow compiler needs to see.
MODELS = {
    **FAMILIES,
    "llama, one layer": lambda: family("llama", TEXT, 2, **{**GROUPED, "num_hidden_layers": 1}),
    "bert, one layer": lambda: family("bert", TEXT, 2, "AutoModel", **{**SMALL, "num_hidden_layers": 1}),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def built(name="llama"):
    model, kwargs, _ = MODELS[name]()
    return model, kwargs


def with_random_queries(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_(generator=generator)
            read.key_weight.add_(torch.randn(read.key_weight.shape, generator=generator), alpha=0.1)
            if read.gate is not None:
                read.gate.fill_(0.7)
    return model


def attached(name="llama", *, inner="eager", seed=0, config=VARIANTS["block"], **options):
    model, kwargs = built(name)
    ax.compile(model, kwargs=kwargs, config=config, inner=inner, **options)
    return with_random_queries(model, seed), kwargs


def outputs_and_gradients(model, kwargs):
    leaves = [x for x in pytree.tree_leaves(model(**kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    total = torch.zeros((), dtype=leaves[0].dtype)
    for i, leaf in enumerate(leaves):
        if leaf.requires_grad:
            total = total + (leaf * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i)).to(leaf)).sum()
    model.zero_grad()
    total.backward()
    return leaves, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model, converted, kwargs, tolerance=1e-5):
    expected, wanted = outputs_and_gradients(converted, kwargs)
    bound = converted.signature.bound_values
    found, gradients = outputs_and_gradients(model, {**bound, **kwargs})
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= tolerance * y.abs().max()
    largest = max(g.abs().max() for g in wanted.values())
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).abs().max() <= tolerance * max(gradient.abs().max(), 1e-3 * largest), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral", "bert", "t5", "vit", "encoder, norm last"])
@pytest.mark.slow_after(1)
def test_a_compiled_model_is_the_converted_one(name, variant):
    model, kwargs = built(name)
    converted = with_random_queries(ax.convert(copy.deepcopy(model), kwargs=kwargs, config=VARIANTS[variant]))
    ax.compile(model, kwargs=kwargs, config=VARIANTS[variant], inner="eager")
    model.load_state_dict(converted.state_dict(), strict=True)
    assert model.attnres.reads.names == converted.attnres.reads.names
    assert_same_training(model, converted, kwargs)


@pytest.mark.parametrize(
    ("name", "inner"),
    [("llama", "aot_eager"), ("bert", "aot_eager"), ("llama, one layer", "inductor"), ("bert, one layer", "inductor")],
)
@pytest.mark.slow
def test_inner_compilers_compute_the_same(name, inner):
    model, kwargs = built(name)
    model = model.double()  # some gradients are zero but for rounding
    converted = with_random_queries(ax.convert(copy.deepcopy(model), kwargs=kwargs, config=VARIANTS["block"]))
    ax.compile(model, kwargs=kwargs, config=VARIANTS["block"], inner=inner)
    model.load_state_dict(converted.state_dict(), strict=True)
    assert_same_training(model, converted, kwargs)


# --- every graph of one model ------------------------------------------------------------------------


def generated(model, **options):
    return model.generate(IDS, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None, **options)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.slow
def test_generate_at_zero_queries_gives_the_tokens_of_the_original(name):
    model, kwargs = built(name)
    expected = generated(copy.deepcopy(model), use_cache=True)
    ax.compile(model, kwargs=kwargs, config=VARIANTS["block"], inner="eager")
    assert torch.equal(generated(model, use_cache=True), expected)
    assert torch.equal(generated(model, use_cache=False), expected)


@pytest.mark.slow
def test_generate_with_random_queries_gives_the_same_tokens_with_any_cache():
    model, _ = attached()
    expected = generated(model, use_cache=False)
    assert torch.equal(generated(model, use_cache=True), expected)
    assert torch.equal(generated(model, use_cache=True, cache_implementation="static"), expected)
    with ax.plain(model):
        assert not torch.equal(generated(model, use_cache=False), expected)


@pytest.mark.slow
def test_lengths_and_batches_cause_one_compilation_a_mode():
    model, _ = attached()
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


@pytest.mark.slow
def test_two_instances_side_by_side_each_use_their_own_queries():
    one, kwargs = attached(seed=1)
    other, _ = attached(seed=2)
    first, second = one(**kwargs).logits, other(**kwargs).logits
    assert not torch.allclose(first, second)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(**kwargs).logits, first, rtol=0, atol=0)


@pytest.mark.slow
def test_replaced_and_loaded_parameters_are_seen():
    model, kwargs = attached(seed=1)
    other, _ = attached(seed=2)
    wanted = other(**kwargs).logits
    model(**kwargs)
    for mine, theirs in zip(model.attnres.reads, other.attnres.reads, strict=True):
        mine.query = nn.Parameter(theirs.query.detach().clone())
        mine.key_weight = nn.Parameter(theirs.key_weight.detach().clone())
    torch.testing.assert_close(model(**kwargs).logits, wanted)


@pytest.mark.slow
def test_functional_call_computes_with_the_parameters_it_is_given():
    model, kwargs = attached(seed=1)
    other, _ = attached(seed=2)
    wanted = other(**kwargs).logits
    given = {n: p for n, p in other.named_parameters() if n.startswith("attnres.")}
    found = torch.func.functional_call(model, given, (), kwargs).logits
    torch.testing.assert_close(found, wanted)


def test_a_deepcopy_has_its_own_queries_and_must_be_compiled_itself():
    model, kwargs = attached(seed=1)
    wanted = model(**kwargs).logits
    copied = copy.deepcopy(model)
    with pytest.raises(EagerCallError):
        copied(**kwargs)
    copied.compile(backend="attnres", fullgraph=True, dynamic=True, options={"inner": "eager"})
    torch.testing.assert_close(copied(**kwargs).logits, wanted)
    with_random_queries(copied, seed=5)
    assert not torch.allclose(copied(**kwargs).logits, wanted)
    torch.testing.assert_close(model(**kwargs).logits, wanted)


@pytest.mark.slow
def test_a_model_saved_and_attached_afresh_computes_the_same(tmp_path):
    from safetensors.torch import load_file

    model, kwargs = attached(seed=3)
    model.save_pretrained(tmp_path)
    fresh, _ = built()
    ax.compile(fresh, kwargs=kwargs, inner="eager")
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert fresh.attnres.config == model.attnres.config == VARIANTS["block"]
    torch.testing.assert_close(fresh(**kwargs).logits, model(**kwargs).logits)


def test_the_checkpoint_of_the_original_lacks_nothing_but_the_queries():
    original, _ = built()
    model, _ = attached()
    missing, unexpected = model.load_state_dict(original.state_dict(), strict=False)
    assert not unexpected and missing and all(n.startswith("attnres.") for n in missing)


@pytest.mark.slow
def test_only_the_queries_train_when_the_rest_is_frozen():
    model, kwargs = attached(inner="aot_eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("attnres."))
    model(**kwargs).logits.square().sum().backward()
    assert all((p.grad is not None) == n.startswith("attnres.") for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_half_precision_models_compile_as_they_convert(dtype):
    model, kwargs = built()
    model = model.to(dtype)
    converted = with_random_queries(ax.convert(copy.deepcopy(model), kwargs=kwargs, config=VARIANTS["block"]))
    ax.compile(model, kwargs=kwargs, config=VARIANTS["block"], inner="eager")
    model.load_state_dict(converted.state_dict(), strict=True)
    torch.testing.assert_close(model(**kwargs, use_cache=False).logits, converted(**kwargs).logits)
    assert model.attnres.reads[0].query.dtype == dtype


@pytest.mark.slow
def test_autocast_computes_what_the_converted_model_computes_under_it():
    model, kwargs = built()
    converted = with_random_queries(ax.convert(copy.deepcopy(model), kwargs=kwargs, config=VARIANTS["full"]))
    ax.compile(model, kwargs=kwargs, config=VARIANTS["full"], inner="eager")
    model.load_state_dict(converted.state_dict(), strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = model(**kwargs, use_cache=False).logits, converted(**kwargs).logits
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.slow
def test_checkpointed_layers_train_the_same_and_keep_their_tags():
    model, kwargs = attached()
    other, _ = built()
    other.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.warns(UserWarning, match="checkpoints activations"):
        ax.compile(other.train(), kwargs=kwargs, config=VARIANTS["block"], inner="aot_eager")
    other.load_state_dict(model.state_dict())
    _, wanted = outputs_and_gradients(model.train(), {**kwargs, "use_cache": False})
    _, found = outputs_and_gradients(other, {**kwargs, "use_cache": False})
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp_min(1e-3), name


@pytest.mark.slow
def test_tied_weights_stay_one_parameter():
    model, kwargs = attached("gpt2", inner="aot_eager")
    assert model.lm_head.weight is model.transformer.wte.weight
    model(**kwargs).logits.square().sum().backward()
    assert model.lm_head.weight.grad is model.transformer.wte.weight.grad is not None


# --- by string, from nothing -------------------------------------------------------------------------

BY_STRING = """
import torch
assert "attnres" in torch._dynamo.list_backends()
model = torch.nn.Linear(2, 2)
try:
    torch.compile(model, backend="attnres")(torch.ones(1, 2))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_the_backend_is_found_by_name_and_says_what_to_call():
    done = subprocess.run([sys.executable, "-c", BY_STRING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BackendError") and "attnres_fx.attach(model" in done.stdout


# --- never plain residuals in silence ----------------------------------------------------------------


def test_an_eager_call_of_an_attached_model_raises_and_plain_runs_the_original():
    original, kwargs = built()
    model, _ = built()
    ax.attach(model, kwargs=kwargs)
    with pytest.raises(EagerCallError, match=r"model\.compile\(backend='attnres'"):
        model(**kwargs)
    with ax.plain(model):
        torch.testing.assert_close(model(**kwargs).logits, original(**kwargs).logits)
    with pytest.raises(EagerCallError):
        model(**kwargs)


def test_running_out_of_recompilations_raises():
    model, _ = attached(fullgraph=False, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(EagerCallError, match="recompiles"):
        for length in range(3, 9):
            model(input_ids=IDS[:, :length], use_cache=False)


def test_detach_gives_the_original_back():
    original, kwargs = built()
    model, _ = attached()
    ax.detach(model)
    assert list(model.state_dict()) == list(original.state_dict())
    torch.testing.assert_close(model(**kwargs).logits, original(**kwargs).logits)
    with pytest.raises(AttachError, match="not attached"):
        ax.detach(model)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.breaks = False

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
            if self.breaks:
                torch._dynamo.graph_break()
        return self.norms[-1](x)


def test_a_graph_break_inside_the_stream_is_an_error_that_shows_the_line():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    model.breaks = True
    model.compile(backend="attnres", options={"inner": "eager"})
    with pytest.raises(BackendError, match=rf"graph break at {__file__}:\d+"):
        model(x)


def test_a_model_changed_after_attach_names_the_reads_that_no_longer_match():
    model, kwargs = attached()
    model.model.layers = model.model.layers[:1]
    with pytest.raises(BackendError, match=r"1 of the 4 reads.*model\.layers\.1\.post_attention_layernorm"):
        model(**kwargs)


BAD = {
    "an unknown option": ({"outer": 1}, r"'outer' are unknown.*inner, mode, inductor"),
    "an inner backend that does not exist": ({"inner": "nothing"}, "'nothing', which is no backend here"),
    "a mode that does not exist": ({"mode": "nonsense"}, "none of Inductor's"),
    "an Inductor option that does not exist": ({"inductor": {"no_such": 1}}, "Inductor does not know"),
    "Inductor's options for another compiler": ({"inner": "eager", "mode": "max-autotune"}, "for inner='inductor'"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.slow_after(1)
def test_options_that_mean_nothing(name):
    options, words = BAD[name]
    model, kwargs = built()
    ax.attach(model, kwargs=kwargs)
    model.compile(backend="attnres", fullgraph=True, options=options)
    with pytest.raises(BackendError, match=words):
        model(**kwargs)


def test_compile_refuses_bad_options_before_it_touches_the_model():
    model, kwargs = built()
    with pytest.raises(BackendError, match="no backend here"):
        ax.compile(model, kwargs=kwargs, inner="nothing")
    assert not hasattr(model, "attnres")


def test_attaching_and_compiling_twice_are_errors():
    model, kwargs = attached()
    with pytest.raises(AttachError, match="attached already"):
        ax.attach(model, kwargs=kwargs)
    with pytest.raises(BackendError, match="compiled already"):
        ax.compile(model, kwargs=kwargs)


def test_a_model_without_a_stream_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(NoStreamError):
        ax.compile(model, (torch.randn(2, 4),))
    assert not hasattr(model, "attnres") and "forward" not in vars(model)


def test_queries_on_another_device_or_of_another_dtype_are_refused():
    model, kwargs = attached()
    model.attnres.to(torch.bfloat16)
    with pytest.raises(BackendError, match=r"float32 and its query torch\.bfloat16"):
        model(**kwargs)


def test_explain_says_what_was_compiled():
    model, kwargs = attached()
    model(**kwargs)
    told = ax.explain(model)
    assert told.graphs[-1].reads == 4 and "insert_depth_attention_pass" in " ".join(told.graphs[-1].changed)
    assert "eager" in str(told) and "LlamaForCausalLM" in str(told)


def test_a_model_that_is_gone_releases_the_log_of_its_graphs():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.compile(model, (x,), config=VARIANTS["full"], inner="eager")
    model(x)
    copied, log = copy.deepcopy(model), weakref.ref(model.attnres.log)
    assert len(ax.explain(model).graphs) == 1 and ax.explain(copied).graphs == ax.explain(model).graphs
    del model
    gc.collect()
    assert log() is copied.attnres.log
    del copied
    gc.collect()
    assert log() is None


@pytest.mark.slow
def test_an_attachment_survives_its_text():
    model, _ = attached()
    about = model.attnres.about
    assert Attachment.from_text(about).to_text() == about
    assert [k.name for k in Attachment.from_text(about).reads] == list(model.attnres.reads.names)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_an_attached_model_behind_another_backend_raises(backend):
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    with pytest.raises(Exception, match="would compute plain residuals"):
        torch.compile(model, backend=backend)(x)


def test_an_attached_model_cannot_be_exported_as_what_it_is_not():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    with pytest.raises(ax.AttnResError):
        torch.export.export(model, (x,)).run_decompositions().module()(x)


def test_the_fused_inference_path_of_an_encoder_is_not_taken():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 5, 16)
    expected = model(x)
    ax.compile(model, (x,), inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert torch.backends.mha.get_fastpath_enabled()


def test_parts_attached_by_themselves_are_refused_inside_a_larger_model():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Broken(), Broken()

        def forward(self, x):
            return self.b(self.a(x))

    model, x = Two(), torch.randn(2, 4, 8)
    ax.attach(model.a, (x,))
    ax.attach(model.b, (x,))
    with pytest.raises(BackendError, match="part of a larger compiled one"):
        torch.compile(model, backend="attnres", options={"inner": "eager"})(x)


def test_a_checkpoint_brings_its_config_and_the_graph_follows():
    x = torch.randn(2, 4, 8)
    one, other = Broken(), Broken()
    ax.compile(one, (x,), config=VARIANTS["full"], inner="eager")
    ax.compile(other, (x,), config=VARIANTS["local"], inner="eager")
    with_random_queries(one)
    other(x)
    other.load_state_dict(one.state_dict())
    assert other.attnres.config.variant == "full"
    torch.testing.assert_close(other(x), one(x))


@pytest.mark.slow
def test_lora_adapters_go_onto_a_compiled_base_model():
    from peft import LoraConfig, get_peft_model

    model, kwargs = attached("llama, one layer", inner="aot_eager")
    original, _ = built("llama, one layer")
    plain = model(**kwargs, use_cache=False).logits.detach()
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
    found = lora(**kwargs, use_cache=False).logits
    found.square().mean().backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in lora.named_parameters())
    with lora.disable_adapter():
        torch.testing.assert_close(lora(**kwargs, use_cache=False).logits, plain)
    merged = copy.deepcopy(lora).merge_and_unload()
    converted = ax.convert(original, kwargs=kwargs, config=VARIANTS["block"])
    converted.load_state_dict(merged.state_dict(), strict=True)
    assert (converted(**kwargs).logits - found).abs().max() <= 1e-5 * found.abs().max()
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.slow
def test_the_copy_that_is_rewritten_keeps_what_dynamo_knows_of_its_inputs(monkeypatch):
    seen = []

    def watched(options):
        def inner(gm, inputs):
            nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
            seen.append((nodes, gm.meta))
            return gm.forward

        return inner

    monkeypatch.setattr(dynamo_backend, "inner_compiler", watched)
    model, kwargs = attached()
    model(**kwargs)
    (nodes, meta), *_ = seen
    assert all(hasattr(n, "_dynamo_source") for n in nodes)
    static = [n.name for n in nodes if n.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")]
    assert sum("attnres" in n for n in static) == 2 * len(model.attnres.reads)
    assert len(static) >= len(list(model.parameters()))
    assert "dynamo_flat_name_to_original_fqn" in meta


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "copy"])
def test_copies_of_an_attached_model_are_attached(how):
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.compile(model, (x,), config=VARIANTS["full"], inner="eager")
    wanted = with_random_queries(model)(x)
    copied = {
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
    }[how](model)
    with pytest.raises(EagerCallError):
        copied(x)
    copied.compile(backend="attnres", options={"inner": "eager"})
    torch.testing.assert_close(copied(x), wanted)
    with pytest.raises(EagerCallError):
        torch.fx.symbolic_trace(copied)(x)


def test_a_shallow_copy_with_queries_of_its_own_uses_them():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,), config=VARIANTS["full"])
    with_random_queries(model)
    copied = copy.copy(model)
    copied._modules = {**model._modules, "attnres": copy.deepcopy(model.attnres)}
    with torch.no_grad():
        for read in copied.attnres.reads:
            read.query.zero_()
            read.key_weight.fill_(1.0)
    copied.compile(backend="attnres", options={"inner": "eager"})
    with ax.plain(model):
        torch.testing.assert_close(copied(x), model(x))


def test_parameters_are_matched_by_read_and_not_by_position():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.compile(model, (x,), config=VARIANTS["full"], inner="eager")
    wanted = with_random_queries(model)(x)
    model.attnres.register_parameter("temperature", nn.Parameter(torch.ones(8)))
    torch.testing.assert_close(model(x), wanted)
    model.attnres.reads[1].query = model.attnres.reads[0].query
    assert not torch.allclose(model(x), wanted)


def test_compiling_an_attached_model_with_another_config_is_an_error():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,), config=VARIANTS["full"])
    with pytest.raises(AttachError, match="another config"):
        ax.compile(model, (x,), config=VARIANTS["block"])


def test_detaching_inside_plain_leaves_the_original():
    model, x = Broken(), torch.randn(2, 4, 8)
    expected = model(x)
    ax.compile(model, (x,), inner="eager")
    with ax.plain(model):
        ax.detach(model)
    assert type(model) is Broken
    torch.testing.assert_close(model(x), expected)


def test_what_torch_compile_returned_is_taken_for_the_model():
    model, x = Broken(), torch.randn(2, 4, 8)
    expected = model(x)
    ax.attach(model, (x,), config=VARIANTS["full"])
    compiled = torch.compile(model, backend="attnres", options={"inner": "eager"})
    compiled(x)
    assert ax.explain(compiled).model == "Broken"
    with ax.plain(compiled):
        torch.testing.assert_close(model(x), expected)
    ax.detach(compiled)
    torch.testing.assert_close(model(x), expected)


def test_an_attached_model_is_converted_after_detach():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    for call in (ax.convert, ax.inspect):
        with pytest.raises(ax.errors.AlreadyConvertedError, match="detach"):
            call(model, (x,))


def test_a_config_that_cannot_be_read_is_named():
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    state = model.state_dict()
    state["attnres._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ax.errors.ConfigError, match="_extra_state"):
        model.load_state_dict(state)
