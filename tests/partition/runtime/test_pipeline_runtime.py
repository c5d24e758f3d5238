"""Pipelines in real processes over gloo against one process, and their parts without any.

What runs in processes is in pipeline_workers.py: a world of four and a world of two run all of their cases once, and
the tests here read what they found.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from attnres_fx import AttnResError
from attnres_fx.errors import PipelineError
from attnres_fx.partition import runtime
from attnres_fx.partition.checkpoint import load_checkpoint, save_checkpoint
from attnres_fx.partition.runtime.microbatches import MeanLoss, join_outputs, split_batch
from attnres_fx.partition.runtime.source_cache import SourceCache
from attnres_fx.partition.runtime.step_log import StepLog
from tests.support.paths import ROOT
from tests.support.pipeline_workers import CASES

RANKS = {"four": 4, "two": 2}  # in this order: two read the checkpoints of four
EXACT = 1e-11  # float64 against float64
ROUNDED = 1e-6  # losses and norms are given as float32


def run_world(suite, folder):
    command = [sys.executable, "-m", "tests.support.pipeline_workers", suite]
    ranks = RANKS[suite]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{suite}.{rank}.err").open("w"),
        )
        for rank in range(ranks)
    ]
    try:
        for worker in workers:
            worker.wait(timeout=300)
    finally:
        for worker in workers:
            worker.kill()


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """What every case found, rank by rank. Under xdist one worker runs the worlds and the others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pipeline"
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        for _ in range(6000):
            if done.exists():
                break
            time.sleep(0.1)
    else:
        try:
            for suite in RANKS:
                run_world(suite, folder)
        finally:
            done.touch()
    found = {}
    for suite, ranks in RANKS.items():
        for rank in range(ranks):
            lines = (folder / f"{suite}.{rank}.jsonl").read_text().splitlines()
            for name, result, _ in map(json.loads, lines):
                found.setdefault((suite, name), []).append(result)
    return found


def cases(function):
    names = [(s, n) for s, cases in CASES.items() for n in cases if n.split()[0] == function]
    assert names
    return pytest.mark.parametrize("case", names, ids=[" ".join(n) for n in names])


def results(worlds, case):
    found = worlds[case]
    for result in found:
        assert "exception" not in result, result["exception"]
    return found


def assert_equal_to_one_process(result):
    assert result["loss"] <= ROUNDED
    assert result["gradients"] <= EXACT
    assert result["held"] == 0


@cases("equals_one_process")
def test_loss_and_every_gradient_equal_one_process_and_bytes_the_routes(worlds, case):
    found = results(worlds, case)
    for result in found:
        assert_equal_to_one_process(result)
        assert result["bytes"] and result["total"] > 0
        assert result.get("order", True)


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "InterleavedZeroBubble"])
@pytest.mark.parametrize("suite", RANKS)
def test_the_cache_saves_bytes_where_a_rank_has_two_stages(worlds, suite, schedule):
    names = [(suite, f"equals_one_process {schedule} {v} {c}") for v in (1, 2) for c in (True, False)]
    one, one_without, two, two_without = (sum(r["total"] for r in results(worlds, n)) for n in names)
    assert one == one_without
    assert two < two_without


def test_actions_are_logged_in_the_order_they_ran(worlds):
    def actions(schedule):
        return [" ".join(r["actions"]) for r in results(worlds, ("two", f"equals_one_process {schedule} 1 True"))]

    assert actions("GPipe") == ["0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3", "1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3"]
    assert actions("1F1B") == ["0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3", "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3"]
    assert {a[1] for a in actions("InterleavedZeroBubble")[1].split()} == {"F", "I", "W"}


@cases("compiled_stages")
def test_compiled_stages_compute_the_same(worlds, case):
    for result in results(worlds, case):
        assert_equal_to_one_process(result)


def test_one_rank_runs_many_stages_with_and_without_the_cache(worlds):
    for result in results(worlds, ("two", "one_rank_alone")):
        assert_equal_to_one_process(result)


@cases("the_same_to_the_bit")
def test_a_step_gives_the_same_bits_every_time(worlds, case):
    assert all(r["equal"] for r in results(worlds, case))


def test_batches_may_change_their_size(worlds):
    for result in results(worlds, ("two", "changing_sizes")):
        assert result["worst"] <= ROUNDED
        assert result["sizes"] == 3


def test_the_mean_is_over_tokens_that_count_in_the_whole_batch(worlds):
    for result in results(worlds, ("two", "ignored_tokens")):
        assert_equal_to_one_process(result["1F1B"])
        assert_equal_to_one_process(result["InterleavedZeroBubble"])
        assert result["other index"] <= ROUNDED
        assert result["all ignored"] == 0 and result["zeros"]


