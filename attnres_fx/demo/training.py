"""The one training loop of the demo and the studies: AdamW, a short warm-up, then a cosine down to zero."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnres_fx.demo.small_gpt import next_byte_loss
from attnres_fx.demo.text import Text
from attnres_fx.optimizer_groups import parameter_groups

#: From model, ids and targets to the loss that is trained.
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Args:
        steps: Batches.
        lr: The highest learning rate.
        query_lr: That of queries, key gains and gates; by default `lr`.
        seed: Of the batches: the same seed trains on the same batches in the same order.
        every: Steps from one point of the curve to the next.
        warmup: Share of the steps over which the learning rate rises.
        weight_decay: Of all parameters but queries, key gains and gates.
        clip: The largest norm of the gradient.
    """

    steps: int
    lr: float
    query_lr: float | None = None
    seed: int = 0
    every: int = 100
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Point:
    """A point of a loss curve, in nats a byte.

    Args:
        step: Batches so far.
        train: Mean loss of the batches since the last point.
        validation: Loss of the held-out batches.
    """

    step: int
    train: float
    validation: float


def validation_loss(model: nn.Module, text: Text) -> float:
    """Mean loss of the validation batches, in eval mode.

    Args:
        model: From ids to logits; it is left in the mode that it was in.
        text: Where the batches are.

    Returns:
        Nats a byte.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        pairs = ((ids.to(device), targets.to(device)) for ids, targets in text.validation)
        losses = [next_byte_loss(model(ids), targets).double() for ids, targets in pairs]
    model.train(was_training)
    return float(torch.stack(losses).mean())


def own_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """The loss of predicting the next byte."""
    return next_byte_loss(model(ids), targets)


def train(
    model: nn.Module,
    text: Text,
    recipe: Recipe,
    *,
    seen: Callable[[Point], None] = lambda _: None,
    objective: Objective = own_loss,
) -> list[Point]:
    """Train a model in place.

    Args:
        model: An original or a converted one, from ids [batch, length] to logits.
        text: Where batches come from.
        recipe: How.
        seen: Called with each point as it is reached, the model in train mode.
        objective: What is trained; curves show it as `train`, and the loss of the next byte as `validation`.

    Returns:
        The curve, from step 0 (whose `train` is the validation loss) to the last.
    """
    options: dict[str, Any] = {} if recipe.query_lr is None else {"query_lr": recipe.query_lr}
    groups = parameter_groups(model, lr=recipe.lr, weight_decay=recipe.weight_decay, **options)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate(step, recipe))
    generator = torch.Generator().manual_seed(recipe.seed)
    device = next(model.parameters()).device
    model.train()
    start = validation_loss(model, text)
    curve = [Point(0, start, start)]
    seen(curve[0])
    since: list[float] = []
    for step in range(1, recipe.steps + 1):
        ids, targets = (t.to(device) for t in text.draw(generator))
        loss = objective(model, ids, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        since.append(float(loss.detach()))
        if step % recipe.every == 0 or step == recipe.steps:
            curve.append(Point(step, sum(since) / len(since), validation_loss(model, text)))
            since = []
            seen(curve[-1])
    return curve


def share_of_rate(step: int, recipe: Recipe) -> float:
    """The learning rate of a step over the highest one.

    Args:
        step: Batches so far.
        recipe: How long it rises and how long the whole training is.

    Returns:
        From 0 up to 1 and down to 0.
    """
    rise = max(1, round(recipe.warmup * recipe.steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, recipe.steps - rise)))
