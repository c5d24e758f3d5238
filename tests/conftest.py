"""One thread a test process: on small machines more of them wait on each other."""

import gc
import os
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more of them import torch in processes of their own

import pytest
import torch

torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 20)  # a capture makes millions of objects, few of them in cycles


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """All parameter sets of a test but its first are slow, or but its first n with `slow_after(n)`.

    So is what starts several processes.
    """
    seen = Counter()
    for item in items:
        name = item.nodeid.partition("[")[0]
        seen[name] += 1
        after = item.get_closest_marker("slow_after")
        if "worlds" in item.fixturenames or seen[name] > (after.args[0] if after else 1):
            item.add_marker(pytest.mark.slow)
