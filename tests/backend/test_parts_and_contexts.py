"""What is called by itself, what is for one thread or task, and what a copy or a limit says."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import BackendError, EagerCallError
from tests.support.attached import VARIANTS, Broken, with_random_queries


class Stack(nn.Module):
    def __init__(self, final):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.final = nn.LayerNorm(8) if final else nn.Identity()

    def forward(self, x, memory=None):
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            y = norm(x)
            x = x + mix(y if memory is None else y + memory.mean(1, keepdim=True)).tanh()
        return self.final(x)


class Translator(nn.Module):
    def __init__(self, final=True):
        super().__init__()
        self.encoder, self.decoder = Stack(final), Stack(final)

    def forward(self, source, target, memory=None):
        memory = self.encoder(source) if memory is None else memory
        return self.decoder(target, memory)

    def translate(self, source, target):
        memory = self.encoder(source)
        for _ in range(2):
            target = target + self(source, target, memory=memory)[:, -1:]
        return target


def translator(final=True):
    torch.manual_seed(0)
    model, example = Translator(final).eval(), (torch.randn(2, 5, 8), torch.randn(2, 3, 8))
    return model, example


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.slow
def test_an_encoder_that_is_called_by_itself_runs_the_rewritten_form(final):
    model, (source, target) = translator(final)
    whole = copy.deepcopy(model)
    ax.compile(whole, (source, target), config=VARIANTS["full"], inner="eager")
    ax.compile(model, (source, target), config=VARIANTS["full"], inner="eager")
    for one in (model, whole):
        with_random_queries(one)
    torch.testing.assert_close(model(source, target, memory=model.encoder(source)), whole(source, target))
    assert model.translate(source, target).isfinite().all()


def test_a_part_of_an_attached_model_never_runs_plain_in_silence():
    model, example = translator()
    ax.attach(model, example)
    with pytest.raises(EagerCallError):
        model.encoder(example[0])
    with ax.plain(model):
        model.encoder(example[0])
    ax.detach(model)
    model.encoder(example[0])
    assert type(model.encoder) is Stack and list(model.state_dict()) == list(translator()[0].state_dict())


def compiled_net():
    torch.manual_seed(0)
    model, x = Broken().eval(), torch.randn(2, 4, 8)
    ax.compile(model, (x,), config=VARIANTS["full"], inner="eager")
    with_random_queries(model)
    expected = model(x)
    with ax.plain(model):
        plain = model(x)
    assert not torch.allclose(expected, plain)
    return model, x, expected, plain


def test_plain_is_for_one_thread():
    model, x, expected, plain = compiled_net()
    found = []
    with ax.plain(model):
        thread = threading.Thread(target=lambda: found.append(model(x)))
        thread.start()
        thread.join()
        torch.testing.assert_close(model(x), plain)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(model(x), expected)


def test_plain_is_for_one_task():
    model, x, expected, plain = compiled_net()

    async def stays_plain(entered, done):
        with ax.plain(model):
            entered.set()
            await done.wait()
            return model(x)

    async def runs():
        entered, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(stays_plain(entered, done))
        await entered.wait()
        meanwhile = model(x)
        done.set()
        return meanwhile, await task

    meanwhile, inside = asyncio.run(runs())
    torch.testing.assert_close(meanwhile, expected)
    torch.testing.assert_close(inside, plain)


def test_a_compiled_form_inside_plain_says_what_to_call():
    model, x = Broken().eval(), torch.randn(2, 4, 8)
    ax.attach(model, (x,))
    compiled = torch.compile(model, backend="attnres", options={"inner": "eager"})
    compiled(x)
    with ax.plain(compiled) as original:
        original(x)
        with pytest.raises(EagerCallError, match="call what plain yields"):
            compiled(x)
    compiled(x)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "average": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_a_compiled_model_says_that_it_is_to_be_compiled(kind):
    model, x, expected, _ = compiled_net()
    copied = COPIES[kind](model)
    with pytest.raises(EagerCallError, match=r"A copy of a compiled model .* is not compiled"):
        copied(x)
    inner = getattr(copied, "module", copied)
    inner.compile(backend="attnres", fullgraph=True, options={"inner": "eager"})
    torch.testing.assert_close(copied(x), expected)


@pytest.mark.slow
def test_more_kinds_of_calls_than_the_compiler_allows_by_itself_have_graphs():
    model, x, _, _ = compiled_net()
    ax.detach(model)
    ax.compile(model, (x,), inner="eager", dynamic=False)
    for length in range(2, 14):
        model(torch.randn(1, length, 8))
    assert len(ax.explain(model).graphs) >= 12


def test_a_limit_that_is_reached_is_named_with_the_setting():
    model, x, _, _ = compiled_net()
    ax.detach(model)
    ax.compile(model, (x,), inner="eager", dynamic=False)
    limit = torch._dynamo.config.patch(recompile_limit=2)
    with limit, pytest.raises(BackendError, match=r"limit of 2 .*torch\._dynamo\.config\.recompile_limit"):
        for length in range(2, 8):
            model(torch.randn(1, length, 8))


def test_classes_do_not_share_a_limit():
    class Other(Broken):
        pass

    one, other = Broken(), Other()
    for model in (one, other):
        ax.attach(model, (torch.randn(2, 4, 8),))
    assert type(one).forward.__code__ is not type(other).forward.__code__


def test_depth_weights_of_a_compiled_model_are_those_of_a_converted_one():
    model, x, expected, _ = compiled_net()
    found = ax.depth_weights(model, (x,))
    state = copy.deepcopy(model.attnres.state_dict())
    torch.testing.assert_close(model(x), expected)
    ax.detach(model)
    converted = ax.convert(model, (x,), config=VARIANTS["full"])
    converted.attnres.load_state_dict(state)
    for one, other in zip(found, ax.depth_weights(converted, (x,)), strict=True):
        assert one.name == other.name
        torch.testing.assert_close(one.weights, other.weights)


def test_depth_weights_of_a_plain_model_say_what_to_call():
    with pytest.raises(ax.errors.AttachError, match="convert"):
        ax.depth_weights(Broken(), (torch.randn(2, 4, 8),))
