"""What a conversion returns behaves like a module, and computes the paper's forward."""

import copy
import pickle

import pytest
import torch
from transformers import LlamaForCausalLM

import attnres_fx as ax
from tests.support.papers_forward import (
    IDS,
    by_hand,
    gpt2,
    gpt2_sublayers,
    gpt_neox,
    gpt_neox_sublayers,
    llama,
    llama_sublayers,
)

VARIANTS = ("full", "block", "local")

#: By name, how the model is built with six sublayers, and its parts.
PARTS = {
    "llama": (lambda: llama(3), llama_sublayers),
    "gpt2": (lambda: gpt2(3), gpt2_sublayers),
    "gpt_neox": (lambda: gpt_neox(6), gpt_neox_sublayers),
}
#: A mean is a sum with another gain, whatever the sublayers are.
BY_HAND = [*((f, v, "sum") for f in PARTS for v in VARIANTS), *(("gpt2", v, "mean") for v in VARIANTS)]


@pytest.mark.parametrize(("family", "variant", "output"), BY_HAND)
@pytest.mark.slow_after(1)
def test_a_conversion_is_the_papers_forward_written_by_hand(family, variant, output):
    build, parts = PARTS[family]
    model = build().double()
    blocks = {} if variant == "full" else {"block_size": 4}
    config = ax.AttnResConfig(variant=variant, output=output, **blocks)
    converted = ax.convert(model, kwargs={"input_ids": IDS}, config=config, dynamic_shapes={}, check=False)
    torch.manual_seed(1)
    for read in converted.attnres.reads:
        torch.nn.init.normal_(read.query, std=0.5)
        torch.nn.init.normal_(read.key_weight, mean=1.0, std=0.2)
    weights = dict(converted.named_parameters())
    probe = torch.randn(2, 7, 64, dtype=torch.float64)
    found = converted(input_ids=IDS).logits
    found_grads = torch.autograd.grad((found * probe).sum(), list(weights.values()), allow_unused=True)
    expected = by_hand(parts(model), converted.attnres.reads, variant, output, 4)
    expected_grads = torch.autograd.grad((expected * probe).sum(), list(weights.values()), allow_unused=True)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    for name, x, y in zip(weights, found_grads, expected_grads, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            assert (x - y).abs().max() <= 1e-9 * y.abs().max(), name


@pytest.mark.slow
def test_a_converted_model_shares_weights_copies_saves_loads_and_exports(tmp_path):
    model = llama()
    converted = ax.convert(model, kwargs={"input_ids": IDS})
    assert converted.lm_head.weight is model.lm_head.weight
    missing = converted.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("attnres.") for name in missing)
    for read in converted.attnres.reads:
        torch.nn.init.normal_(read.query)
    expected = converted(IDS).logits
    assert type(converted(IDS)) is type(model(IDS, use_cache=False))
    twin = copy.deepcopy(converted)
    assert twin.report == converted.report
    assert torch.equal(twin(IDS).logits, expected)
    with torch.no_grad():
        twin.attnres.reads[0].query.zero_()
    assert not torch.equal(twin(IDS).logits, converted(IDS).logits)
    converted.save(tmp_path / "model.pt")
    loaded = ax.load(tmp_path / "model.pt")
    assert loaded.report == converted.report
    assert list(loaded.state_dict()) == list(converted.state_dict())
    longer = torch.randint(5, 60, (3, 11))
    assert torch.allclose(loaded(longer).logits, converted(longer).logits, atol=1e-6)
    loaded.train()(IDS).logits.sum().backward()
    assert loaded.attnres.reads[1].query.grad.abs().max() > 0
    weights = ax.depth_weights(loaded, kwargs={"input_ids": IDS})
    assert all(torch.allclose(r.weights.sum(), torch.tensor(1.0)) for r in weights)
    groups = ax.parameter_groups(converted)
    assert groups[1]["weight_decay"] == 0.0
    assert len(groups[1]["params"]) == 2 * len(converted.attnres.reads)
    exported = torch.export.export(converted, (), {"input_ids": IDS}, strict=False)
    assert torch.equal(exported.module()(input_ids=IDS).logits, expected)
    compiled = torch.compile(converted, backend="aot_eager")
    assert torch.allclose(compiled(IDS).logits, expected, atol=1e-5)


