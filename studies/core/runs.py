"""One training run: what it is, doing it, and what is kept of it."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnres_fx.demo.small_gpt import SmallGPT, next_byte_loss
from attnres_fx.demo.text import Text, standard_library
from attnres_fx.demo.training import Objective, Point, Recipe, own_loss, train
from studies.core.methods import with_method
from studies.core.sizes import Size

#: From a model and the text to plain data that is kept with the run.
Look = Callable[[nn.Module, Text], Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is; its key says what differs from the defaults.

    Args:
        method: A name in the table of methods.
        seed: Of weights and batches.
        lr: The highest learning rate.
        steps: Batches.
        query_rate: That of the queries over that of the rest.
        objective: What is trained: "loss", or "loss and original" for half of that and half of the divergence from
            what the model that it starts from predicts.
        start: The steps of residual training that its weights have behind them, at the size's own rate.
        layers: Of the model, where not the size's.
        width: Of the model, where not the size's.
        hidden: Of its MLP, where not the size's.
    """

    method: str
    seed: int
    lr: float
    steps: int
    query_rate: float = 1.0
    objective: str = "loss"
    start: int = 0
    layers: int | None = None
    width: int | None = None
    hidden: int | None = None

    @property
    def key(self) -> str:
        """A name of the run, unlike that of any other."""
        more = [f.name for f in fields(self) if f.default is not MISSING and getattr(self, f.name) != f.default]
        head = f"{self.method}, seed {self.seed}, lr {self.lr:g}, steps {self.steps}"
        return ", ".join([head, *(f"{name} {getattr(self, name)}" for name in more)])


def do_run(run: Run, size: Size, *, at_points: Look | None = None, at_end: Look | None = None) -> dict[str, Any]:
    """Train, and say what came of it.

    Args:
        run: What to train.
        size: Sizes that it leaves open.
        at_points: What to look at as each point of the curve is reached.
        at_end: What to look at in the trained model.

    Returns:
        `run`, `curve` (rows of step, training loss and validation loss), `loss` (the last validation loss), `seconds`,
        `cpu_seconds`, `parameters`, and `points` and `end`: what was looked at.
    """
    text = standard_library(size.batch, size.model.context, size.validation_batches)
    model, objective = _made(run, size, text)
    recipe = Recipe(
        steps=run.steps,
        lr=run.lr,
        query_lr=None if run.query_rate == 1.0 else run.lr * run.query_rate,
        seed=run.seed + (1000 if run.start else 0),  # what is trained further sees other batches
        every=size.every,
    )
    looked: list[Any] = []

    def seen(point: Point) -> None:
        print(f"  {run.key}: step {point.step}, validation loss {point.validation:.4f}", flush=True)
        if at_points is not None:
            looked.append({"step": point.step, "seen": at_points(model, text)})

    wall, cpu = time.perf_counter(), time.process_time()
    curve = train(model, text, recipe, seen=seen, objective=objective)
    record: dict[str, Any] = {
        "run": asdict(run),
        "loss": curve[-1].validation,
        "curve": [[p.step, round(p.train, 5), round(p.validation, 5)] for p in curve],
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if at_points is not None:
        record["points"] = looked
    if at_end is not None:
        record["end"] = at_end(model.eval(), text)
    return record


def _made(run: Run, size: Size, text: Text) -> tuple[nn.Module, Objective]:
    """The model of a run before its first step, and what it is trained for."""
    changes = {n: getattr(run, n) for n in ("layers", "width", "hidden") if getattr(run, n) is not None}
    torch.manual_seed(run.seed)
    model = SmallGPT(replace(size.model, **changes)).to(size.device)
    if run.start:
        model.load_state_dict(_trained(model, run, size, text))
    if run.objective == "loss":
        return with_method(model, run.method, text), own_loss
    original = SmallGPT(replace(size.model, **changes)).to(size.device).eval()
    original.load_state_dict(model.state_dict())
    return with_method(model, run.method, text), _beside(original)


def _trained(model: SmallGPT, run: Run, size: Size, text: Text) -> dict[str, Any]:
    """The weights after `run.start` steps of residual training; kept in a file that is not part of the results."""
    recipe = Recipe(steps=run.start, lr=size.rate, seed=run.seed, every=run.start)
    where = f"{recipe}, {model.config}, batch {size.batch}"
    path = Path("build") / "studies" / f"{hashlib.sha256(where.encode()).hexdigest()[:16]}.pt"
    if not path.is_file():
        print(f"  first {run.start} steps of the residual model", flush=True)
        train(model, text, recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    weights: dict[str, Any] = torch.load(path, weights_only=True)
    return weights


def _beside(original: nn.Module) -> Objective:
    """Half the loss, and half the divergence of a model's predictions from the original's, in nats a byte."""

    def objective(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
        logits = model(ids)
        with torch.no_grad():
            wanted = original(ids).log_softmax(-1).flatten(0, 1)
        found = logits.log_softmax(-1).flatten(0, 1)
        divergence = nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
        return 0.5 * next_byte_loss(logits, targets) + 0.5 * divergence

    return objective
