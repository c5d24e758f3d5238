"""The GPU benchmarks run on a CPU at tiny sizes, write what they promise, and do not time what is wrong."""

import contextlib
import json
import sys
from dataclasses import dataclass

import pytest
import torch

from tests.support.paths import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import _measure
import _oracle
import _peers
import kernels
import pass_time
import training_step
import tune
import two_phase

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick_collections")
ENVIRONMENT = {"benchmark", "date", "device", "device_name", "torch", "python", "cuda", "versions", "commit"}


@pytest.mark.slow
def test_kernels_times_what_is_right_and_names_what_is_not_here(tmp_path, capsys):
    output = tmp_path / "kernels.json"
    arguments = ["--device", "cpu", "--smoke", "--skip", "definition, torch.compile", "--output", str(output)]
    assert kernels.main(arguments) == output
    content = json.loads(output.read_text())
    assert content.keys() >= ENVIRONMENT | {"repeats", "not_here", "cases"}
    assert all(reason.startswith("not here: ") for reason in content["not_here"].values())
    assert len(content["not_here"]) == 6
    for case, shape in zip(content["cases"], kernels.SMOKE, strict=True):
        assert (case["sources"], case["tokens"], case["width"]) == shape
        assert case["copy_bytes_per_second"] > 0
        assert [r["implementation"] for r in case["implementations"]] == ["ours", "definition, eager"]
        for report in case["implementations"]:
            assert report["status"] == "timed"
            for direction in kernels.DIRECTIONS:
                timing = report[direction]
                assert timing["bytes"] == _measure.counted_bytes(direction, *shape, 2)
                assert timing["bytes_per_second"] == pytest.approx(1e6 * timing["bytes"] / timing["microseconds"])
    printed = capsys.readouterr().out
    assert "fla-core, Gluon: not here" in printed
    assert "forward of copy" in printed


def test_bytes_of_the_usual_case_are_those_counted_by_hand():
    rows, width = 8192, 7168
    assert _measure.forward_bytes(9, rows, width, 2) == 10 * rows * width * 2
    assert _measure.backward_bytes(9, rows, width, 2) == 19 * rows * width * 2
    assert _measure.counted_bytes("both", 9, rows, width, 2) == 29 * rows * width * 2 + 2 * 2 * 9 * rows * 4


def definition_but(change):
    def call(sources, query, key_weight, eps):
        return change(_peers.stacked_definition(sources, query, key_weight, eps))

    return call


def raises(out):
    raise ValueError("no such kernel\nand a second line")