@cases("five_training_steps")
def test_five_clipped_training_steps_follow_one_process(worlds, case):
    for result in results(worlds, case):
        assert result["loss"] <= ROUNDED and result["norm"] <= ROUNDED
        assert result["weights"] <= EXACT
        assert result["clipped"]


@cases("tied_weights_and_accumulated_steps")
def test_tied_weights_stay_in_step_over_accumulated_steps(worlds, case):
    for result in results(worlds, case):
        assert max(result["worst"], result["evaluated"], result["infinite norm"]) <= ROUNDED


@cases("evaluation_between_steps")
def test_evaluation_changes_nothing_for_the_steps_around_it(worlds, case):
    for result in results(worlds, case):
        assert result["steps"] <= EXACT and result["loss"] <= ROUNDED
        assert result["outputs"] and result["training"] and result["held"] == 0


@cases("failure_in_the_middle_of_a_step")
def test_a_failing_stage_is_told_on_every_rank_and_leaves_nothing_behind(worlds, case):
    found = results(worlds, case)
    assert found[0]["errors"] == found[1]["errors"]
    first, second, loss, backward = found[0]["errors"]
    virtual = int(case[1].split()[-1])
    assert f"rank 0 in {2 * virtual - 2}F2: ZeroDivisionError: on purpose" in first
    assert f"rank 1 in {2 * virtual - 1}F2: ZeroDivisionError: on purpose" in second
    assert "rank 1 in the loss of microbatch 0: AttributeError" in loss
    assert f"rank 1 in {2 * virtual - 1}{'W' if 'Bubble' in case[1] else 'B'}0: AttributeError" in backward
    for result in found:
        assert result["held"] == 0
        assert_equal_to_one_process(result["after"])


SAID = {
    "world": ["num_stages=4", "has 2", "torchrun"],
    "other plan": ["virtual_stages=1", "build the stages from this plan"],
    "virtual": ["'1F1B'", "virtual_stages=2", "Interleaved1F1B"],
    "schedule": ["ZBVZeroBubble", "GPipe"],
    "microbatches": ["1 microbatches", "num_microbatches"],
    "rounds": ["5 microbatches", "num_microbatches"],
    "ddp": ["silently not be reduced", "fsdp2"],
    "compile": ["silently wrong", "another schedule"],
    "backend": ["silently wrong"],
    "compiled": ["silently wrong"],
    "no mesh": ['"dp"', "init_device_mesh"],
    "mode": ["'zero3'", "fsdp2"],
    "mesh": ['"pp"'],
    "missing": ["were not built"],
    "meta": ["meta", "to_empty"],
    "no backend": ["nonsense", "inductor"],
    "no gradients": ["no_grad", "evaluate()"],
    "rows": ["6 rows", "num_microbatches=4"],
    "target": ["(4, 5)", "8 rows"],
}


@pytest.mark.parametrize("what", SAID)
def test_bad_input_is_refused_with_what_to_change(worlds, what):
    for result in results(worlds, ("two", "bad_input")):
        assert result[what].startswith("PipelineError: ")
        for words in SAID[what]:
            assert words in result[what]


def test_a_refused_batch_leaves_the_pipeline_as_it_was(worlds):
    for result in results(worlds, ("two", "bad_input")):
        assert_equal_to_one_process(result["after"])


def test_a_value_that_is_not_as_planned_is_named(worlds):
    for result in results(worlds, ("two", "values_of_another_dtype")):
        assert "value 'v0'" in result["error"] and "autocast" in result["error"]


@pytest.mark.parametrize(("schedule", "most"), [("GPipe", (8, 8)), ("1F1B", (2, 1))])
def test_the_cache_holds_the_microbatches_in_flight_and_no_more(worlds, schedule, most):
    found = results(worlds, ("two", f"what_the_cache_holds {schedule} 1"))
    assert tuple(r["step"] for r in found) == most
    assert [r["eval"] for r in found] == [1, 1]


def test_frozen_parameters_get_no_gradient_and_the_others_theirs(worlds):
    for result in results(worlds, ("two", "frozen_parameters")):
        assert max(result.values()) <= ROUNDED


@cases("sharded_data_parallel")
def test_fsdp2_on_a_mesh_computes_the_same(worlds, case):
    assert_data_parallel(results(worlds, case))


@cases("replicated_data_parallel")
def test_ddp_on_a_mesh_computes_the_same(worlds, case):
    assert_data_parallel(results(worlds, case))