@pytest.mark.slow
def test_an_example_of_one_row_leaves_the_batch_free():
    converted = ax.convert(llama(), kwargs={"input_ids": IDS[:1]})
    assert converted(IDS).logits.shape == (2, 7, 64)
    assert ax.verify(llama(), converted, kwargs={"input_ids": IDS[:1]}).passed


@pytest.mark.slow
def test_train_and_eval_are_different_programs_over_one_set_of_weights():
    converted = ax.convert(gpt2(), kwargs={"input_ids": IDS}, dynamic_shapes={}, check=False)
    assert torch.equal(converted(IDS).logits, converted(IDS).logits)
    converted.train()
    assert not torch.equal(converted(IDS).logits, converted(IDS).logits)


# --- what a user does with a converted model ---------------------------------------------------------


@pytest.mark.slow
def test_a_pickle_holds_the_original_and_converts_it_again():
    converted = ax.convert(llama(), kwargs={"input_ids": IDS}, check=False)
    for read in converted.attnres.reads:
        torch.nn.init.normal_(read.query)
    copied = pickle.loads(pickle.dumps(converted))
    assert type(copied.model) is type(converted.model) and isinstance(copied, LlamaForCausalLM)
    assert torch.equal(copied(IDS).logits, converted(IDS).logits)
    assert str(copied.report) == str(converted.report)
    copied.lm_head.weight.data.zero_()
    assert copied(IDS).logits.abs().max() == 0 < converted(IDS).logits.abs().max()


@pytest.mark.slow
def test_a_model_whose_class_cannot_be_pickled_is_pickled_as_it_is_saved():
    class Local(type(llama())):
        pass

    converted = ax.convert(Local(llama().config).eval(), kwargs={"input_ids": IDS}, check=False)
    copied = pickle.loads(pickle.dumps(converted))
    assert torch.equal(copied(IDS).logits, converted(IDS).logits)
    assert not isinstance(copied, Local)


@pytest.mark.slow
def test_other_sizes_compile_with_fullgraph():
    converted = ax.convert(llama(), kwargs={"input_ids": IDS}, check=False)
    torch._dynamo.reset()
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    for shape in ((2, 7), (4, 11), (3, 5)):
        ids = torch.randint(0, 64, shape)
        torch.testing.assert_close(compiled(ids).logits, converted(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.slow
def test_a_cast_model_computes_what_the_cast_original_does(dtype):
    model = llama()
    converted = ax.convert(model, kwargs={"input_ids": IDS}, dynamic_shapes={}, check=False).to(dtype)
    expected = model.to(dtype)(IDS).logits
    assert converted(IDS).logits.dtype == dtype
    off = (converted(IDS).logits - expected).abs().max() / expected.abs().max()
    assert off < (1e-12 if dtype == torch.float64 else 2e-2)  # reads sum in float32


@pytest.mark.slow
def test_under_autocast_a_converted_model_computes_what_the_original_does():
    model = llama()
    converted = ax.convert(model, kwargs={"input_ids": IDS}, dynamic_shapes={}, check=False)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(converted(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(converted(IDS).logits, model(IDS).logits)


@pytest.mark.slow
def test_an_exported_program_keeps_its_dtypes_and_says_what_to_do():
    program = torch.export.export(llama(), (), {"input_ids": IDS, "use_cache": False}, strict=False)
    converted = ax.convert(program)
    for cast in (converted.half, converted.double, lambda: converted.to(torch.bfloat16)):
        with pytest.raises(ax.AttnResError, match="Cast the original model and convert it again"):
            cast()
    assert converted.float().to("cpu")(input_ids=IDS).logits.dtype == torch.float32


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("as_module", [True, False])
@pytest.mark.slow
def test_exported_programs_of_either_mode_convert(train, as_module):
    model = llama().train(train)
    program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, strict=False)
    converted = ax.convert(program.module() if as_module else program, (), {"input_ids": IDS, "use_cache": False})
    torch.testing.assert_close(converted(input_ids=IDS).logits, model(IDS).logits)


@pytest.mark.slow
def test_use_cache_is_bound_off_where_only_keywords_pass_it_on():
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids, **kwargs):
            return self.inner(input_ids=input_ids, **kwargs)

    converted = ax.convert(Wrapped().eval(), kwargs={"input_ids": IDS})
    assert converted.signature.bound_values == {"use_cache": False}
    torch.testing.assert_close(converted(input_ids=IDS).logits, llama()(IDS).logits)
