"""Edits of a converted model that its graphs would not see raise by name; the same edit of the original is followed."""

import copy
import functools
import types

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import EditedError

WIDTH = 8


class Table:
    """A plain object that the model calls."""

    factor = 2.0

    def __init__(self):
        self.rows = torch.ones(WIDTH)

    def __call__(self, x):
        return x * self.factor


class Net(nn.Module):
    scale = 1.0

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gelu, self.other = nn.GELU(), nn.SiLU()
        self.act, self.bound = torch.relu, self.gelu.forward
        self.part = functools.partial(nn.functional.leaky_relu, negative_slope=0.1)
        self.tables, self.by_name, self.plain = [torch.ones(WIDTH)], {"a": torch.ones(WIDTH)}, [nn.Linear(WIDTH, WIDTH)]
        self.names, self.config, self.table = {"a"}, types.SimpleNamespace(sizes=[1, 2]), Table()
        self.listed = [self.gelu]

    def twice(self, x):
        return 2 * x

    def forward(self, x):
        x = self.part(self.bound(self.act(x))) * self.scale * self.tables[0] * self.by_name["a"] * self.table.rows
        x = self.plain[0](self.twice(self.table(x)))
        for module in self.listed:
            x = module(x)
        x = x + sum(self.config.sizes) + ("a" in self.names) + hasattr(self, "extra")
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x))
        return x


EDITS = {
    "act": lambda m: setattr(m, "act", torch.tanh),
    "bound": lambda m: setattr(m, "bound", m.other.forward),
    "part": lambda m: setattr(m, "part", functools.partial(m.part.func, negative_slope=0.5)),
    "tables": lambda m: m.tables.__setitem__(0, torch.zeros(WIDTH)),
    "by_name": lambda m: m.by_name.update(a=torch.zeros(WIDTH)),
    "table.rows": lambda m: setattr(m.table, "rows", torch.zeros(WIDTH)),
    "table": lambda m: setattr(m.table, "factor", 5.0),
    "plain": lambda m: m.plain.__setitem__(0, nn.Linear(WIDTH, WIDTH)),
    "plain.0._parameters": lambda m: setattr(m.plain[0], "weight", nn.Parameter(torch.zeros(WIDTH, WIDTH))),
    "plain.0._forward_hooks": lambda m: m.plain[0].register_forward_hook(lambda *a: 3 * a[-1]),
    "listed": lambda m: m.listed.__setitem__(0, m.other),
    "names": lambda m: m.names.clear(),
    "config.sizes": lambda m: m.config.sizes.append(3),
    "scale": lambda m: setattr(m, "scale", 4.0),
    "twice": lambda m: setattr(m, "twice", lambda x: 7 * x),
    "extra": lambda m: setattr(m, "extra", 1),
    "gelu.forward": lambda m: setattr(m.gelu, "forward", torch.tanh),
    "norms.0.forward": lambda m: setattr(m.norms[0], "forward", torch.tanh),
}


@functools.cache
def pair():
    torch.manual_seed(0)
    model = Net().eval()
    return model, ax.convert(model, (torch.randn(2, 5, WIDTH),), check=False)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_no_graph_sees_raises_and_names_what_was_edited(name):
    _, converted = pair()
    copied = copy.deepcopy(converted)
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(copied(x), converted(x))
    EDITS[name](copied)
    with pytest.raises(EditedError, match=name.replace(".", r"\.")):
        copied(x)


@pytest.mark.parametrize("name", ["act", "tables", "plain", "names", "twice"])
def test_an_edit_of_the_original_is_followed(name):
    model = copy.deepcopy(pair()[0])
    converted = ax.convert(model, (torch.randn(2, 5, WIDTH),), check=False)
    EDITS[name](model)
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(converted(x), model(x))


@pytest.mark.slow
def test_every_later_capture_has_what_was_changed_in_the_original():
    """Of another size, in the other mode and after a parameter of the result was replaced, too."""
    model = copy.deepcopy(pair()[0])
    converted = ax.convert(model, (torch.randn(2, 5, WIDTH),), check=False)
    expected = copy.deepcopy(model)
    for changed in (model, expected):
        EDITS["act"](changed)
    for changed in (converted, expected):
        changed.mixes[0].weight = nn.Parameter(torch.eye(WIDTH))
    for training in (False, True):
        converted.train(training)
        for sizes in ((2, 5), (1, 3), (3, 1)):
            x = torch.randn(*sizes, WIDTH)
            torch.testing.assert_close(converted(x), expected(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.out.weight = self.inp.weight

    def forward(self, x):
        x = self.inp(x)
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x))
        return self.out(x)


