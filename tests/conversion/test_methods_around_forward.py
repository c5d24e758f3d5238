"""Methods that do what forward does without calling it: on a converted model they run its graph, or raise."""

import copy

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import EagerCallError, EditedError
from tests.capture.test_clones import WIDTH, Pair


class Encoder(Pair):
    """Sums in methods of its own, which others call."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def states(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x)).tanh()
        return self.last(x)

    def unseen(self, x):
        return x + self.mixes[0](self.norms[0](x)).tanh()

    def generate(self, x):
        return torch.cat([x, self.states(x)[:, -1:]], 1)

    def call_twice(self, x):
        return self(self(x))

    def first_branch(self, x):
        return self.head(x)

    def forward(self, x, states=False):
        y = self.states(x)
        return y if states else self.head(y)


class Weights(nn.Module):
    """Its branches call no module."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(2))

    def states(self, x):
        for weight in self.weights:
            x = x + (nn.functional.layer_norm(x, (WIDTH,)) @ weight).tanh()
        return x

    def forward(self, x):
        return nn.functional.layer_norm(self.states(x), (WIDTH,))


def example():
    return torch.randn(2, 3, WIDTH)


def with_random_queries(reads):
    for read in reads:
        nn.init.normal_(read.query)


AROUND = {
    "method": lambda model, x: model.states(x),
    "method that forward does not call": lambda model, x: model.unseen(x),
    "method that calls another": lambda model, x: model.generate(x),
    "forward of the class": lambda model, x: Encoder.forward(model, x),
    "method of the class": lambda model, x: Encoder.states(model, x),
    "function": lambda model, x: x + model.mixes[0](x),
}


@pytest.fixture(scope="module")
def pair_of_models():
    torch.manual_seed(0)
    model = Encoder().eval()
    converted = ax.convert(model, (example(),), check=False)
    with_random_queries(converted.attnres.reads)
    return model, converted


@pytest.mark.parametrize("way", AROUND)
def test_code_that_adds_around_forward_raises(pair_of_models, way):
    for converted in (pair_of_models[1], copy.deepcopy(pair_of_models[1])):
        with pytest.raises(EditedError, match="only a call of the whole model runs the converted graph"):
            AROUND[way](converted, example())


def test_an_argument_of_forward_does_what_the_method_did(pair_of_models):
    model, converted = pair_of_models
    x = example()
    states = converted(x, states=True)
    torch.testing.assert_close(model.head(states), converted(x))
    assert not torch.allclose(states, model.states(x), atol=1e-3)


def test_methods_that_call_the_model_run_its_graph(pair_of_models):
    _, converted = pair_of_models
    x = example()
    torch.testing.assert_close(converted.call_twice(x), converted(converted(x)))


def test_parts_that_add_nothing_by_themselves_are_called_as_before(pair_of_models):
    model, converted = pair_of_models
    x = example()
    assert torch.equal(converted.first_branch(x), model.head(x))
    assert torch.equal(converted.mixes[0](x), model.mixes[0](x))


def test_a_method_without_modules_raises_where_forward_calls_it():
    model = Weights()
    converted = ax.convert(model, (example(),), check=False)
    with pytest.raises(EditedError, match="states of a converted model"):
        converted.states(example())
    assert torch.isfinite(converted.original().states(example())).all()


def test_a_method_of_a_compiled_model_raises_and_runs_plain():
    model = Encoder().eval()
    original = copy.deepcopy(model)
    x = example()
    ax.compile(model, (x,), inner="eager")
    with_random_queries(model.attnres.reads)
    for call in (model.states, model.generate):
        with pytest.raises(EagerCallError, match=r"states of an attached model.*forward"):
            call(x)
    with ax.plain(model):
        assert torch.equal(model.states(x), original.states(x))
    states = model(x, states=True)
    torch.testing.assert_close(model.head(states), model(x))
    assert not torch.allclose(states, original.states(x), atol=1e-3)
    ax.detach(model)
    assert torch.equal(model.states(x), original.states(x))
