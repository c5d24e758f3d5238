"""Plans are the best there are, or as good as they say, by trying all plans of small models."""

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnres_fx.errors import PlanError
from attnres_fx.partition.costs.unit_costs import PICOSECONDS
from attnres_fx.partition.planner import search as planner
from attnres_fx.partition.planner.objective import evaluate
from attnres_fx.partition.planner.search import find_partition
from tests.support.plan_requests import SLOW, requests
from tests.support.slow_plans import best_of, count_cost, every_plan, every_schedule, fits

#: Instances larger than this take the brute force too long.
PLANS = 1500


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
@pytest.mark.slow
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
@pytest.mark.slow
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