@cases("data_parallel_around_one_rank")
def test_data_parallelism_keeps_tied_weights_of_one_rank_in_step(worlds, case):
    assert_data_parallel(results(worlds, case))


@cases("failure_of_one_replica")
def test_a_failure_under_data_parallelism_is_told_at_once_and_ends_the_pipeline(worlds, case):
    found = results(worlds, case)
    assert len({r["again"] for r in found[:2]}) == 1
    for rank, result in enumerate(found):
        told = "rank 1 in 1F0: ZeroDivisionError: on purpose" if rank < 2 else "another replica"
        assert told in result["error"] and "restart from the last checkpoint" in result["error"]
        assert result["again"].startswith("PipelineError: this pipeline cannot go on")
        assert result["seconds"] < 20 and result["held"] == 0


def test_compiled_stages_can_be_sharded(worlds):
    assert_data_parallel(results(worlds, ("four", "compiled_and_sharded")))


def assert_data_parallel(found):
    for result in found:
        assert_equal_to_one_process(result)
        assert max(result["norm"], result["evaluated"]) <= ROUNDED
        assert result["sharded"]


def test_checkpoints_move_between_any_number_of_stages_and_none(worlds):
    for result in results(worlds, ("four", "checkpoint_of_four_stages")):
        assert result["losses"] == pytest.approx(result["wanted"], rel=ROUNDED)
    for result in results(worlds, ("two", "checkpoint_into_two_stages")):
        assert result["two"] == pytest.approx(result["wanted"][5:6], rel=ROUNDED)
        assert result["one"] == pytest.approx(result["wanted"][6:7], rel=ROUNDED)
        assert result["back"] == pytest.approx(result["wanted"][5:6], rel=ROUNDED)


def test_a_checkpoint_that_is_missing_or_of_another_model_is_refused(worlds):
    for result in results(worlds, ("two", "checkpoint_into_two_stages")):
        assert "no whole checkpoint" in result["missing"]
        assert "has no 'layers." in result["other"]
        assert "pipeline.parameters()" in result["stranger"]


def test_a_stuck_process_ends_the_step_on_all_within_the_timeout(worlds):
    for rank, result in enumerate(results(worlds, ("four", "stuck_worker"))):
        assert f"rank {rank} (virtual stages {rank}) lost a neighbour after" in result["error"]
        assert result["again"].startswith("PipelineError: this pipeline cannot go on")
        assert result["seconds"] < 10 and result["held"] == 0
        assert f"from stage {rank - 1 if rank else 1} on rank" in result["error"] or rank == 1


def test_a_killed_process_ends_the_step_on_the_others(worlds):
    found = results(worlds, ("four", "killed_worker"))
    assert len(found) == 3
    for result in found:
        assert result["error"].startswith("PipelineError: rank ")
        assert "restart the job from the last checkpoint" in result["error"]
        assert result["seconds"] < 20 and result["held"] == 0


# Without processes


def test_a_cache_hands_out_values_cut_off_from_their_graph():
    cache = SourceCache()
    made = torch.ones(2, requires_grad=True) * 2
    cache.put(0, "a", made)
    assert not cache.value(0, "a").requires_grad
    assert cache.value(0, "a").data_ptr() == made.data_ptr()


def test_a_cache_sums_gradients_in_order_and_changes_none_of_them():
    cache = SourceCache()
    cache.put(3, "a", torch.zeros(1))
    assert cache.grad(3, "a") is None
    parts = [torch.tensor([x]) for x in (1e8, 1.0, -1e8)]
    for part in parts:
        cache.accumulate_grad(3, "a", part)
    assert cache.grad(3, "a") == (parts[0] + parts[1]) + parts[2]
    assert parts[0] == 1e8


def test_a_cache_keeps_microbatches_apart_and_counts_its_bytes():
    cache = SourceCache()
    for microbatch in (0, 1):
        for name in ("a", "b"):
            cache.put(microbatch, name, torch.full((4,), float(microbatch)))
    cache.accumulate_grad(1, "b", torch.ones(4))
    assert cache.bytes == cache.peak_bytes == 64 and len(cache) == 5
    cache.drop(0, ["a", "unknown"])
    assert cache.bytes == 48 and cache.value(1, "a")[0] == 1
    cache.finish(1)
    assert cache.bytes == 16 and len(cache) == 1
    cache.clear()
    assert (cache.bytes, len(cache), cache.peak_bytes) == (0, 0, 64)


