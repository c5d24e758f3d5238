"""One thread a test process: on small machines more of them wait on each other."""

import gc
import os
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more of them import torch in processes of their own

import pytest
import torch

#: Tests of a file that `make test-quick` runs at most, the first that are not slow: the core of every folder.
QUICK_IN_A_FILE = 3

torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 20)  # a capture makes millions of objects, few of them in cycles


@pytest.fixture(scope="module")
def quick_collections():
    """For what collects garbage often: what other files of tests left is gone through once, and not each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """All parameter sets of a test but its first are slow, or but its first n with `slow_after(n)`.

    So is what starts several processes, and what comes in a file after as many others as QUICK_IN_A_FILE.
    """
    seen, quick = Counter(), Counter()
    for item in items:
        name = item.nodeid.partition("[")[0]
        seen[name] += 1
        after = item.get_closest_marker("slow_after")
        if "worlds" in item.fixturenames or seen[name] > (after.args[0] if after else 1):
            item.add_marker(pytest.mark.slow)
        if not item.get_closest_marker("slow"):
            quick[item.path] += 1
            if quick[item.path] > QUICK_IN_A_FILE:
                item.add_marker(pytest.mark.slow)
