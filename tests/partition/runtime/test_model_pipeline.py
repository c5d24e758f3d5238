"""Converted models in real pipelines over gloo, against the same model in one process.

What runs in processes is in model_pipeline_workers.py; the tests here read what it found.
"""

import pytest

from tests.support.model_pipeline_workers import CASES, RANKS
from tests.support.pipeline_worlds import results_of_worlds, shared_folder

TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    base = shared_folder(tmp_path_factory)
    return results_of_worlds("tests.support.model_pipeline_workers", RANKS, base, "model-pipeline")


def numbers(result):
    """Every figure in nested results, by its path."""
    for key, value in result.items():
        if isinstance(value, dict):
            yield from ((f"{key}: {path}", found) for path, found in numbers(value))
        else:
            yield key, value


@pytest.mark.parametrize(("suite", "name"), [(s, n) for s in CASES for n in CASES[s]])
def test_a_pipeline_computes_what_one_process_does(worlds, suite, name):
    results = worlds[suite, name]
    assert len(results) == RANKS[suite]
    for result in results:
        assert "error" not in result, result["error"]
        figures = dict(numbers(result))
        assert figures
        for path, value in figures.items():
            if path.endswith(("bytes", "order")):
                assert value is True, path
            elif path.endswith("held"):
                assert value == 0, path
            else:
                assert value <= TOLERANCE, path