UNTYING = {
    "another parameter": lambda m: setattr(m.out, "weight", nn.Parameter(2 * m.out.weight.detach())),
    "an assigned state": lambda m: m.load_state_dict(
        {n: v * 2 if n == "out.weight" else v.clone() for n, v in m.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("way", UNTYING)
def test_weights_that_are_tied_no_more_are_two_weights(way):
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(2, 5, WIDTH)
    expected = copy.deepcopy(model)
    converted = ax.convert(model, (x,), check=False)
    for changed in (converted, expected):
        UNTYING[way](changed)
    for training in (True, False):
        converted.train(training)
        torch.testing.assert_close(converted(x), expected(x))
    converted.train()(x).sum().backward()
    expected(x).sum().backward()
    for layer in ("inp", "out"):
        torch.testing.assert_close(getattr(converted, layer).weight.grad, getattr(expected, layer).weight.grad)


class WithoutBias(Tied):
    """A bias and a buffer that are None at first."""

    def __init__(self):
        super().__init__()
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.register_buffer("scale", None)

    def forward(self, x):
        return super().forward(x if self.scale is None else x * self.scale)


FILLING = {
    "parameter": lambda m: setattr(m.mixes[0], "bias", nn.Parameter(torch.linspace(0, 3, WIDTH))),
    "buffer": lambda m: setattr(m, "scale", torch.linspace(0, 3, WIDTH)),
}


@pytest.mark.parametrize("what", FILLING)
@pytest.mark.parametrize("copied", [False, True])
def test_a_tensor_in_a_place_that_held_none_is_seen(what, copied):
    torch.manual_seed(0)
    model, x = WithoutBias(), torch.randn(2, 5, WIDTH)
    expected = copy.deepcopy(model)
    converted = ax.convert(model, (x,), check=False)
    converted = copy.deepcopy(converted) if copied else converted
    for changed in (converted, expected):
        FILLING[what](changed)
    for training in (True, False):
        torch.testing.assert_close(converted.train(training)(x), expected(x))


def test_weights_of_a_loaded_model_that_are_tied_no_more_are_named(tmp_path):
    x = torch.randn(2, 5, WIDTH)
    ax.convert(Tied(), (x,), check=False).save(tmp_path / "model")
    loaded = ax.load(tmp_path / "model")
    loaded(x)
    UNTYING["another parameter"](loaded)
    with pytest.raises(EditedError, match=r"inp\.weight and out\.weight"):
        loaded(x)


def test_what_no_graph_holds_may_be_changed():
    converted = copy.deepcopy(pair()[1])
    converted.note, converted.norms[0].note = "mine", "mine"
    converted.mixes[0].weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    converted.config.other, converted.by_name["b"] = 1, 2
    assert converted(torch.randn(3, 4, WIDTH)).shape == (3, 4, WIDTH)
    converted.double()(torch.randn(1, 4, WIDTH).double())


def test_a_class_that_is_patched_after_the_conversion_is_named(monkeypatch):
    converted = copy.deepcopy(pair()[1])
    monkeypatch.setattr(nn.GELU, "forward", lambda _, x: 5 * x)
    with pytest.raises(EditedError, match=r"gelu\.forward"):
        converted(torch.randn(2, 5, WIDTH))


def test_a_function_that_closes_over_a_module_is_no_edit_until_it_is_replaced():
    torch.manual_seed(0)
    model = Net().eval()
    other, inner = model.other, lambda x: model.gelu(x)
    model.act = lambda x: other(inner(x))
    x = torch.randn(2, 5, WIDTH)
    converted = ax.convert(model, (x,), check=False)
    for found in (converted, copy.deepcopy(converted)):
        torch.testing.assert_close(found(x), model(x))
    assert converted._attnres_conversion.edits.followed == 0
    converted.act = lambda x: other(x)
    with pytest.raises(EditedError, match="act"):
        converted(x)


CHANGES = {
    "'extra' was added": lambda m: m.add_module("extra", nn.Linear(2, 2)),
    "'gelu' of the converted model was replaced": lambda m: setattr(m, "gelu", nn.SiLU()),
    "'other' was taken out": lambda m: delattr(m, "other"),
    "in another order": lambda m: m._modules.update(norms=m._modules.pop("norms")),
}


def test_what_was_done_to_the_children_of_the_root_is_said():
    x = torch.randn(2, WIDTH)
    for said, change in CHANGES.items():
        converted = ax.convert(Net(), (x,), check=False)
        change(converted)
        with pytest.raises(EditedError, match=said):
            converted(x)