class ScalesGradient(torch.autograd.Function):
    """The value unchanged, and a gradient that is 5% too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.05


@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        (lambda out: out * 1.05, "wrong", "output off by"),
        (ScalesGradient.apply, "wrong", "source gradient off by"),
        (lambda out: out * float("nan"), "wrong", "output off by inf"),
        (raises, "failed", "ValueError: no such kernel"),
        (lambda out: out, "timed", None),
    ],
)
def test_an_implementation_that_is_wrong_or_raises_is_reported_and_not_timed(change, status, reason):
    case = _oracle.make_case(3, 5, 64, torch.bfloat16, CPU)
    implementation = _peers.Implementation("peer", definition_but(change))
    report, timers = kernels.prepare(implementation, case, _measure.Clock(CPU))
    assert report["status"] == status
    assert (timers is not None) == (status == "timed")
    if reason is not None:
        assert report["reason"].startswith(reason)


def test_what_a_peer_cannot_take_is_said_and_not_run():
    case = _oracle.make_case(2, 3, 100, torch.bfloat16, CPU)
    refusing = _peers.Implementation("peer", definition_but(raises), refuses=lambda s, n, d, t: f"not {d} wide")
    assert kernels.prepare(refusing, case, _measure.Clock(CPU))[0]["reason"] == "not 100 wide"


def test_peers_that_take_a_stack_or_no_key_gain_are_held_to_the_same_oracle():
    def stacked(values, query, key_weight, eps):
        assert key_weight.eq(1).all()
        return _peers.stacked_definition(values.unbind(0), query, key_weight, eps)

    case = _oracle.make_case(4, 5, 64, torch.bfloat16, CPU)
    peer = _peers.Implementation("peer", stacked, stacked=True, key_gain=False)
    report, _ = kernels.prepare(peer, case, _measure.Clock(CPU))
    assert report["status"] == "timed"
    assert report["errors"]["key_weight"] is None


def test_the_oracle_in_chunks_of_rows_adds_up_to_the_whole(monkeypatch):
    case = _oracle.make_case(3, 11, 64, torch.float32, CPU)
    out, grads, query_grad, gain_grad = _oracle.oracle(
        case.stacked.unbind(0), case.query, case.key_weight, case.grad, case.eps
    )
    monkeypatch.setattr(_oracle, "CHUNK_BYTES", 8 * 3 * 64 * 4)
    found = _oracle.errors(case, case.key_weight, out, grads, query_grad, gain_grad)
    assert max(found.out, found.sources, found.query, found.key_weight) < 1e-14


@pytest.mark.slow
def test_training_step_runs_every_model_from_the_same_loss(tmp_path):
    output = tmp_path / "step.json"
    arguments = ["--device", "cpu", "--smoke", "--precision", "float32", "--output", str(output)]
    assert training_step.main(arguments) == output
    content = json.loads(output.read_text())
    assert content.keys() >= ENVIRONMENT | {"settings", "models"}
    assert [m["model"] for m in content["models"]] == list(training_step.MODELS)
    assert all(m["status"] == "timed" for m in content["models"]), content["models"]
    plain, *others = content["models"]
    for model in others:
        assert model["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-5)
        assert model["parameters"] > plain["parameters"]
        assert model["step_ratio"] == pytest.approx(model["microseconds"] / plain["microseconds"])
        assert model["tokens_per_second"] > 0
        assert model["peak_bytes"] is None


def test_two_phase_counts_the_bytes_of_two_blocks_of_two():
    assert two_phase.count_fused([2, 2]) == two_phase.Bytes(1 + 2 + 2 + 3, 4)
    assert two_phase.count_two_phase([2, 2]) == two_phase.Bytes(2 * 1 + 2 + 2 * 2 + 2, 3 + 3)
    assert two_phase.blocks_of(7, 3) == [3, 2, 2]


def test_two_phase_writes_bytes_and_the_times_or_why_there_are_none(tmp_path):
    output = two_phase.main(["--device", "cpu", "--smoke", "--output", str(tmp_path / "two.json")])
    content = json.loads(output.read_text())
    assert content.keys() >= ENVIRONMENT | {"counted_d", "paper_d", "reason"}
    if content["reason"] is None:
        assert max(content["difference"].values()) < 1e-6
        assert content["times"].keys() == {
            "copy", "fused forward", "fused both", "two_phase forward", "two_phase both"
        }  # fmt: skip
    else:
        assert content["reason"] == two_phase.MISSING


@dataclass(frozen=True)
class FakeLaunch:
    num_stages: int
    programs_per_sm: int


def test_tuning_keeps_the_fastest_launch_that_has_the_default_bits():
    default, slow, wrong, broken, fast = (FakeLaunch(n, 1) for n in range(5))
    forced = [default]

    @contextlib.contextmanager
    def launch_with(launch):
        forced.append(launch)
        try:
            yield
        finally:
            forced.pop()

    class FakeProblem:
        def results(self, direction):
            if forced[-1] == broken:
                raise RuntimeError("out of shared memory")
            return [torch.full((3,), float(forced[-1] == wrong))]

        def seconds(self, direction, clock):
            return {default: 2e-6, slow: 3e-6, fast: 1e-6}[forced[-1]]

    best, medians, refused = tune.fastest(
        FakeProblem(), "forward", default, [slow, wrong, broken, fast], launch_with, None, 3
    )
    assert best == fast
    assert medians[default] == pytest.approx(2.0)
    assert refused == {wrong: "other bits than the default launch", broken: "RuntimeError: out of shared memory"}


def test_a_new_record_takes_the_place_of_its_own_problem_only():
    def record(device, width, stages):
        return {
            "device": device, "direction": "forward", "sources": 9, "width": width, "dtype": "bfloat16",
            "num_stages": stages, "programs_per_sm": 2,
        }  # fmt: skip

    table = [record("b", 64, 1), record("a", 64, 1)]
    assert tune.merged(table, [record("a", 64, 3)]) == [record("a", 64, 3), record("b", 64, 1)]


@pytest.mark.parametrize("variant", ["full", "block", "local"])
def test_the_pass_time_benchmark_runs_the_passes(variant):
    assert pass_time.seconds(4, variant) > 0
