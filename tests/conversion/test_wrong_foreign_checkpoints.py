"""Checkpoints of other libraries that are damaged, or of another model: refused by name, and nothing is loaded."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import SaveError
from tests.support.checkpoint_models import TOKENS, WIDTH, KimiReference, PlainModel
from tests.support.damaged_files import NASTY
from tests.support.plain_decoders import X, apart, converted, values


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
