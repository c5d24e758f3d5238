"""Callbacks that record depth weights: with transformers' Trainer, and with Lightning's hooks."""

import pickle
import sys
import types

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import attnres_fx as ax
from attnres_fx.errors import ArgumentError, AttachError, MissingPackageError

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.drop = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.mix(self.norm(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.Sequential(Layer(), Layer()), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.layers(x))


class WithLoss(nn.Module):
    """What a trainer of transformers wants of a model."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, labels=None):
        y = self.inner(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


def trained(tmp_path, callbacks):
    model = ax.convert(Net().train(), (X,), check=False)
    data = [{"x": X[i % 2], "labels": X[i % 2].flip(0)} for i in range(8)]
    args = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(WithLoss(model), args, train_dataset=data, callbacks=callbacks).train()
    return model


@pytest.mark.slow
def test_a_trainer_of_transformers_records_weights_and_trains_as_without(tmp_path):
    callback = ax.DepthWeightsCallback((X,), every=2, to=tmp_path / "weights.csv")
    assert isinstance(callback, TrainerCallback) and isinstance(callback, ax.DepthWeightsCallback)
    watched, alone = trained(tmp_path, [callback]), trained(tmp_path, [])
    assert [step for step, _ in callback.history] == [2, 4]
    assert watched.training
    for (name, one), other in zip(watched.state_dict().items(), alone.state_dict().values(), strict=True):
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other), name
    last = callback.history[-1][1]
    assert str(last) == str(ax.depth_weights(watched.eval(), (X,)))
    assert (tmp_path / "weights.csv").read_text().startswith("step,stream,read")
    again = pickle.loads(pickle.dumps(callback))
    assert type(again) is type(callback) and len(again.history) == 2


@pytest.fixture
def lightning(monkeypatch):
    """A stand-in with Lightning's class of callbacks."""
    package, module = types.ModuleType("lightning"), types.ModuleType("lightning.pytorch")
    module.Callback = type("Callback", (), {"setup": lambda *_: None})
    monkeypatch.setitem(sys.modules, "lightning", package)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)
    monkeypatch.setattr("attnres_fx.analysis.callbacks._derived", _uncached())
    return module


def _uncached():
    from attnres_fx.analysis import callbacks

    return callbacks._derived.__wrapped__


def test_lightnings_hooks_record_weights_of_the_model_in_the_module(lightning):
    model = Net()
    ax.attach(model, (X,))
    module = nn.Module()
    module.net = model
    callback = ax.LightningDepthWeightsCallback((X,), every=2)
    assert isinstance(callback, lightning.Callback)
    trainer = types.SimpleNamespace(global_step=0, is_global_zero=True)
    for step in range(1, 6):
        trainer.global_step = step
        if step == 3:
            nn.init.ones_(model.attnres.reads[-1].query)
        callback.on_train_batch_end(trainer, module, None, X, step)
    callback.on_train_end(trainer, module)
    assert [step for step, _ in callback.history] == [2, 4, 5]
    before, after = (weights.reads[-1].mean() for _, weights in callback.history[:2])
    assert len(set(before)) == 1 and len(set(after)) > 1, "the graph captured first follows the weights"


def test_without_the_package_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr("attnres_fx.analysis.callbacks._derived", _uncached())
    for module in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match="pip install lightning"):
        ax.LightningDepthWeightsCallback((X,))


def test_what_holds_no_reads_is_refused_by_name():
    callback = ax.DepthWeightsCallback((X,))
    with pytest.raises(AttachError, match="no converted or attached model in Net"):
        callback.look(Net(), 1)
    with pytest.raises(ArgumentError, match="number of steps"):
        ax.DepthWeightsCallback((X,), every=0)
