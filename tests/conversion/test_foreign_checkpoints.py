"""Checkpoints of Kimi K3 and flash-linear-attention: read into converted and attached models, and written."""

import json
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import SaveError
from tests.support.checkpoint_models import TOKENS, WIDTH, FlaReference, KimiReference, PlainModel
from tests.support.damaged_files import NASTY

X = torch.randint(0, TOKENS, (2, 7), generator=torch.Generator().manual_seed(1))
LONGER = torch.randint(0, TOKENS, (3, 9), generator=torch.Generator().manual_seed(2))
CASES = [(KimiReference, "kimi", 2), (FlaReference, "fla", 3), (FlaReference, "fla", 1), (KimiReference, "kimi", 9)]
every_case = pytest.mark.parametrize(("reference", "style", "block"), CASES)


def converted(plain, config=None):
    return ax.convert(plain, (X,), config=config, check=False)


def compiled(plain, config=None):
    ax.attach(plain, (X,), config=config)
    plain.compile(backend="attnres", fullgraph=True, dynamic=True, options={"inner": "eager"})
    return plain


def apart(model, reference, tokens=X):
    """Largest difference of outputs over the largest output."""
    with torch.no_grad():
        right = reference(tokens)
        return float((model(tokens) - right).abs().max() / right.abs().max())


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


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


class Parallel(nn.Module):
    """One read a layer, six of them."""

    def __init__(self, layers=6):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(layers))
        self.embed, self.norm = nn.Embedding(TOKENS, WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


class PostNorm(Parallel):
    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block[0](x + block[1](x))
        return self.norm(x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PlainModel(), ["no attnres parameters"]),
        (lambda: converted(PlainModel(4).eval()), ["3 layers", "6 reads", "8 reads"]),
        (lambda: converted(Parallel().eval()), ["read 2", "blocks.2", "layer 1"]),
        (lambda: converted(PostNorm().eval()), ["gate"]),
    ],
)
def test_a_model_that_does_not_fit_is_named_and_left_as_it_is(make, words, tmp_path):
    KimiReference.random().save(tmp_path)
    model = make()
    before, config = values(model), getattr(getattr(model, "attnres", None), "config", None)
    with pytest.raises(SaveError) as caught:
        ax.load_adapter(model, tmp_path)
    assert all(w in str(caught.value) for w in words), caught.value
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    assert getattr(getattr(model, "attnres", None), "config", None) == config


@pytest.mark.slow
def test_a_loaded_model_has_no_python_to_capture_and_says_which_config_to_convert_with(tmp_path):
    right = KimiReference.random()
    right.save(tmp_path / "theirs")
    converted(right.plain()).save(tmp_path / "model.attnres")
    loaded = ax.load(tmp_path / "model.attnres")
    with pytest.raises(SaveError, match="block_size=4"):
        ax.load_adapter(loaded, tmp_path / "theirs")
    converted(right.plain(), ax.AttnResConfig(block_size=4, output="mean", eps=1e-5)).save(tmp_path / "model.attnres")
    loaded = ax.load(tmp_path / "model.attnres")
    ax.load_adapter(loaded, tmp_path / "theirs")
    assert apart(loaded, right) <= 1e-6


def _state(change):
    def apply(folder):
        path = next(folder.glob("*.safetensors"))
        state = load_file(path)
        change(state)
        save_file(state, path)

    return apply


def _set(name, tensor):
    return _state(lambda state: state.update({name: tensor}))


def _settings(**changed):
    def apply(folder):
        path = folder / "config.json"
        settings = {**json.loads(path.read_text()), **changed}
        path.write_text(json.dumps({n: v for n, v in settings.items() if v is not ...}))

    return apply


