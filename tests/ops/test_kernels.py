"""The Triton kernels, without a GPU: in the interpreter against float64, and compiled ahead of time."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("triton")

#: Two processes, for the imports of each cost as much as several checks.
CHECKS = {
    "numbers": "shapes wide_and_deep fusions dtypes mixed_dtypes threaded_gradients strides copies_are_said_once "
    "one_tensor_twice no_tokens one_source large_logits_stay_finite gradients_where_wanted",
    "the rest": "poisoned_memory same_bits_in_two_runs many_kernels_many_launches_same_bits "
    "transforms_take_the_definition operators_are_registered_right two_phases gradients_of_gradients "
    "threaded_reads_leave_autograd_nothing_to_add compiled_without_recompiling what_kernels_do_not_take "
    "tensors_sharded_by_tokens",
}


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("names", CHECKS.values(), ids=CHECKS)
@pytest.mark.slow
def test_kernels_in_the_interpreter(names):
    told = run("tests/support/kernel_checks.py", *names.split(), TRITON_INTERPRET="1")
    assert told.split() == [word for name in names.split() for word in (f"{name}:", "ok")]


def test_every_check_is_run():
    text = (ROOT / "tests/support/kernel_checks.py").read_text()
    assert text.count("@check\n") == sum(len(names.split()) for names in CHECKS.values())


@pytest.mark.parametrize(
    "version, why", [(None, "Triton is not installed"), ("2.1.0", "Triton 2.1.0 is older than 3.4")]
)
def test_without_a_triton_that_can_the_definition_runs_and_says_why(monkeypatch, version, why):
    from attnres_fx.ops import depth_attention
    from attnres_fx.ops.kernels import availability, described

    sources = [torch.randn(3, 8), torch.randn(3, 8)]
    right = depth_attention(sources, torch.ones(8), torch.ones(8))
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version) if version else None)
    monkeypatch.setattr("attnres_fx.ops.kernels.kernel_device", lambda source: True)
    availability.why_not.cache_clear()
    try:
        assert why in described(sources)
        assert torch.equal(depth_attention(sources, torch.ones(8), torch.ones(8)), right)
    finally:
        availability.why_not.cache_clear()


@pytest.mark.slow
def test_six_configurations_compile_for_a_gpu_that_is_not_here(tmp_path):
    """16-byte loads and stores of contiguous bf16 rows, at most 64 bytes of stack."""
    cases = ["forward S=9 D=7168 bf16", "backward S=9 D=7168 bf16", "forward S=5 D=4096 bf16"]
    cases += ["backward S=5 D=4096 bf16", "forward S=9 D=7168 bf16 rms delta", "backward S=1 D=7168 bf16 carry"]
    out = tmp_path / "compiled.json"
    run(
        "benchmarks/compile_kernels.py",
        "--targets",
        "sm_90",
        "--exactly",
        *cases,
        "--output",
        str(out),
        TRITON_INTERPRET="0",
    )
    compiled = json.loads(out.read_text())["compiled"]
    assert [c["case"] for c in compiled] == cases
    for case in compiled:
        assert case["stack"] <= 64, case
        assert case["load_bytes"].startswith("16 x"), case
        assert case["store_bytes"].startswith("16 x"), case
        assert " 2 x" not in f" {case['load_bytes']} {case['store_bytes']}", case
