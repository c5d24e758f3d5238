"""Actions are in the order in which PyTorch lists and executes them."""

from types import SimpleNamespace

import pytest
import torch

from attnres_fx.errors import PlanError
from attnres_fx.partition.simulate import action_order as orders
from attnres_fx.partition.simulate.action_order import action_orders
from tests.support.schedules import MULTI, SINGLE, even_step


def torch_listing(schedule, ranks, rounds, microbatches):
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    listed = visualizer.get_schedule_ops(schedule, ranks, microbatches, rounds)
    return [tuple(str(a) for a in rank if a is not None and "REDUCE" not in str(a)) for rank in listed]


@pytest.mark.parametrize(("schedule", "rounds"), [("GPipe", 1), *((s, v) for s in MULTI for v in (2, 3))])
def test_orders_are_those_that_torch_lists(schedule, rounds):
    for ranks, microbatches in ((2, 4), (3, 3), (4, 6), (4, 10)):
        timeline = even_step(schedule, ranks, rounds, microbatches)
        assert [timeline.order(r) for r in range(ranks)] == torch_listing(schedule, ranks, rounds, microbatches)


class LoggingStage:
    """Stands where a `PipelineStage` does in torch's loops, and logs what it is asked to compute."""

    def __init__(self, index, ranks, rounds, log):
        self.stage_index, self.num_stages = index, ranks * rounds
        self.group_rank, self.group_size = index % ranks, ranks
        self.is_first, self.is_last = index == 0, index == ranks * rounds - 1
        self.submod, self.has_backward, self.log = None, True, log

    def forward_one_chunk(self, microbatch, *_, **__):
        self.log.append(f"{self.stage_index}F{microbatch}")

    def backward_one_chunk(self, microbatch, *_, full_backward=True, **__):
        self.log.append(f"{self.stage_index}{'B' if full_backward else 'I'}{microbatch}")

    def backward_weight_one_chunk(self, microbatch, *_, **__):
        self.log.append(f"{self.stage_index}W{microbatch}")

    def __getattr__(self, name):
        if name.startswith("get_") and name.endswith("_ops"):
            return lambda microbatch: []
        return lambda *args, **kwargs: None


def executed(schedule, rank, ranks, rounds, microbatches):
    """What torch's loop of this rank really calls, with no process and nothing to send."""
    module = pytest.importorskip("torch.distributed.pipelining.schedules")
    log = []
    stages = [LoggingStage(rank + ranks * v, ranks, rounds, log) for v in range(rounds)]
    running = module.get_schedule_class(schedule)(stages[0] if schedule in SINGLE else stages, microbatches)
    # Neither shapes nor losses are wanted.
    for name in ("_initialize_stage", "_initialize_stages", "_maybe_compute_loss", "_maybe_get_loss", "_update_losses"):
        setattr(running, name, lambda *args, **kwargs: None)
    with torch.enable_grad():
        running._step_microbatches([()] * microbatches, [{}] * microbatches)
    return tuple(log)


@pytest.mark.parametrize(
    ("schedule", "rounds"), [*((s, 1) for s in (*SINGLE, *MULTI)), *((s, v) for s in MULTI for v in (2, 3))]
)
def test_orders_are_those_that_torchs_loops_execute(schedule, rounds):
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
        pytest.skip("the stand-in for a stage is made for the loops of torch 2.13")
    for ranks, microbatches in ((1, 2), (2, 2), (2, 4), (3, 6), (4, 4), (4, 10)):
        timeline = even_step(schedule, ranks, rounds, microbatches)
        for rank in range(ranks):
            assert timeline.order(rank) == executed(schedule, rank, ranks, rounds, microbatches)


def test_a_torch_without_pipelining_or_with_other_schedules_is_named(monkeypatch):
    import torch.distributed.pipelining.schedules as schedules

    def other(name):
        return lambda stages, count: SimpleNamespace(order={})

    monkeypatch.setattr(schedules, "get_schedule_class", other)
    with pytest.raises(PlanError, match="the versions this is made for are torch"):
        action_orders("GPipe", num_stages=2, num_microbatches=2)
    monkeypatch.delattr(schedules, "get_schedule_class")
    with pytest.raises(PlanError, match=r"it needs torch 2\.11 or later"):
        action_orders("GPipe", num_stages=2, num_microbatches=2)


def test_an_order_in_which_ranks_wait_for_each_other_is_refused(monkeypatch):
    from torch.distributed.pipelining.schedules import _Action

    wrong = {rank: list(map(_Action.from_str, order)) for rank, order in ((0, ["0B0", "0F0"]), (1, ["1F0", "1B0"]))}
    monkeypatch.setattr(orders, "_listed_orders", lambda *_: wrong)
    with pytest.raises(PlanError, match="never gets to 0B0, 1F0"):
        even_step("GPipe", 2, 1, 1)
