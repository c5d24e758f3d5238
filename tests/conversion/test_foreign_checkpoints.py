"""Checkpoints of Kimi K3 and flash-linear-attention: read into converted and attached models, and written."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

import attnres_fx as ax
from tests.support.checkpoint_models import WIDTH, FlaReference, KimiReference, PlainModel
from tests.support.plain_decoders import LONGER, X, apart, compiled, converted

CASES = [(KimiReference, "kimi", 2), (FlaReference, "fla", 3), (FlaReference, "fla", 1), (KimiReference, "kimi", 9)]
every_case = pytest.mark.parametrize(("reference", "style", "block"), CASES)


@every_case
@pytest.mark.parametrize("make", [converted, compiled])
@pytest.mark.slow_after(2)
def test_a_checkpoint_computes_what_its_own_code_does(reference, style, block, make, tmp_path):
    right = reference.random(block=block)
    right.save(tmp_path, prefix="language_model.", shards=3, nested=style == "kimi")
    model = make(right.plain())
    assert apart(model, right) > 0.1
    ax.load_adapter(model, tmp_path)
    size = block * (2 if style == "kimi" else 1)
    assert model.attnres.config == ax.AttnResConfig(block_size=size, output="mean", eps=1e-5)
    assert apart(model, right) <= 1e-6
    assert apart(model, right, LONGER) <= 1e-6


@every_case
@pytest.mark.slow
def test_in_float64_and_in_gradients_it_is_the_same_function(reference, style, block, tmp_path):
    right = reference.random(block=block).double()
    right.save(tmp_path)
    model = converted(right.plain().double())
    ax.load_adapter(model, tmp_path)
    assert apart(model, right) <= 1e-12
    for one in (model, right):
        one(X).square().mean().backward()
    assert torch.equal(model.attnres.reads[0].query, right.model.layers[0].mlp_res_proj.weight.flatten())
    given = dict(right.named_parameters())
    reads = list(model.attnres.reads)
    wanted = [given["model.layers.0.mlp_res_proj.weight"].grad, given[f"model.{right.last}_proj.weight"].grad]
    for read, grad in zip((reads[0], reads[-1]), wanted, strict=True):
        torch.testing.assert_close(read.query.grad, grad.flatten(), rtol=1e-9, atol=1e-12)
    for name, parameter in model.named_parameters():
        if not name.startswith("attnres"):
            torch.testing.assert_close(parameter.grad, given[name].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_model_that_took_a_checkpoint_trains_saves_and_is_copied(tmp_path):
    right = KimiReference.random()
    right.save(tmp_path / "theirs")
    model = converted(right.plain(), ax.AttnResConfig(variant="full"))
    model(LONGER[:1])  # a program of another kind, of the config before
    ax.load_adapter(model, tmp_path / "theirs")
    assert apart(model, right, LONGER[:1]) <= 1e-6
    assert "mean" in str(model.report)
    assert [len(r.sources) for r in model.report.reads] == [2, 2, 2, 2, 3, 3]
    assert apart(pickle.loads(pickle.dumps(model)), right) <= 1e-6
    model.save(tmp_path / "model.attnres")
    assert apart(ax.load(tmp_path / "model.attnres"), right) <= 1e-6
    ax.save_adapter(model, tmp_path / "ours")
    other = converted(right.plain(), model.attnres.config)
    ax.load_adapter(other, tmp_path / "ours")
    assert apart(other, right) <= 1e-6
    model.train()
    assert apart(model, right) <= 1e-6
    model(X).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@every_case
@pytest.mark.parametrize("make", [converted, compiled])
@pytest.mark.slow
def test_what_is_exported_computes_the_same_in_their_code_and_here(reference, style, block, make, tmp_path):
    size = block * (2 if style == "kimi" else 1)
    model = make(PlainModel().eval(), ax.AttnResConfig(block_size=size, output="mean", eps=1e-5))
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_(0, 0.5)
            read.key_weight.normal_(1, 0.3)
    tmp_path.joinpath("config.json").write_text('{"hidden_size": 16}')
    ax.export_adapter(model, tmp_path, style=style)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["hidden_size"] == 16
    theirs = reference(eps=settings[reference.eps_setting], block=settings[reference.setting]).eval()
    state = load_file(tmp_path / f"attnres_{style}.safetensors")
    shapes = {"proj": (1, WIDTH), "norm": (WIDTH,)}
    assert all(t.shape == shapes[n.split(".")[-2].split("_")[-1]] for n, t in state.items())
    own = {n: t for n, t in model.state_dict().items() if not n.startswith("attnres")}
    theirs.load_state_dict({**own, **state})  # strict: every tensor is there
    assert apart(model, theirs) <= 1e-6
    again = make(theirs.plain())
    ax.load_adapter(again, tmp_path)
    assert apart(again, theirs) <= 1e-6
