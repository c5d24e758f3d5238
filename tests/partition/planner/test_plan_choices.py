"""Which blocks may be chosen, what is in flight, which of equal plans is taken, and what is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_fx.errors import PlanError
from attnres_fx.partition import DeviceSpeed, ModelCosts, StreamCost, SublayerCost
from attnres_fx.partition.costs.in_flight import in_flight
from attnres_fx.partition.planner import search as planner
from attnres_fx.partition.planner.block_choices import all_blocks, count_blocks, latest_blocks
from attnres_fx.partition.planner.request import PlanRequest
from attnres_fx.partition.planner.search import at_stages, find_partition
from attnres_fx.passes.schedule import even_starts
from tests.support.plan_requests import SLOW
from tests.support.schedules import SINGLE
from tests.support.slow_plans import allowed_blocks, best_of, every_plan, moments


@pytest.mark.parametrize("count", range(1, 13))
def test_blocks_to_choose_from_are_those_near_an_even_size(count):
    for blocks in range(1, count + 1):
        allowed = list(allowed_blocks(count, blocks))
        assert sorted(all_blocks(count, blocks)) == allowed
        assert count_blocks(count, blocks, 10**6) == len(allowed)
        assert even_starts(count, blocks) in allowed
        latest = latest_blocks(count, blocks, {}, {})
        assert latest in allowed
        assert all(a <= b for starts in allowed for a, b in zip(starts, latest, strict=True))


@settings(SLOW, max_examples=200)
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.sets(st.integers(1, n)))))
def test_blocks_at_stages_are_allowed_and_nearest_to_even(case):
    count, blocks, cuts = case
    stages = (0, *sorted(cuts - {count}))

    def fit(starts):
        return set(starts) >= set(stages) if blocks >= len(stages) else set(starts) <= set(stages)

    even = even_starts(count, blocks)
    fitting = [s for s in allowed_blocks(count, blocks) if fit(s)]
    best = min(fitting, key=lambda s: (sum(abs(a - b) for a, b in zip(s, even, strict=True)), s), default=None)
    assert at_stages(stages, count, blocks) == best


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble"])
def test_microbatches_in_flight_are_those_of_the_order_pytorch_works_in(schedule):
    for ranks in (1, 2, 3, 4, 6):
        for rounds in (1,) if schedule in SINGLE else (1, 2, 3):
            counts = {ranks, ranks + 1, 2 * ranks, 4 * ranks}
            for microbatches in (m for m in counts if schedule in SINGLE or m % max(1, m // ranks) == 0):
                request = PlanRequest(
                    costs=even_costs(1),
                    num_stages=ranks,
                    virtual_stages=rounds,
                    num_microbatches=microbatches,
                    pipeline_schedule=schedule,
                )
                for rank in range(ranks):
                    seen = {tuple(moment.values()) for moment in moments(request, rank)}
                    fullest = {a for a in seen if not any(a != b and below(a, b) for b in seen)}
                    found = in_flight(schedule, ranks, rounds, microbatches, rank)
                    assert set(found) == fullest
                    assert len(found) == len(fullest)


def below(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True))


def even_costs(count, value=1 << 24):
    """Attention and experts in turn, sizes of a large model."""
    chain = [
        SublayerCost(str(i), 1e12 * (1 + i % 2), 2e12 * (1 + i % 2), (1 + i % 2) << 24, (1 + i % 3) << 26)
        for i in range(count)
    ]
    ends = SublayerCost("before", 1e9, 0.0, 1 << 30, 0), SublayerCost("after", 3e12, 6e12, 1 << 30, 1 << 28)
    return ModelCosts(tuple(chain), *ends, (StreamCost("main", 0, count, value),))


def large(variant, virtual, **options):
    return PlanRequest(
        costs=even_costs(1000),
        num_stages=64 // virtual,
        virtual_stages=virtual,
        num_microbatches=128 // virtual,
        pipeline_schedule="1F1B" if virtual == 1 else "Interleaved1F1B",
        variant=variant,
        **options,
    )


@pytest.mark.parametrize(("work", "starts"), [([3, 1, 1, 1], (0, 1)), ([0, 0, 0, 0], (0, 2))])
def test_of_plans_as_fast_stages_at_blocks_come_first_and_even_starts_next(work, starts):
    chain = tuple(SublayerCost(str(i), flops, 0, 0, 0) for i, flops in enumerate(work))
    ends = SublayerCost("before", 0, 0, 0, 0), SublayerCost("after", 0, 0, 0, 0)
    request = PlanRequest(
        costs=ModelCosts(chain, *ends, (StreamCost("main", 0, 4, 0),)),
        num_stages=2,
        num_microbatches=2,
        device=DeviceSpeed(flops=1e12, link_latency=0.0),
        num_blocks=2,
    )
    found = find_partition(request)
    assert (found.starts, dict(found.block_layouts)["main"].starts) == (starts, starts)


def test_where_blocks_are_too_many_to_try_cuts_at_blocks_alone_leave_a_gap(monkeypatch):
    work = [0, 1, 0, 0, 0, 0]  # and 1 before: the latest blocks, of 3, 2 and 1, leave both to one stage
    chain = tuple(SublayerCost(str(i), 0, flops, 0, 0) for i, flops in enumerate(work))
    ends = SublayerCost("before", 0, 1, 0, 0), SublayerCost("after", 0, 0, 0, 0)
    request = PlanRequest(
        costs=ModelCosts(chain, *ends, (StreamCost("main", 0, 6, 0),)),
        num_stages=2,
        num_microbatches=2,
        device=DeviceSpeed(flops=1e12, link_latency=0.0),
        num_blocks=3,
        align="require",
    )
    monkeypatch.setattr(planner, "ENUMERATED", 0)
    found = find_partition(request)
    assert best_of(list(every_plan(request))).slowest == 1
    assert (1 + found.gap) * 1 >= found.slowest


@pytest.mark.parametrize("virtual", [1, 2, 4])
@pytest.mark.slow_after(1)
def test_a_thousand_sublayers_on_64_stages_can_be_planned(virtual):
    found = find_partition(large("block", virtual))
    assert len(found.starts) == 64
    assert found.gap < 0.05


def small(**options):
    return PlanRequest(**{"costs": even_costs(8), "num_stages": 2, "num_microbatches": 4, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 9, "num_microbatches": 9}, "9 stages, more than the model's 8 sublayers.*at most 8"),
        ({"starts": (0, 8)}, "stage 1 would be empty: it starts at sublayer 8 and the next at 8"),
        ({"starts": (0, 0)}, "stage 0 would be empty"),
        ({"starts": (0, 3, 5)}, "3 stage starts are given for num_stages=2"),
        ({"starts": (1, 3)}, "must begin with 0"),
        ({"num_blocks": 9}, "num_blocks=9 must be a number.*between 1 and the 8 sublayers"),
        ({"num_blocks": (5, 4)}, "num_blocks="),
        ({"num_blocks": 1, "align": "require"}, "there are 1 blocks.*num_blocks of at least 2"),
        ({"num_stages": 4, "num_blocks": (1, 3), "align": "require"}, "there are 3 blocks.*num_blocks of at least 4"),
        ({"memory_limit": 1}, "no stages fit memory_limit=1 .1 B.: a rank needs"),
        ({"align": "never"}, "align must be one of prefer, require"),
        ({"variant": "other"}, "variant must be one of"),
        ({"pipeline_schedule": "2F2B"}, "schedule='2F2B' is none of"),
        ({"virtual_stages": 2}, "choose virtual_stages=1 or"),
        ({"optimizer_factor": -1.0}, "optimizer_factor"),
        ({"device": DeviceSpeed(flops=1e-9)}, "give DeviceSpeed in operations a second"),
        ({"block_layouts": {}}, "the stream 'main' needs blocks of variant 'block' over its 8"),
    ],
)
def test_what_cannot_be_planned_is_said_with_what_to_change(options, message):
    with pytest.raises(PlanError, match=message):
        find_partition(small(**options))