QUERY, GAIN = "model.layers.2.mlp_res_proj.weight", "model.layers.2.self_attention_res_norm.weight"
WRONG = {
    "no query": (_state(lambda s: s.pop(QUERY)), ["lacks", QUERY]),
    "no gain": (_state(lambda s: s.pop(GAIN)), ["lacks", GAIN]),
    "no last read": (_state(lambda s: s.pop("model.output_attn_res_norm.weight")), ["lacks", "output_attn_res_norm"]),
    "no tensors": (_state(lambda s: [s.pop(n) for n in list(s) if "_res_" in n]), ["no tensors of reads"]),
    "two models": (_set(f"other.{QUERY}", torch.zeros(1, WIDTH)), ["2 sets of tensors"]),
    "a layer too many": (_set("model.layers.9.mlp_res_proj.weight", torch.zeros(1, WIDTH)), ["layers.9"]),
    "a query as a row": (_set(QUERY, torch.zeros(WIDTH)), [QUERY, "[16]", "[1, 16]"]),
    "a wider gain": (_set(GAIN, torch.zeros(2 * WIDTH)), [GAIN, "[32]", "[16]"]),
    "whole numbers": (_set(GAIN, torch.zeros(WIDTH, dtype=torch.int64)), [GAIN, "int64"]),
    "twice": (lambda folder: shutil.copy(next(folder.glob("*.safetensors")), folder / "b.safetensors"), ["more than"]),
    "no files": (lambda folder: next(folder.glob("*.safetensors")).unlink(), ["no tensors of reads"]),
    "blocks of zero": (_settings(attn_res_block_size=0), ["attn_res_block_size=0"]),
    "blocks in words": (_settings(attn_res_block_size="12"), ["attn_res_block_size='12'"]),
    "no eps": (_settings(rms_norm_eps=...), ["rms_norm_eps=None"]),
    "two styles": (_settings(attnres_block_size=2), ["2 kinds", "kimi", "fla"]),
    "no blocks": (
        _settings(attn_res_block_size=None),
        ["holds no adapter", "attn_res_block_size", "attnres_block_size"],
    ),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), ["no table"]),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), ["damaged"]),
    "cut short": (lambda folder: _cut(next(folder.glob("*.safetensors"))), ["damaged"]),
}


def _cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.fixture(scope="module")
def model():
    return converted(PlainModel().eval())


@pytest.mark.parametrize(("damage", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_folder_is_a_save_error_that_loads_nothing(damage, words, model, tmp_path):
    KimiReference.random().save(tmp_path)
    before, config = values(model), model.attnres.config
    damage(tmp_path)
    with pytest.raises(SaveError) as caught:
        ax.load_adapter(model, tmp_path)
    assert all(w in str(caught.value) for w in words), caught.value
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    assert model.attnres.config == config


def test_damaged_headers_and_settings_are_save_errors_or_load(model, tmp_path):
    KimiReference.random().save(tmp_path)
    path, draw = next(tmp_path.glob("*.safetensors")), random.Random(0)
    data, text = path.read_bytes(), (tmp_path / "config.json").read_text()
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for case in range(60):
        flipped = bytearray(data)
        flipped[draw.randrange(header)] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(flipped) if case % 3 else data[: draw.randrange(len(data))])
        config = json.loads(text)
        if case % 5 == 0:
            config[draw.choice(list(config))] = draw.choice([v for v in NASTY if v != 10**400])
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            ax.load_adapter(model, tmp_path)
        except SaveError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("config", "style", "words"),
    [
        (ax.AttnResConfig(block_size=4), "kimi", ["sums", "eps"]),
        (ax.AttnResConfig(variant="local", block_size=4, output="mean"), "fla", ["local"]),
        (ax.AttnResConfig(block_size=3, output="mean"), "kimi", ["2 sublayers", "3"]),
        (ax.AttnResConfig(boundaries=(1, 3), output="mean"), "fla", ["0, 1, 3", "block_size"]),
        (ax.AttnResConfig(block_size=4, output="mean"), "inkling", ["'kimi'", "'fla'", "inkling"]),
    ],
)
def test_what_a_style_cannot_say_is_named(config, style, words, tmp_path):
    model = PlainModel().eval()
    ax.attach(model, (X,), config=config)
    with pytest.raises(SaveError) as caught:
        ax.export_adapter(model, tmp_path / "new", style=style)
    assert all(w in str(caught.value) for w in words), caught.value
    assert not (tmp_path / "new").exists()


def test_an_export_does_not_hide_behind_an_adapter_or_break_settings(tmp_path):
    model = PlainModel().eval()
    ax.attach(model, (X,), config=ax.AttnResConfig(block_size=4, output="mean"))
    ax.save_adapter(model, tmp_path / "ours")
    with pytest.raises(SaveError, match="another folder"):
        ax.export_adapter(model, tmp_path / "ours", style="kimi")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SaveError, match="no JSON"):
        ax.export_adapter(model, tmp_path, style="kimi")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "ours"]
