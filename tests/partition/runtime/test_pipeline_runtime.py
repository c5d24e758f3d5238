"""Pipelines in real processes over gloo against one process.

What runs in processes is in tests/support/pipeline_cases: a world of four and a world of two run all of their cases
once, and the tests here read what they found.
"""

import pytest

from tests.support.pipeline_workers import CASES, RANKS
from tests.support.pipeline_worlds import results_of_worlds, shared_folder

EXACT = 1e-11  # float64 against float64
ROUNDED = 1e-6  # losses and norms are given as float32


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    base = shared_folder(tmp_path_factory)
    return results_of_worlds("tests.support.pipeline_workers", RANKS, base, "pipeline")


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


DIFFERS = {
    "config": "differ in output (rank 0: sum, rank 1: mean)",
    "plan": "differ in num_microbatches (rank 0: 4, rank 1: 8)",
    "options": "differ in ignore_index (rank 0: -100, rank 1: -1)",
    "rows": "differ in arguments of a microbatch (rank 0: [(",
    "mode": "differ in mode (rank 0: train, rank 1: eval)",
}


def test_ranks_that_were_not_given_the_same_are_told_in_what_before_anything_runs(worlds):
    for result in results(worlds, ("two", "ranks_that_differ")):
        for what, said in DIFFERS.items():
            assert result[what].startswith("PipelineError: the ranks ") and said in result[what], result[what]
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


def test_a_run_goes_on_with_its_step_scheduler_and_random_states(worlds):
    for result in results(worlds, ("four", "run_state_of_four_stages")):
        assert result["step"] == 3 and result["random"] and result["same"]
        went_on = result["losses"]
    for result in results(worlds, ("two", "run_state_into_two_stages")):
        assert result["step"] == 3 and not result["random"]
        assert result["losses"] == pytest.approx(result["wanted"], rel=1e-6)
        assert went_on == pytest.approx(result["wanted"], rel=1e-6)
        assert "no state of 'scaler' (it has scheduler)" in result["refused"]


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
