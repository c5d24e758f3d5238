"""The planner against every plan there is, and what a plan costs against the rules computed slowly."""

import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from attnres_fx.errors import PlanError
from attnres_fx.partition import CarriedValue, DeviceSpeed, ModelCosts, StreamCost, SublayerCost
from attnres_fx.partition.costs.in_flight import in_flight
from attnres_fx.partition.costs.unit_costs import PICOSECONDS
from attnres_fx.partition.pipeline_schedule import PipelineSchedule
from attnres_fx.partition.planner import search as planner
from attnres_fx.partition.planner.block_choices import all_blocks, count_blocks, latest_blocks
from attnres_fx.partition.planner.objective import evaluate
from attnres_fx.partition.planner.request import PlanRequest
from attnres_fx.partition.planner.search import at_stages, find_partition
from attnres_fx.passes.schedule import DepthSchedule, even_starts
from tests.support.slow_plans import allowed_blocks, best_of, count_cost, every_plan, every_schedule, fits, moments

SINGLE = tuple(s.value for s in PipelineSchedule if s.single_stage)
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
#: Whole picoseconds for whole operations and bytes, so that nothing is rounded.
WHOLE = [1e12, 5e11, 2.5e11, 1e11]
#: Instances larger than this take the brute force too long.
PLANS = 1500


def sublayers(draw, name, most=30):
    sizes = st.integers(0, most)
    return SublayerCost(name, draw(sizes), draw(sizes), draw(sizes), draw(sizes))


@st.composite
def model_costs(draw, counts, values=12):
    """Streams of these lengths, some with values carried besides and tied parameters."""
    streams, at = [], 0
    for name, count in zip(("encoder", "decoder"), counts, strict=False):
        streams.append(StreamCost(name, at, count, draw(st.integers(0, values))))
        at += count
    chain = [sublayers(draw, str(i)) for i in range(at)]
    if draw(st.booleans()):  # of one size, in streams of nothing: plans equal in seconds and bytes
        chain = [replace(chain[0], name=s.name) for s in chain]
        streams = [replace(s, value_bytes=0) for s in streams]
    carried = []
    for i in range(draw(st.integers(0, 2))):
        made = draw(st.integers(-1, at - 1))
        used = draw(st.sets(st.integers(made + 1, at), min_size=1, max_size=3))
        carried.append(CarriedValue(f"x{i}", draw(st.integers(1, 40)), made, tuple(sorted(used)), draw(st.booleans())))
    places = st.lists(st.sampled_from(["before", "after", *map(str, range(at))]), min_size=2, max_size=3, unique=True)
    tied = [(draw(st.integers(1, 30)), tuple(draw(places))) for _ in range(draw(st.integers(0, 2)))]
    ends = [sublayers(draw, "before"), sublayers(draw, "after")]
    return ModelCosts(tuple(chain), *ends, tuple(streams), tuple(carried), tuple(tied))


def pinned(draw, costs, variant):
    found = {}
    for s in costs.streams:
        cuts = draw(st.sets(st.integers(1, s.count - 1), max_size=4)) if s.count > 1 else set()
        starts = range(s.count) if variant == "full" else (0, *sorted(cuts))
        found[s.name] = DepthSchedule(variant, tuple(starts), s.count)
    return found


@st.composite
def requests(draw, most_sublayers=12, most_stages=4, rounds=(1,)):
    """Everything that can be asked for, small enough for the brute force."""
    virtual = draw(st.sampled_from(rounds))
    ranks = draw(st.integers(1, most_stages))
    count = draw(st.integers(ranks * virtual, max(most_sublayers, ranks * virtual)))
    counts = [count]
    if count > 1 and draw(st.booleans()):
        counts = [split := draw(st.integers(1, count - 1)), count - split]
    costs = draw(model_costs(counts))
    variant = draw(st.sampled_from(["block", "block", "local", "local", "full"]))
    free = len(counts) == 1 and draw(st.booleans())
    blocks = None
    if free and variant != "full" and draw(st.booleans()):
        blocks = draw(st.integers(1, count))
        if draw(st.booleans()):
            blocks = (blocks, min(count, blocks + draw(st.integers(0, 2))))
    schedule = draw(st.sampled_from(["Interleaved1F1B", "InterleavedZeroBubble", *(SINGLE if virtual == 1 else ())]))
    starts = None
    if draw(st.integers(0, 5)) == 0:
        cuts = st.sets(st.integers(1, count - 1), min_size=ranks * virtual - 1, max_size=ranks * virtual - 1)
        starts = (0, *sorted(draw(cuts) if ranks * virtual > 1 else ()))
    device = DeviceSpeed(
        flops=draw(st.sampled_from(WHOLE)),
        memory_bandwidth=draw(st.sampled_from(WHOLE)),
        link_bandwidth=draw(st.sampled_from(WHOLE)),
        link_latency=draw(st.sampled_from([0.0, 2.0**-30, 5e-12])),
    )
    return PlanRequest(
        costs=costs,
        num_stages=ranks,
        virtual_stages=virtual,
        num_microbatches=ranks * draw(st.integers(1, 3)),
        pipeline_schedule=schedule,
        device=device,
        variant=variant,
        block_layouts=None if free else pinned(draw, costs, variant),
        num_blocks=blocks,
        starts=starts,
        align=draw(st.sampled_from(["prefer", "prefer", "require"])),
        optimizer_factor=draw(st.sampled_from([0.0, 3.0, 1.5])),
        recompute=draw(st.booleans()),
        cache=draw(st.booleans()),
    )


def all_plans(request):
    """Of instances that are small enough."""
    cuts = len(every_schedule(request))
    for i in range(request.num_virtual - 1):
        cuts = cuts * (request.num_sublayers - 1 - i) // (i + 1)
    assume(request.starts is not None or cuts <= PLANS)
    return list(every_plan(request))


