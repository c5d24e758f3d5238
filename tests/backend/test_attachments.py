"""What is attached to a model: its queries, its copies and files, and how it is taken off again."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.backend.attachment import Attachment
from attnres_fx.errors import AttachError, EagerCallError
from tests.support.attached import (
    VARIANTS,
    Broken,
    attached,
    attached_net,
    built,
    with_random_queries,
)


def test_two_instances_side_by_side_each_use_their_own_queries():
    one, x = attached_net(seed=1)
    other, _ = attached_net(seed=2)
    first, second = one(x), other(x)
    assert not torch.allclose(first, second)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other(x), first, rtol=0, atol=0)


def test_a_deepcopy_has_its_own_queries_and_must_be_compiled_itself():
    model, x = attached_net(seed=1)
    wanted = model(x)
    copied = copy.deepcopy(model)
    with pytest.raises(EagerCallError):
        copied(x)
    copied.compile(backend="attnres", fullgraph=True, dynamic=True, options={"inner": "eager"})
    torch.testing.assert_close(copied(x), wanted)
    with_random_queries(copied, seed=5)
    assert not torch.allclose(copied(x), wanted)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.slow
def test_a_model_saved_and_attached_afresh_computes_the_same(tmp_path):
    from safetensors.torch import load_file

    model, kwargs = attached("llama, one layer", seed=3)
    model.save_pretrained(tmp_path)
    fresh, _ = built("llama, one layer")
    ax.compile(fresh, kwargs=kwargs, config=VARIANTS["block"], inner="eager")
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert fresh.attnres.config == model.attnres.config == VARIANTS["block"]
    torch.testing.assert_close(fresh(**kwargs).logits, model(**kwargs).logits)


def test_the_checkpoint_of_the_original_lacks_nothing_but_the_queries():
    original = Broken()
    model, _ = attached_net()
    missing, unexpected = model.load_state_dict(original.state_dict(), strict=False)
    assert not unexpected and missing and all(n.startswith("attnres.") for n in missing)


@pytest.mark.slow
def test_detach_gives_the_original_back():
    original, kwargs = built("llama, one layer")
    model, _ = attached("llama, one layer")
    ax.detach(model)
    assert list(model.state_dict()) == list(original.state_dict())
    torch.testing.assert_close(model(**kwargs).logits, original(**kwargs).logits)
    with pytest.raises(AttachError, match="not attached"):
        ax.detach(model)


def log_of(model):
    return model.attnres._logs[model.attnres.abouts[""]]


def test_a_model_that_is_gone_releases_the_log_of_its_graphs():
    gc.collect()  # a model that another test has left shares the log of models that are attached alike
    model, x = Broken(), torch.randn(2, 4, 8)
    ax.compile(model, (x,), config=VARIANTS["full"], inner="eager")
    model(x)
    copied, log = copy.deepcopy(model), weakref.ref(log_of(model))
    assert len(ax.explain(model).graphs) == 1 and ax.explain(copied).graphs == ax.explain(model).graphs
    del model
    gc.collect()
    assert log() is log_of(copied)
    del copied
    gc.collect()
    assert log() is None


def test_an_attachment_survives_its_text():
    model, _ = attached_net()
    about = model.attnres.abouts[""]
    assert Attachment.from_text(about).to_text() == about
    assert [k.name for k in Attachment.from_text(about).reads] == list(model.attnres.reads.names)


def test_a_checkpoint_of_another_config_is_refused_and_nothing_is_loaded():
    x = torch.randn(2, 4, 8)
    one, other = Broken(), Broken()
    ax.compile(one, (x,), config=VARIANTS["full"], inner="eager")
    ax.compile(other, (x,), config=VARIANTS["local"], inner="eager")
    with_random_queries(one)
    before = other(x)
    for strict in (True, False):
        with pytest.raises(ax.AttnResError, match=r"variant='full'.*variant='local'"):
            other.load_state_dict(one.state_dict(), strict=strict)
    assert other.attnres.config.variant == "local"
    torch.testing.assert_close(other(x), before)


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
