"""A conversion captures the mode the model is in; the other when it is first needed, checked like the first."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import attnres_fx as ax
from attnres_fx.capture import dynamo_module
from attnres_fx.errors import CheckError, EditedError, ModeError

WIDTH = 8


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.drop = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.linear(self.norm(x)).tanh())


class Tower(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tower(kind=Tower):
    torch.manual_seed(0)
    return kind()


def example(rows=2):
    return torch.randn(rows, 5, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
def test_the_other_mode_is_captured_by_the_switch_to_it_and_computes_what_the_original_does(training):
    model = tower().train(training)
    converted = ax.convert(model, (example(),))
    own, other = ("train", "eval") if training else ("eval", "train")
    assert (converted.report.modes, converted.report.deferred) == ((own,), (other,))
    assert f"modes {own} ({other} when first needed)" in str(converted.report)
    converted.train(not training)
    assert (converted.report.modes, converted.report.deferred) == (("eval", "train"), ())
    for mode in (True, False):
        torch.manual_seed(3)
        found = converted.train(mode)(example(3))
        torch.manual_seed(3)
        torch.testing.assert_close(found, model.train(mode)(example(3)))


@pytest.mark.parametrize("how", ["compiled", "by hand", "in a parent"])
def test_a_switch_that_sets_the_root_s_flag_first_gets_the_whole_mode(how):
    """`torch.compile` hands `training` on to the module before it switches it."""
    converted, original = ax.convert(tower(), (example(),)), tower().eval()
    if how == "compiled":
        torch.compile(converted, backend="eager").eval()
    elif how == "by hand":  # the root's flag alone: what is below still trains
        converted.training = False
        original = tower()
        original.training = False
    else:
        nn.Sequential(converted).eval()
    torch.manual_seed(3)
    found = converted(example())
    torch.manual_seed(3)
    torch.testing.assert_close(found, original(example()))


def test_a_model_that_is_used_in_one_mode_is_traced_once(monkeypatch):
    traced = []
    record = dynamo_module.record
    monkeypatch.setattr(dynamo_module, "record", lambda *a: traced.append(1) or record(*a))
    converted = ax.convert(tower(), (example(),))
    converted.train()(example(4))
    assert len(traced) == 1
    converted.eval()
    assert len(traced) == 2
    converted.train().eval()(example())
    assert len(traced) == 2


class Cached(Tower):
    """Like models of transformers: unless it is told not to, it returns what no graph can."""

    def forward(self, x, use_cache=True):
        return super().forward(x), object() if use_cache else None


@pytest.mark.slow
def test_what_a_capture_bound_stays_bound_in_the_later_mode_and_in_a_pickle(monkeypatch):
    model = tower(Cached)
    for converted in (ax.convert(model, (example(),)), pickle.loads(pickle.dumps(ax.convert(model, (example(),))))):
        converted.eval()
        with monkeypatch.context() as patch:
            patch.setattr(dynamo_module, "record", lambda *_: pytest.fail("captured once more"))
            for mode in (True, False):
                assert converted.train(mode)(example())[1] is None


@pytest.mark.slow
def test_what_needs_both_modes_captures_the_other(tmp_path):
    for need in (
        lambda c: c.save(tmp_path / "model"),
        lambda c: c.graph_module("eval"),
        lambda c: c.replacements("eval"),
        lambda c: c.captured("eval"),
    ):
        converted = ax.convert(tower(), (example(),))
        need(converted)
        assert converted.report.modes == ("eval", "train")
        assert converted.training


def test_a_mode_that_cannot_be_captured_is_refused_at_the_switch_and_said_in_the_report():
    class Counting(Tower):
        def forward(self, x):
            if not self.training:
                self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    converted = ax.convert(tower(Counting), (example(),))
    with pytest.raises(ModeError, match=r"no eval graph.*calls.*It stays in train mode"):
        converted.eval()
    assert converted.training and converted.report.modes == ("train",)
    assert any("no eval graph" in note for note in converted.report.notes)
    assert converted(example()).shape == (2, 5, WIDTH)


def test_what_the_capture_of_the_later_mode_has_to_say_is_in_the_report():
    class Sized(Tower):
        scale = None

        def forward(self, x):
            if not self.training and self.scale is None:
                self.scale = x.shape[-1]
            return super().forward(x)

    converted = ax.convert(tower(Sized), (example(),))
    assert not any("scale" in note for note in converted.report.notes)
    converted.eval()
    assert any("scale" in note and "first call" in note for note in converted.report.notes)


def test_modes_that_do_not_read_alike_are_refused_by_name():
    class Shorter(Tower):
        def forward(self, x):
            x = self.embed(x)
            for layer in self.layers if self.training else self.layers[:2]:
                x = layer(x)
            return self.head(x)

    converted = ax.convert(tower(Shorter), (example(),))
    with pytest.raises(ModeError, match=r"do not have the same reads.*layers.2"):
        converted.eval()


def test_a_later_mode_is_checked_like_the_first(monkeypatch):
    converted = ax.convert(tower(), (example(),))
    from attnres_fx.conversion import deferred

    rewrite = deferred.rewrite_

    def broken(gm, *args):
        reads = rewrite(gm, *args)
        tanh = next(n for n in gm.graph.nodes if "tanh" in str(n.target))
        tanh.target = "sigmoid" if tanh.op == "call_method" else torch.sigmoid
        gm.recompile()
        return reads

    monkeypatch.setattr(deferred, "rewrite_", broken)
    with pytest.raises(CheckError, match="in eval mode"):
        converted.eval()
    assert converted.training


@pytest.mark.slow
def test_a_mode_is_captured_as_the_model_is_when_it_is_needed():
    converted = ax.convert(tower(), (example(),)).to(torch.bfloat16)
    assert converted.eval()(example().bfloat16()).dtype == torch.bfloat16
    changed = ax.convert(tower(), (example(),))
    with torch.no_grad():
        changed.head.weight.zero_()
    assert torch.equal(changed.eval()(example()), changed.head.bias.expand(2, 5, WIDTH))
    edited = ax.convert(tower(), (example(),))
    edited.layers[0].linear.register_forward_hook(lambda *_: None)
    with pytest.raises(EditedError, match=r"layers\.0\.linear"):
        edited.eval()


def test_a_copy_captures_on_its_own_tensors():
    converted = ax.convert(tower(), (example(),))
    copied = copy.deepcopy(converted)
    with torch.no_grad():
        copied.head.weight.zero_()
    assert torch.equal(copied.eval()(example()), copied.head.bias.expand(2, 5, WIDTH))
    assert converted.report.deferred == ("eval",)


def test_queries_that_were_trained_before_are_read_by_the_later_mode():
    converted = ax.convert(tower(), (example(),))
    for read in converted.attnres.reads:
        nn.init.normal_(read.query)
    eager = ax.convert(tower().eval(), (example(),))
    eager.load_state_dict(converted.state_dict())
    torch.testing.assert_close(converted.eval()(example()), eager(example()))


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_is_sharded_after_its_conversion_gets_its_other_mode(tmp_path, training):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tower().train(training)
        expected = model.train(not training)
        torch.manual_seed(3)
        expected = expected(example()).detach()
        converted = ax.convert(model.train(training), (example(),))
        fully_shard(converted)
        converted.train(not training)
        torch.manual_seed(3)
        torch.testing.assert_close(converted(example()), expected)
        converted(example()).sum().backward()
        assert all(p.grad is not None for p in converted.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrote", ["floats", "indices"])
def test_a_model_that_was_made_without_data_switches_once_it_has_some(wrote):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp = nn.Linear(8, 8) if wrote == "floats" else nn.Embedding(9, 8)
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
            self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            x = self.inp(x)
            for norm, mix in zip(self.norms, self.mixes, strict=True):
                x = x + mix(norm(x))
            return x

    expected = Net()
    x = torch.randn(2, 5, 8) if wrote == "floats" else torch.randint(0, 9, (2, 5))
    with torch.device("meta"):
        model = Net()
    converted = ax.convert(model, (x.to("meta"),)).to_empty(device="cpu")
    for read in converted.attnres.reads:
        nn.init.zeros_(read.query)
        nn.init.ones_(read.key_weight)
    converted.load_state_dict(expected.state_dict(), strict=False)
    for training in (False, True):
        torch.testing.assert_close(converted.train(training)(x), expected(x))