def test_a_cache_refuses_what_would_be_a_wrong_route():
    cache = SourceCache()
    cache.put(0, "a", torch.zeros(2))
    with pytest.raises(PipelineError, match="'a' of microbatch 0 has come to this rank twice"):
        cache.put(0, "a", torch.zeros(2))
    with pytest.raises(PipelineError, match="'b' of microbatch 0 is not on this rank"):
        cache.value(0, "b")
    with pytest.raises(PipelineError, match=r"gradient of value 'a' has shape \(3,\)"):
        cache.accumulate_grad(0, "a", torch.zeros(3))
    cache.finish(0)
    with pytest.raises(PipelineError, match="its microbatch is done"):
        cache.accumulate_grad(0, "a", torch.zeros(2))


def split(*args, target=None, number=2, **kwargs):
    return split_batch(args, kwargs, target, number, ignore_index=-100, device=torch.device("cpu"))


def test_a_batch_is_split_where_it_is_a_batch_and_shared_elsewhere():
    ids, table, scale = torch.arange(8).view(4, 2), torch.ones(1, 3), torch.tensor(2.0)
    parts = split(ids, "text", mask={"x": ids[:, :1]}, table=table, scale=scale, target=ids)
    (first, _), (second, keywords) = parts.arguments
    assert torch.equal(torch.cat([first[0], second[0]]), ids) and second[1] == "text"
    assert torch.equal(keywords["mask"]["x"], ids[2:, :1])
    assert keywords["table"] is table and keywords["scale"] is scale
    assert torch.equal(parts.targets[1], ids[2:])
    assert parts.counts.tolist() == [4, 4]


def test_microbatches_count_the_target_elements_that_are_not_ignored():
    target = torch.tensor([[1, -100], [-100, -100], [2, 3], [4, 5]])
    assert split(target, target=target).counts.tolist() == [1, 4]
    assert split(target, target=torch.ones(4, 3)).counts.tolist() == [6, 6]
    assert split(target).counts.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("rows", "number", "said"), [(6, 4, "6 rows does not divide"), (1, 2, "1 rows does not divide")]
)
def test_a_batch_that_does_not_divide_is_refused(rows, number, said):
    with pytest.raises(PipelineError, match=said):
        split(torch.zeros(rows, 2), number=number)


def test_weighed_losses_add_up_to_the_mean_of_the_whole_batch():
    torch.manual_seed(0)
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 2, 3, -100, -100, -100, -100])
    wanted = nn.functional.cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(wanted, logits)
    parts = split(logits.detach(), target=target, number=4)
    loss = MeanLoss(nn.functional.cross_entropy, lambda outputs: outputs[0], replicas=2)
    loss.start(parts, parts.counts.sum())
    for index, rows in enumerate(logits.split(2)):
        loss([rows], index).backward()
    torch.testing.assert_close(loss.value, wanted.detach())
    torch.testing.assert_close(logits.grad, 2 * gradient)


def test_outputs_of_microbatches_are_joined_again():
    rows, scalar, text = join_outputs([[torch.zeros(2, 1), torch.tensor(1.0), "a"] for _ in range(3)])
    assert rows.shape == (6, 1) and scalar.tolist() == [1, 1, 1] and text == "a"


def test_work_after_a_failure_is_left_out_and_the_first_one_told():
    log = StepLog()
    assert log.attempt("0F0", lambda: 3) == 3
    assert log.attempt("0F1", lambda: 1 // 0) is None
    assert log.attempt("0F2", lambda: pytest.fail("was run")) is None
    assert log.failure_text == "0F1: ZeroDivisionError: integer division or modulo by zero"


@pytest.mark.parametrize("version", ["2.12.1+cpu", "2.11.0a0+git1", "1.13"])
def test_an_older_torch_is_refused_by_name(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(PipelineError, match=r"needs torch 2\.13 or newer and found " + version.replace("+", r"\+")):
        runtime.build_pipeline(None, None, loss_fn=None)


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.14.0.dev20261101", "3.0"])
def test_a_newer_torch_is_taken(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    runtime.check_torch()


def test_without_a_process_group_nothing_is_built():
    with pytest.raises(AttnResError, match="torchrun"):
        runtime.build_pipeline(None, None, loss_fn=None, compile=False)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_unsplit_checkpoint_keeps_options_and_state(tmp_path):
    def made(rate):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": rate / 10}]
        return model, torch.optim.Adam(groups, lr=rate)

    model, optimizer = made(0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "c", model, optimizer)
    other, fresh = made(9.0)
    load_checkpoint(tmp_path / "c", other, fresh)
    assert [g["lr"] for g in fresh.param_groups] == [0.1, 0.01]
    assert fresh.state[other.bias]["step"] == 1
    torch.testing.assert_close(fresh.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    torch.testing.assert_close(other.weight, model.weight)
