"""The adapter folder: the added parameters of converted and attached models, and what does not fit."""

import copy
import json
import random
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import SaveError
from tests.support.damaged_files import NASTY, changed, places
from tests.support.paths import ROOT

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
CONFIG = ax.AttnResConfig(variant="block", block_size=2)


class Tower(nn.Module):
    def __init__(self, width=8, layers=3, post=False):
        super().__init__()
        self.post = post
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))
        self.mixes = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=False):
            x = norm(x + mix(x)) if self.post else x + mix(norm(x))
        return self.norms[-1](x)


def converted(model=None, config=CONFIG):
    return ax.convert(Tower().eval() if model is None else model, (X,), config=config, check=False)


def attached(model=None, config=CONFIG):
    model = Tower().eval() if model is None else model
    ax.attach(model, (X,), config=config)
    return model


def trained(model):
    with torch.no_grad():
        for parameter in model.attnres.parameters():
            parameter.normal_()
    return model


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("source", [converted, attached])
@pytest.mark.parametrize("target", [converted, attached])
@pytest.mark.parametrize("post", [False, True])
def test_an_adapter_goes_from_converted_and_attached_models_to_either(source, target, post, tmp_path):
    base = Tower(post=post).eval()
    one, two = trained(source(base if source is converted else copy.deepcopy(base))), target(copy.deepcopy(base))
    ax.save_adapter(one, tmp_path / "new" / "adapter")
    assert ax.load_adapter(two, tmp_path / "new" / "adapter") is two.attnres
    torch.testing.assert_close(parameters(two), parameters(one), rtol=0, atol=0)
    assert sorted(p.name for p in (tmp_path / "new" / "adapter").iterdir()) == [
        "attnres.safetensors",
        "attnres_config.json",
    ]


def test_the_folder_says_what_it_is(tmp_path):
    from safetensors.torch import load_file

    one = trained(converted())
    ax.save_adapter(one, tmp_path)
    about = json.loads((tmp_path / "attnres_config.json").read_text())
    assert (about["variant"], about["block_size"], about["output"], about["eps"]) == ("block", 2, "sum", 1e-6)
    assert about["reads"][0] == {"name": one.attnres.reads[0].name, "width": 8, "gate": False}
    assert about["version"] == ax.__version__
    assert ["mixes.0.weight", [8, 8]] in about["base"]["parameters"]
    other = converted()
    result = other.load_state_dict(load_file(tmp_path / "attnres.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert torch.equal(other.attnres.reads[0].query, one.attnres.reads[0].query)


@pytest.mark.slow
def test_a_wrapped_model_and_another_dtype_take_an_adapter(tmp_path):
    ax.save_adapter(torch.compile(trained(attached())), tmp_path)
    wrapped = nn.ModuleDict({"inner": converted().double()})
    assert ax.load_adapter(wrapped, tmp_path).reads[0].query.dtype == torch.float64


class Longer(Tower):
    def __init__(self):
        super().__init__(layers=4)


class Wider(Tower):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tower(), ["no attnres parameters", "block_size=2"]),
        (lambda: converted(config=ax.AttnResConfig(variant="full")), ["variant differs", "full", "block_size=2"]),
        (lambda: attached(config=ax.AttnResConfig(block_size=3)), ["block_size differs", "block_size=3"]),
        (lambda: converted(config=ax.AttnResConfig(block_size=2, eps=1e-5)), ["eps differs", "eps=1e-05"]),
        (lambda: converted(config=ax.AttnResConfig(block_size=2, output="mean")), ["output differs", "mean"]),
        (lambda: converted(Longer().eval()), ["the model alone", "norms.4"]),
        (lambda: converted(Wider().eval()), ["base model is another", "extra.weight"]),
        (lambda: nn.ModuleList([converted(), converted()]), ["2 modules"]),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(make, words, tmp_path):
    ax.save_adapter(trained(converted()), tmp_path)
    model = make()
    before = parameters(model)
    with pytest.raises(SaveError) as caught:
        ax.load_adapter(model, tmp_path)
    assert all(w in str(caught.value) for w in words), caught.value
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)


def test_a_model_without_reads_of_its_own_has_no_adapter(tmp_path):
    with pytest.raises(SaveError, match="no attnres parameters"):
        ax.save_adapter(Tower(), tmp_path)
    with pytest.raises(SaveError, match="holds no adapter"):
        ax.load_adapter(converted(), tmp_path)


def test_damaged_folders_are_save_errors_and_load_nothing(tmp_path):
    ax.save_adapter(trained(converted()), tmp_path)
    config, tensors = tmp_path / "attnres_config.json", tmp_path / "attnres.safetensors"
    text, data = config.read_text(), tensors.read_bytes()
    model, draw = converted(), random.Random(0)
    before = parameters(model)
    about = json.loads(text)
    cases = [
        (text, data[:-1]),
        (text, b""),
        (text[:-5], data),
        ("[]", data),
        ("", data),
        (text.replace("8", "9"), data),
    ]
    others = [changed(about, p, draw)[0] for p in draw.sample(list(places(about)), 60)]
    cases += [(json.dumps(other), data) for other in others if json.dumps(other) != json.dumps(about)]
    cases += [(json.dumps(value), data) for value in NASTY if value != 10**400]
    for _ in range(60):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        cases.append((text, bytes(flipped)))
    for changed_text, changed_data in cases:
        config.write_text(changed_text)
        tensors.write_bytes(changed_data)
        with pytest.raises(SaveError):
            ax.load_adapter(model, tmp_path)
    tensors.unlink()
    with pytest.raises(SaveError, match="missing"):
        ax.load_adapter(model, tmp_path)
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)


KILLED = """
import os, pathlib, signal, sys, torch, attnres_fx as ax
from tests.conversion.test_adapter import converted

def fill(value):
    with torch.no_grad():
        for parameter in model.attnres.parameters():
            parameter.fill_(value)

def killed_at(step):
    original, calls = pathlib.Path.replace, []
    def replace(*args):
        calls.append(args)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return replace

model = converted()
for step in range(1, 6):
    folder = pathlib.Path(sys.argv[1]) / str(step)
    fill(1.0)
    ax.save_adapter(model, folder)
    child = os.fork()
    if not child:
        pathlib.Path.replace = killed_at(step)
        fill(2.0)
        ax.save_adapter(model, folder)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_the_old_adapter_or_the_new_one(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    codes = list(map(int, done.stdout.split()))
    assert codes[:4] == [-signal.SIGKILL] * 4, done.stderr
    assert codes[-1] == 0
    model = converted()
    for step in range(1, 6):
        folder = tmp_path / str(step)
        values = {float(v) for p in ax.load_adapter(model, folder).parameters() for v in p.detach().unique()}
        assert values == ({1.0} if step < 4 else {2.0}), step
        ax.save_adapter(trained(model), folder)
        expected = parameters(model)
        ax.load_adapter(model, folder)
        torch.testing.assert_close(parameters(model), expected, rtol=0, atol=0)
        assert [p.name for p in folder.glob("attnres.safetensors*")] == ["attnres.safetensors"]