def same(found, best):
    assert (found.starts, found.block_layouts) == (best.starts, best.block_layouts)
    assert replace(found, gap=0.0) == replace(best, gap=0.0)


def needed(error):
    return int(re.search(r"a rank needs (\d+)", str(error.value))[1])


@settings(SLOW, max_examples=250)
@given(requests(rounds=(1, 1, 2, 3), most_sublayers=10, most_stages=3), st.data())
@pytest.mark.slow
def test_what_a_plan_costs_follows_from_the_rules(request, data):
    schedules = data.draw(st.sampled_from(every_schedule(request)))
    count = request.num_virtual - 1
    cuts = st.sets(st.integers(1, request.num_sublayers - 1), min_size=count, max_size=count)
    starts = (0, *sorted(data.draw(cuts) if count else ()))
    found, slow = evaluate(request, starts, schedules), count_cost(request, starts, schedules)
    assert found.forward_seconds == pytest.approx([float(t) for t in slow.forward])
    assert found.backward_seconds == pytest.approx([float(t) for t in slow.backward])
    assert found.hop_seconds == pytest.approx([float(t) for t in slow.hop], abs=2e-12)
    assert abs(found.slowest - slow.slowest * PICOSECONDS) < 2
    assert list(found.hop_forward_bytes) == slow.hop_forward
    assert list(found.hop_backward_bytes) == slow.hop_backward
    assert found.traffic_bytes == sum(slow.hop_forward) + sum(slow.hop_backward)
    assert list(found.memory_bytes) == slow.memory


@settings(SLOW, max_examples=60)
@given(requests())
def test_with_one_stage_a_rank_the_plan_is_the_best_of_all(request):
    plans = all_plans(request)
    best = best_of(plans)
    if best is None:
        with pytest.raises(PlanError, match="begin with a block"):
            find_partition(request)
        return
    found = find_partition(request)
    same(found, best)
    assert found.gap == pytest.approx(max(0.0, best.slowest / max(1, min(p.slowest for p in plans)) - 1))


@settings(SLOW, max_examples=60)
@given(requests(), st.data())
def test_under_a_memory_limit_the_plan_is_the_best_that_fits(request, data):
    plans = all_plans(request)
    assume(plans)
    limit = data.draw(st.sampled_from(sorted({max(p.memory_bytes) for p in plans})))
    request = replace(request, memory_limit=limit)
    same(find_partition(request), best_of([p for p in plans if fits(request, p)]))


@settings(SLOW, max_examples=40)
@given(requests())
def test_where_nothing_fits_the_number_in_the_message_is_the_least_that_does(request):
    plans = all_plans(request)
    assume(plans)
    least = min(max(p.memory_bytes) for p in plans)
    assume(least > 0)
    with pytest.raises(PlanError, match="Raise memory_limit") as error:
        find_partition(replace(request, memory_limit=least - 1))
    assert needed(error) == least
    enough = replace(request, memory_limit=least)
    same(find_partition(enough), best_of([p for p in plans if fits(enough, p)]))


@settings(SLOW, max_examples=60)
@given(requests(most_sublayers=9, most_stages=3, rounds=(2, 3)))
def test_with_several_stages_a_rank_the_gap_holds_and_no_plan_is_better_than_the_best(request):
    plans = all_plans(request)
    if not plans:
        with pytest.raises(PlanError, match="begin with a block"):
            find_partition(request)
        return
    found = find_partition(request)
    fastest = min(p.slowest for p in plans)
    assert replace(found, gap=0.0) in plans
    assert found.slowest >= fastest
    assert found.slowest <= (1 + found.gap) * fastest + 1e-6
    assert found.slowest <= 1.5 * fastest


@settings(SLOW, max_examples=60)
@given(requests(most_sublayers=9, most_stages=3, rounds=(2, 3)), st.data())
def test_with_several_stages_a_rank_plans_fit_the_memory_or_the_message_says_how_much_does(request, data):
    plans = all_plans(request)
    assume(plans)
    limits = sorted({max(p.memory_bytes) for p in plans})
    limit = data.draw(st.sampled_from(limits))
    request = replace(request, memory_limit=limit)
    try:
        found = find_partition(request)
    except PlanError as error:
        more = int(re.search(r"a rank needs (\d+)", str(error))[1])
        assert more > limit
        found = find_partition(replace(request, memory_limit=more))
        assert max(found.memory_bytes) <= more
        return
    assert replace(found, gap=0.0) in plans
    assert max(found.memory_bytes) <= limit
    fastest = min(p.slowest for p in plans if fits(request, p))
    assert fastest <= found.slowest <= (1 + found.gap) * fastest + 1e-6


@settings(SLOW, max_examples=60)
@given(requests(most_sublayers=9, most_stages=3, rounds=(1, 1, 2)), st.data())
def test_where_blocks_are_too_many_to_try_the_plan_is_allowed_and_the_gap_holds(request, data):
    assume(request.known_layouts is None)
    plans = all_plans(request)
    assume(plans)
    if data.draw(st.booleans()):
        limits = sorted({max(p.memory_bytes) for p in plans})
        request = replace(request, memory_limit=data.draw(st.sampled_from(limits)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "ENUMERATED", 0)
        try:
            found = find_partition(request)
        except PlanError:
            assume(False)
    assert replace(found, gap=0.0) in plans
    assert fits(request, found)
    fastest = min(p.slowest for p in plans if fits(request, p))
    assert fastest <= found.slowest <= (1 + found.gap) * fastest + 1e-6


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
    assert (found.starts, found.block_starts["main"]) == (starts, starts)


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
