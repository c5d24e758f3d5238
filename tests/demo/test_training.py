"""The training loop against one written out; the length of a training for a loss against a known law."""

import math
import multiprocessing

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.demo.lengths import steps_for_loss
from attnres_fx.demo.side_by_side import Beside, Curves
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.demo.text import standard_library
from attnres_fx.demo.training import Point, Recipe, train, validation_loss

SIZES = GPTConfig(layers=1, heads=1, width=8, context=8)
RECIPE = Recipe(steps=4, lr=0.1, seed=3, every=2, warmup=0.5, weight_decay=0.2, clip=0.5)


def fresh(seed=0):
    torch.manual_seed(seed)
    return SmallGPT(SIZES)


def test_the_training_loop_is_adamw_with_a_warm_up_and_a_cosine():
    text = standard_library(2, 8, 1)
    model, twin = fresh(), fresh()
    curve = train(model, text, RECIPE)

    optimizer = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.95), weight_decay=0.2)
    generator, losses = torch.Generator().manual_seed(3), []
    for share in (0.5, 1.0, 1.0, 0.5):  # two steps up, then the cosine at 0 and at half of its way
        starts = torch.randint(0, len(text.train) - 9, (2,), generator=generator)
        ids = torch.stack([text.train[s : s + 9] for s in starts]).long()
        loss = nn.functional.cross_entropy(twin(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 0.1 * share
        optimizer.step()
        losses.append(loss.item())

    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert [p.step for p in curve] == [0, 2, 4]
    assert curve[-1].train == pytest.approx(sum(losses[2:]) / 2)
    assert curve[-1].validation == validation_loss(twin, text)
    assert model.training


def test_the_same_seed_draws_the_same_batches_and_another_seed_others():
    text = standard_library(2, 8, 1)
    first, again, other = (text.draw(torch.Generator().manual_seed(s))[0] for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    held = {bytes(ids.flatten().tolist()) for ids, _ in text.validation}
    assert held == {bytes(ids.flatten().tolist()) for ids, _ in standard_library(2, 8, 1).validation}


def test_steps_for_a_loss_follow_a_power_law_inside_and_outside_of_what_was_trained():
    law = {steps: 3.0 * steps**-0.2 for steps in (100, 200, 400)}
    for steps in (50, 100, 150, 300, 1600):
        assert steps_for_loss(law, 3.0 * steps**-0.2) == pytest.approx(steps)
    assert steps_for_loss({100: 2.0, 200: 2.0}, 1.9) == math.inf
    bent = {100: 2.0, 200: 1.0, 400: 0.9}  # each stretch has a law of its own
    assert steps_for_loss(bent, 2**0.5) == pytest.approx(100 * 2**0.5)
    assert steps_for_loss(bent, 0.81) == pytest.approx(800)


def test_a_row_is_shown_once_both_models_have_it(capsys):
    curves = Curves(block={0: Point(0, 5.0, 5.0), 10: Point(10, 3.0, 2.5)})
    curves.residual[20] = {0: Point(0, 5.0, 5.0)}
    curves.show(20)
    curves.residual[20][10] = Point(10, 3.0, 3.0)
    curves.show(20)
    curves.show(20)
    lines = capsys.readouterr().out.split("\n")
    assert [line.split() for line in lines if line] == [
        ["step", "residual", "block", "gain"],
        ["0", "5.0000", "5.0000", "+0.0000"],
        ["10", "3.0000", "2.5000", "+0.5000"],
    ]


def test_a_residual_training_that_ends_early_is_an_error_and_not_a_wait():
    here, there = multiprocessing.Pipe(duplex=False)
    there.send((20, Point(0, 5.0, 5.0)))
    there.close()
    beside = Beside(here, Curves())
    beside.take()
    assert beside.curves.residual[20][0].validation == 5.0
    with pytest.raises(RuntimeError, match="ended early"):
        beside.take(until=20)


def test_queries_have_a_learning_rate_of_their_own_where_there_are_queries():
    model = fresh()
    original = list(model.parameters())
    with pytest.raises(ax.errors.ArgumentError, match=r"query_lr=0\.5 .* this SmallGPT has none"):
        ax.parameter_groups(model, query_lr=0.5)
    assert ax.parameter_groups(model)[1]["params"] == []
    model.attnres = nn.ParameterList([torch.zeros(8), torch.ones(8)])
    own, added = ax.parameter_groups(model, lr=0.1, query_lr=0.5, weight_decay=0.3)
    assert (own["lr"], own["weight_decay"], added["lr"], added["weight_decay"]) == (0.1, 0.3, 0.5, 0.0)
    assert [id(p) for p in own["params"]] == [id(p) for p in original]
    assert [id(p) for p in added["params"]] == [id(p) for p in model.attnres]
    assert ax.parameter_groups(model, lr=0.1)[1]["lr"] == 0.1
    assert not {"lr", "weight_decay"} & ax.parameter_groups(model)[0].keys()
