"""Residual and block AttnRes trained at once from the same weights on the same batches, a process each."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.demo.text import Text, standard_library
from attnres_fx.demo.training import Point, Recipe, train


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained.

    Args:
        model: Sizes of the model.
        batch: Windows of a batch.
        steps: Of both models.
        more_steps: By how many more the residual model is trained a second time, from the start.
        lr: The highest learning rate of both.
        seed: Of weights and batches.
    """

    model: GPTConfig
    batch: int
    steps: int
    more_steps: int
    lr: float
    seed: int = 0

    def text(self) -> Text:
        """Batches to train and validate with."""
        return standard_library(self.batch, self.model.context)

    def fresh_model(self) -> SmallGPT:
        """The residual model that both begin from."""
        torch.manual_seed(self.seed)
        return SmallGPT(self.model)

    def recipe(self, steps: int) -> Recipe:
        """How a training of so many steps goes; both models have points at the same steps."""
        return Recipe(steps=steps, lr=self.lr, seed=self.seed, every=max(1, self.steps // 10))


@dataclass
class Curves:
    """Losses as they come in, and a table of them that grows a row as soon as both models have one.

    Args:
        residual: Curves of the residual model by the steps of the training.
        block: That of the block model.
    """

    residual: dict[int, dict[int, Point]] = field(default_factory=dict)
    block: dict[int, Point] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)

    def show(self, steps: int) -> None:
        """Print the rows that are new.

        Args:
            steps: Of the residual training that is held against the block model's.
        """
        residual = self.residual.get(steps, {})
        for step in sorted((residual.keys() & self.block.keys()) - self.shown):
            if not self.shown:
                print(f"\n{'step':>6}{'residual':>11}{'block':>9}{'gain':>9}")
            self.shown.add(step)
            left, right = residual[step].validation, self.block[step].validation
            print(f"{step:6}{left:11.4f}{right:9.4f}{left - right:+9.4f}", flush=True)


class Beside:
    """The residual trainings in the other process.

    Args:
        connection: What they report through.
        curves: What reports are added to.
    """

    def __init__(self, connection: Connection, curves: Curves) -> None:
        self.connection = connection
        self.curves = curves
        self.weights: dict[int, Path] = {}

    def take(self, *, until: int | None = None) -> None:
        """Take the reports that are there.

        Args:
            until: Wait for the training of so many steps to end.

        Raises:
            RuntimeError: The other process ended early.
        """
        while self.connection.poll() or (until is not None and until not in self.weights):
            try:
                steps, report = self.connection.recv()
            except EOFError:
                if until is None or until in self.weights:
                    return
                raise RuntimeError(
                    "the process that trains the residual model ended early; it says why above"
                ) from None
            if isinstance(report, Point):
                self.curves.residual.setdefault(steps, {})[report.step] = report
            else:
                self.weights[steps] = report


@contextmanager
def residual_beside(plan: Plan, curves: Curves, folder: Path) -> Iterator[Beside]:
    """Train the residual model in a process of its own, a thread there and a thread here.

    Args:
        plan: What is trained: first for `steps`, then again from the start for `more_steps` more.
        curves: Where its losses go.
        folder: Where its weights go.

    Yields:
        What to ask for its reports.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_train_residual, args=(plan, folder, there), daemon=True)
    process.start()
    there.close()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield Beside(here, curves)
    finally:
        torch.set_num_threads(threads)
        process.terminate()
        process.join()
        here.close()


def _train_residual(plan: Plan, folder: Path, connection: Connection) -> None:
    torch.set_num_threads(1)
    text = plan.text()
    for steps in dict.fromkeys((plan.steps, plan.steps + plan.more_steps)):
        model = plan.fresh_model()
        train(model, text, plan.recipe(steps), seen=partial(_report, connection, steps))
        path = folder / f"residual-{steps}.pt"
        torch.save(model.state_dict(), path)
        _report(connection, steps, path)


def _report(connection: Connection, steps: int, report: Point | Path) -> None:
    connection.send((steps, report))


def train_block(plan: Plan, model: nn.Module, text: Text, beside: Beside) -> None:
    """Train the block model here, and show both losses as they fall.

    Args:
        plan: What is trained.
        model: A conversion of the fresh model, trained in place.
        text: The plan's.
        beside: The other process.
    """
    curves = beside.curves

    def seen(point: Point) -> None:
        curves.block[point.step] = point
        beside.take()
        curves.show(plan.steps)

    train(model, text, plan.recipe(plan.steps), seen=seen)
    beside.take(until=plan.steps)
    curves.show(plan.steps)
