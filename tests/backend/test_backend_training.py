"""Training through the backend: losses as by convert, dropout in both modes, several processes."""

import copy

import pytest
import torch

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from tests.support.process_groups import found_by_processes

CONFIG = ax.AttnResConfig(variant="block", num_blocks=2)


def small_gpt(layers=2, dropout=0.0):
    torch.manual_seed(0)
    return SmallGPT(GPTConfig(layers=layers, width=32, context=32, dropout=dropout))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(97, 105, (4, 17), generator=generator) for _ in range(count)]


def losses_of(model, count=20):
    optimizer = torch.optim.AdamW(ax.parameter_groups(model), lr=1e-2)
    losses = []
    for ids in batches(count):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("inner", "layers"), [("eager", 2), ("inductor", 1)])
@pytest.mark.slow
def test_twenty_steps_follow_the_losses_of_the_converted_model(inner, layers):
    model = small_gpt(layers)
    config = ax.AttnResConfig(variant="block", num_blocks=layers)  # of two sublayers each
    ids = (batches(1)[0][:, :-1],)
    converted = ax.convert(copy.deepcopy(model), ids, config=config, check=False)
    ax.compile(model, ids, config=config, inner=inner, dynamic=inner == "eager")
    wanted, found = losses_of(converted), losses_of(model)
    assert max(abs(a - b) / b for a, b in zip(found, wanted, strict=True)) <= 1e-4
    assert wanted[-1] < wanted[0] - 0.3
    assert any(read.query.abs().max() > 1e-3 for read in model.attnres.reads)


@pytest.mark.slow
def test_dropout_is_on_in_train_and_off_in_eval():
    model = small_gpt(dropout=0.5)
    ids = batches(1)[0][:, :-1]
    plain = copy.deepcopy(model).eval()(ids)
    ax.compile(model, (ids,), config=CONFIG, inner="eager")
    model.eval()
    torch.testing.assert_close(model(ids), plain)
    torch.testing.assert_close(model(ids), model(ids), rtol=0, atol=0)
    model.train()
    assert (model(ids) - model(ids)).abs().max() > 1e-3
    assert [g.mode for g in ax.explain(model).graphs[-2:]] == ["eval", "train"]


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """How far the losses of two processes are from those of one, a kind of data parallelism, and what one learned."""
    return found_by_processes("distributed_training", tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.slow
def test_two_processes_train_as_one_does(mode, differences):
    assert differences["learned"] > 0.1
    assert differences[mode] <= 1e-4
