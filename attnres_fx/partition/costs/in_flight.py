"""How many microbatches a rank keeps at a time, from the orders PyTorch's schedules work in: plain numbers.

GPipe runs all forwards first. 1F1B runs as many forwards ahead as there are ranks behind. The interleaved schedules run
`(V - 1) * R + k * (P - 1 - rank)` forwards ahead (R microbatches a round, k = 2, or 1 under zero bubble), going round
their virtual stages every R microbatches, and then one forward and one backward in turn (arXiv 2104.04473, section 2.2;
`torch.distributed.pipelining.schedules`). Under zero bubble the weights' part of a backward, which frees what was kept,
lags `rank` backwards behind (arXiv 2401.10241, ZB-H1).
"""

from collections.abc import Iterable

from attnres_fx.partition.pipeline_schedule import PipelineSchedule, check_schedule

Counts = tuple[int, ...]


def in_flight(
    schedule: str, num_stages: int, virtual_stages: int, num_microbatches: int, rank: int
) -> tuple[Counts, ...]:
    """The fullest moments of a rank: for each of its virtual stages, microbatches between forward and backward.

    Each moment is a tuple of `virtual_stages` counts, and none is below another in every count; with one virtual stage
    there is one. The first count is also the number of microbatches the rank has begun and not finished.
    Raises PlanError for numbers the schedule cannot run.
    """
    known = check_schedule(
        schedule, num_stages=num_stages, virtual_stages=virtual_stages, num_microbatches=num_microbatches
    )
    if known is PipelineSchedule.GPIPE:
        return ((num_microbatches,),)
    if known is PipelineSchedule.ONE_FORWARD_ONE_BACKWARD:
        return ((min(num_microbatches, num_stages - rank),),)
    return _fullest(_interleaved(known.splits_backward, num_stages, virtual_stages, num_microbatches, rank))


def _interleaved(zero_bubble: bool, ranks: int, stages: int, microbatches: int, rank: int) -> Iterable[Counts]:
    """Counts right after each forward."""
    a_round = microbatches // max(1, microbatches // ranks)
    total = stages * microbatches
    ahead = min((stages - 1) * a_round + (1 if zero_bubble else 2) * (ranks - 1 - rank), total)
    lag = rank if zero_bubble else 0
    counts = [0] * stages
    for forward in range(total):
        freed = forward - ahead - lag - 1
        if freed >= 0:
            counts[stages - 1 - (freed // a_round) % stages] -= 1
        counts[(forward // a_round) % stages] += 1
        yield tuple(counts)


def _fullest(moments: Iterable[Counts]) -> tuple[Counts, ...]:
    distinct = sorted(set(moments), reverse=True)
    kept: list[Counts] = []
    for moment in distinct:  # what is below another comes after it
        if not any(all(m <= k for m, k in zip(moment, other, strict=True)) for other in kept):
            kept.append(moment)
    return tuple(kept)
