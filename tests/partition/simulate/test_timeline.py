"""Simulated steps, against closed forms, longest paths and PyTorch's own loops."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_fx.errors import PlanError
from attnres_fx.partition.costs.stage_loads import StageLoad
from attnres_fx.partition.simulate.timeline import simulate
from tests.support.paths import BENCHMARKS
from tests.support.schedules import EVEN, MULTI, SINGLE, even_step


@pytest.mark.parametrize(
    ("schedule", "rounds"), [("GPipe", 1), ("1F1B", 1), *(("Interleaved1F1B", v) for v in (1, 2, 4))]
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_the_bubble_of_equal_stages_is_the_closed_form(schedule, rounds, ranks):
    for microbatches in (ranks, 2 * ranks, 6 * ranks):
        for load in (EVEN, StageLoad(0.3, 0.4, 0.5)):
            timeline = even_step(schedule, ranks, rounds, microbatches, load)
            assert timeline.bubble == pytest.approx((ranks - 1) / (rounds * microbatches + ranks - 1), abs=1e-12)
            work = load.forward + load.backward_input + load.backward_weight
            assert timeline.step_seconds == pytest.approx((rounds * microbatches + ranks - 1) * work)
            assert timeline.idle == pytest.approx([(ranks - 1) * work] * ranks)


def test_gpipe_may_have_fewer_microbatches_than_stages():
    assert even_step("GPipe", 4, 1, 2).bubble == pytest.approx(3 / 5)


@pytest.mark.parametrize("rounds", [1, 2])
def test_zero_bubble_is_idle_a_third_as_long(rounds):
    # Backwards of weights fill in: a rank waits (P - 1) of one of the three parts, not of all.
    timeline = even_step("InterleavedZeroBubble", 4, rounds, 8)
    assert timeline.idle == pytest.approx([3.0] * 4)


def test_hops_delay_the_receiver_and_not_the_sender():
    load = StageLoad(2.0, 3.0, 1.0, send_forward=0.5, send_backward=0.25)
    timeline = even_step("GPipe", 2, 1, 2, load)
    assert [(t.start, t.end) for t in timeline.ranks[0]] == [(0, 2), (2, 4), (10.75, 14.75), (14.75, 18.75)]
    assert [(t.start, t.end) for t in timeline.ranks[1]] == [(2.5, 4.5), (4.5, 6.5), (6.5, 10.5), (10.5, 14.5)]
    assert sorted((h.source_rank, h.target_rank, str(h.action), h.start, h.end) for h in timeline.hops) == [
        (0, 1, "0F0", 2, 2.5),
        (0, 1, "0F1", 4, 4.5),
        (1, 0, "1B0", 10.5, 10.75),
        (1, 0, "1B1", 14.5, 14.75),
    ]


def test_a_link_carries_one_message_at_a_time():
    load = StageLoad(1.0, 1.0, send_forward=5.0)
    timeline = even_step("GPipe", 2, 1, 3, load)
    assert [(h.start, h.end) for h in timeline.hops if h.action.kind == "F"] == [(1, 6), (6, 11), (11, 16)]
    assert [t.start for t in timeline.ranks[1]] == [6, 11, 16, 17, 18, 19]


@st.composite
def loaded_pipelines(draw):
    schedule = draw(st.sampled_from([*SINGLE, *MULTI]))
    ranks = draw(st.integers(1, 4))
    rounds = 1 if schedule in SINGLE else draw(st.integers(1, 3))
    microbatches = ranks * draw(st.integers(1, 2)) if schedule != "GPipe" else draw(st.integers(1, 5))
    some = st.integers(1, 20).map(float)
    hop = st.integers(0, 30).map(float)
    kept = st.integers(0, 9)
    loads = [
        StageLoad(draw(some), draw(some), draw(some), draw(hop), draw(hop), draw(kept), draw(kept), draw(kept))
        for _ in range(ranks * rounds)
    ]
    how = {"schedule": schedule, "num_stages": ranks, "virtual_stages": rounds, "num_microbatches": microbatches}
    return loads, how


def parsed(name):
    at = next(i for i, c in enumerate(name) if c in "FBIW")
    return int(name[:at]), name[at], int(name[at + 1 :])


def longest_paths(orders_, loads, ranks):
    """Ends of all computations and messages, by relaxing the edges of their graph until nothing moves."""
    last = len(loads) - 1
    lengths, edges = {}, []
    for order in orders_:
        messages = {}
        edges += itertools.pairwise(order)
        for name in order:
            stage, kind, microbatch = parsed(name)
            load = loads[stage]
            weight, inputs = load.backward_weight, load.backward_input
            lengths[name] = {"F": load.forward, "I": inputs, "W": weight, "B": inputs + weight}[kind]
            step = {"F": 1, "B": -1, "I": -1, "W": 0}[kind]
            if not step or not 0 <= stage + step <= last:
                continue
            users = "F" if kind == "F" else "BI"
            user = next(f"{stage + step}{k}{microbatch}" for k in users if any(
                f"{stage + step}{k}{microbatch}" in o for o in orders_))  # fmt: skip
            if ranks == 1:
                edges.append((name, user))
                continue
            message = f"message of {name}"
            lengths[message] = load.send_forward if step == 1 else load.send_backward
            edges += [(name, message), (message, user)]
            link = messages.setdefault((stage + step) % ranks, [])
            if link:
                edges.append((link[-1], message))
            link.append(message)
    ends = dict(lengths)
    moved = True
    while moved:
        moved = False
        for before, after in edges:
            if ends[before] + lengths[after] > ends[after]:
                ends[after], moved = ends[before] + lengths[after], True
    return ends


@settings(max_examples=150, deadline=None)
@given(loaded_pipelines())
def test_every_computation_ends_with_the_longest_path_to_it(case):
    loads, how = case
    timeline = simulate(loads, **how)
    orders_ = [timeline.order(r) for r in range(how["num_stages"])]
    ends = longest_paths(orders_, loads, how["num_stages"])
    assert {str(t.action): t.end for rank in timeline.ranks for t in rank} | {
        f"message of {h.action}": h.end for h in timeline.hops
    } == ends
    assert timeline.step_seconds == max(ends.values())
    busy = sum(t.end - t.start for rank in timeline.ranks for t in rank)
    assert timeline.bubble == pytest.approx(1 - busy / (how["num_stages"] * timeline.step_seconds), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(loaded_pipelines())
def test_peaks_are_the_most_that_lives_at_any_instant(case):
    loads, how = case
    timeline = simulate(loads, **how)
    ranks = how["num_stages"]
    spans = {"activations": [[] for _ in range(ranks)], "cache": [[] for _ in range(ranks)]}
    times = {str(t.action): t for rank in timeline.ranks for t in rank}
    arrivals = {(h.action.stage + 1, h.action.microbatch): h.end for h in timeline.hops if h.action.kind == "F"}
    for stage, load in enumerate(loads):
        for m in range(how["num_microbatches"]):
            forward = times[f"{stage}F{m}"]
            end = (times.get(f"{stage}W{m}") or times[f"{stage}B{m}"]).end
            spans["activations"][stage % ranks].append((forward.start, end, load.activation_bytes))
            spans["cache"][stage % ranks].append((forward.end, end, load.produced_bytes))
            if (stage, m) in arrivals:
                spans["cache"][stage % ranks].append((arrivals[stage, m], end, load.received_bytes))
    for kind, found in (("activations", timeline.peak_activation_bytes), ("cache", timeline.peak_cache_bytes)):
        for rank in range(ranks):
            moments = {
                (a + b) / 2 for a, b in itertools.pairwise(sorted({t for s in spans[kind][rank] for t in s[:2]}))
            }
            living = [sum(n for a, b, n in spans[kind][rank] if a < at < b) for at in moments]
            assert found[rank] == max(living, default=0)


def test_gpipe_keeps_all_microbatches_and_1f1b_as_many_as_stages_follow():
    load = StageLoad(1.0, 1.0, activation_bytes=1, received_bytes=1)
    assert even_step("GPipe", 4, 1, 8, load).peak_activation_bytes == (8, 8, 8, 8)
    assert even_step("1F1B", 4, 1, 8, load).peak_activation_bytes == (4, 3, 2, 1)
    # The first stage receives nothing; the others hold one more for a moment, that which has arrived early.
    assert even_step("GPipe", 4, 1, 8, load).peak_cache_bytes == (0, 8, 8, 8)


@pytest.mark.parametrize("schedule", MULTI)
def test_sixteen_ranks_and_64_microbatches_are_simulated_whole(schedule):
    for rank in even_step(schedule, 16, 2, 64).ranks:
        assert sum(timed.action.kind == "F" for timed in rank) == 2 * 64


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"schedule": "DualPipe"}, "is none of GPipe, 1F1B"),
        ({"schedule": "1F1B", "virtual_stages": 2}, "choose virtual_stages=1 or schedule='Interleaved1F1B'"),
        ({"schedule": "1F1B", "num_microbatches": 3}, "num_microbatches=3 is less than num_stages=4"),
        ({"num_microbatches": 9}, "choose num_microbatches=8 or 10"),
        ({"schedule": "InterleavedZeroBubble", "num_microbatches": 9}, "needs a multiple"),
        ({"num_stages": 0}, "num_stages must be at least 1; it is 0"),
        ({"num_microbatches": 0}, "num_microbatches must be at least 1; it is 0"),
    ],
)
def test_numbers_that_a_schedule_cannot_run_are_refused(wrong, words):
    how = {"schedule": "Interleaved1F1B", "num_stages": 4, "virtual_stages": 1, "num_microbatches": 8} | wrong
    with pytest.raises(PlanError, match=words):
        simulate([EVEN] * (how["num_stages"] * how["virtual_stages"]), **how)


def test_as_many_loads_as_virtual_stages_are_asked_for():
    with pytest.raises(PlanError, match="3 stage loads were given for num_stages=2 times virtual_stages=2: give 4"):
        simulate([EVEN] * 3, schedule="Interleaved1F1B", num_stages=2, virtual_stages=2, num_microbatches=4)


def test_the_table_at_internet_scale_is_written_with_what_it_depends_on(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pipeline_timeline

    output = tmp_path / "timeline.json"
    assert pipeline_timeline.main(["--microbatches", "16", "--tokens", "1024", "--output", str(output)]) == output
    content = json.loads(output.read_text())
    assert content.keys() >= {"date", "device_name", "torch", "python", "versions", "commit", "tokens", "device_speed"}
    assert len(content["plans"]) == 2 * 2 * 5
    assert len(content["starts"]) == 32
    value = 1024 * 7168 * 2
    for plan in content["plans"]:
        hops = {v: plan[f"{v}_bytes"] / 2 / value for v in ("naive", "cached", "exact")}
        if plan["variant"] in ("plain", "local, aligned"):
            assert hops == {"naive": 31, "cached": 31, "exact": 31}
        if plan["variant"] == "block":
            # The root, 7 completed blocks of 4 stages each, and 3 partial sums of each of 8 blocks.
            ranks = plan["num_stages"]
            ends = range(3, 28, 4)
            assert hops["naive"] == 31 + sum(31 - e for e in ends) + 24
            assert hops["exact"] == ranks - 1 + sum(min(ranks - 1, 31 - e) for e in ends) + 24
            assert hops["cached"] == ranks + sum(min(ranks, 31 - e) for e in ends) + 24
        assert 0 < plan["bubble"] < 1
    printed = capsys.readouterr().out
    assert "| P=16, V=2 | InterleavedZeroBubble | local, aligned |" in printed
