"""A process that is stuck, and one that dies."""

import os
import signal
import time
from datetime import timedelta

import torch.distributed as dist

from tests.support.pipeline_cases.tools import build, case, refusal
from tests.support.pipeline_model import batch, whole


def dies_at_its_third_call(how):
    calls = iter(range(100))
    return lambda: how() if next(calls) == 2 else None


def lost(pipeline):
    ids, target = batch(8)
    start = time.time()
    error = refusal(lambda: pipeline.step(ids, target=target))
    seconds = time.time() - start
    again = refusal(lambda: pipeline.step(ids, target=target))
    return {"error": error, "again": again, "seconds": seconds, "held": pipeline.num_retained}


@case("four")
def stuck_worker():
    group = dist.new_group(timeout=timedelta(seconds=2))
    pipeline = build(whole(), "1F1B", 1, group=group)
    pipeline.step(batch(8)[0], target=batch(8)[1])
    if dist.get_rank() == 1:
        pipeline.modules[1].fail_at = dies_at_its_third_call(lambda: time.sleep(5))
    return lost(pipeline)


@case("four")
def killed_worker():
    pipeline = build(whole(), "Interleaved1F1B", 2)
    pipeline.step(batch(8)[0], target=batch(8)[1])
    if dist.get_rank() == 1:
        pipeline.modules[5].fail_at = dies_at_its_third_call(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return lost(pipeline)
