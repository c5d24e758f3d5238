"""What crosses the cuts of a pipeline, against the variants' definitions and against walks of sets."""

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import PlanError
from attnres_fx.partition import CarriedValue, StreamCost
from attnres_fx.partition.costs.traffic import count_traffic, size, stage_values
from attnres_fx.partition.split.routes import StageValue, route_values
from attnres_fx.passes.schedule import plan_schedule
from tests.support.set_walks import maker_of, needs_of_reads, walk


def block_traffic(num_stages, virtual_stages, blocks_per_stage, *, root):
    """A block model whose stages hold so many whole blocks each, of two sublayers, values of one byte."""
    count = 2 * blocks_per_stage * num_stages * virtual_stages
    schedules = {"main": plan_schedule(count, AttnResConfig(block_size=2))}
    starts = range(0, count, 2 * blocks_per_stage)
    values = stage_values([StreamCost("main", 0, count, 1)], schedules, starts)
    kept = [v for v in values if root or v.label != "v_0"]
    return count_traffic(kept, num_stages=num_stages, virtual_stages=virtual_stages)


@pytest.mark.parametrize("ranks", range(2, 10))
@pytest.mark.parametrize("rounds", range(1, 6))
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_three_counts_are_the_closed_forms(ranks, rounds, blocks):
    chunks = ranks * rounds
    traffic = block_traffic(ranks, rounds, blocks, root=False)
    assert sum(traffic.naive.forward) == blocks * chunks * (chunks - 1) // 2
    assert sum(traffic.cached.forward) == blocks * (ranks * (ranks - 1) // 2 + (rounds - 1) * ranks**2)
    assert sum(traffic.exact.forward) == blocks * (ranks * (ranks - 1) // 2 + (rounds - 1) * ranks * (ranks - 1))
    assert traffic.exact.backward == traffic.exact.forward
    assert traffic.naive.peak == blocks * (chunks - 1)
    assert traffic.cached.peak == blocks * min(ranks, chunks - 1)
    assert traffic.exact.peak == blocks * (ranks - 1)


def test_four_ranks_of_two_stages_are_the_figures_known():
    traffic = block_traffic(4, 2, 1, root=False)
    assert [sum(c.forward) for c in (traffic.naive, traffic.cached, traffic.exact)] == [28, 22, 18]
    rooted = block_traffic(4, 2, 1, root=True)
    assert [sum(c.forward) for c in (rooted.naive, rooted.cached, rooted.exact)] == [35, 26, 21]


def label_of(thing, variant, blocks):
    if thing == "root":
        return "v_0"
    if isinstance(thing, tuple):
        return f"c_{thing[1] + 1}"
    if variant != "block":
        return f"v_{max(thing) + 1}"
    n, whole = next((n, b) for n, b in enumerate(blocks) if min(thing) in b)
    return f"b_{n + 1}" if len(thing) == len(whole) else f"b_{n + 1}[:{len(thing)}]"


@st.composite
def cut_streams(draw):
    """Up to two streams of up to 12 sublayers, their blocks, and cuts anywhere."""
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=2))
    variant = draw(st.sampled_from(["full", "block", "local"]))
    streams, schedules, at = [], {}, 0
    for name, count in zip(("encoder", "decoder"), counts, strict=False):
        cuts = draw(st.sets(st.integers(1, count - 1))) if count > 1 else set()
        config = AttnResConfig(variant=variant, boundaries=sorted(cuts) if variant != "full" else None)
        streams.append(StreamCost(name, at, count, draw(st.integers(1, 9))))
        schedules[name] = plan_schedule(count, config)
        at += count
    starts = (0, *sorted(draw(st.sets(st.integers(1, at - 1))) if at > 1 else set()))
    return variant, streams, schedules, starts


@settings(max_examples=300, deadline=None)
@given(cut_streams())
def test_a_stage_takes_what_its_reads_need_and_it_does_not_make(case):
    variant, streams, schedules, starts = case

    def stage(sublayer):
        return sum(s <= sublayer for s in starts) - 1

    expected = set()
    for stream in streams:
        blocks = schedules[stream.name].blocks
        takers = {}
        for i, things in enumerate(needs_of_reads(variant, blocks)):
            for thing in things:
                made = stage(stream.first + maker_of(thing, blocks))
                if stage(stream.first + i) != made:
                    takers.setdefault((thing, made), set()).add(stage(stream.first + i))
        for (thing, made), used in takers.items():
            label = label_of(thing, variant, blocks)
            expected.add((f"{stream.name}:{label}", made, tuple(sorted(used)), stream.value_bytes, label))
    found = stage_values(streams, schedules, starts)
    assert {(v.name, v.produced, v.used, v.bytes, v.label) for v in found} == expected
    assert len({v.name for v in found}) == len(found)


@st.composite
def routed_values(draw):
    ranks, rounds = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    values = []
    for i in range(draw(st.integers(0, 6)) if ranks * rounds > 1 else 0):
        made = draw(st.integers(0, ranks * rounds - 2))
        used = tuple(sorted(draw(st.sets(st.integers(made + 1, ranks * rounds - 1), min_size=1))))
        values.append(StageValue(f"x{i}", made, used, 10**i, draw(st.booleans())))
    return ranks, rounds, values


@settings(max_examples=300, deadline=None)
@given(routed_values())
def test_hops_carry_what_a_walk_with_sets_carries(case):
    ranks, rounds, values = case
    traffic = count_traffic(values, num_stages=ranks, virtual_stages=rounds)
    by_name = {v.name: v for v in values}
    counts = {
        "exact": walk(values, ranks, rounds, seen_at_start=True, forget=False),
        "cached": walk(values, ranks, rounds, seen_at_start=False, forget=False),
        "naive": walk(values, ranks, rounds, seen_at_start=False, forget=True),
    }
    for name, (crossing, _) in counts.items():
        count = getattr(traffic, name)
        assert [set(names) for names in count.values] == crossing
        assert list(count.forward) == [sum(by_name[n].bytes for n in hop) for hop in crossing]
        assert list(count.backward) == [
            sum(by_name[n].bytes for n in hop if by_name[n].differentiable) for hop in crossing
        ]
    held = counts["exact"][1]
    assert list(traffic.cache_bytes) == [sum(by_name[n].bytes for n in rank) for rank in held]
    for cache, count in ((True, traffic.exact), (False, traffic.naive)):
        routes = route_values(values, num_stages=ranks, virtual_stages=rounds, cache=cache)
        assert tuple(r.sent for r in routes[:-1]) == count.values


@settings(max_examples=60, deadline=None)
@given(routed_values())
def test_no_choice_of_hops_is_shorter_than_the_exact_one(case):
    ranks, rounds, values = case
    stages = min(ranks * rounds, 9)
    values = [v for v in values[:2] if max(v.used) < stages]
    assume(values)
    for v in values:
        traffic = count_traffic([v], num_stages=ranks, virtual_stages=rounds)
        fewest = min(
            len(hops)
            for n in range(stages)
            for hops in itertools.combinations(range(stages - 1), n)
            if reaches(v, set(hops), ranks, stages)
        )
        assert sum(map(len, traffic.exact.values)) == fewest


def reaches(value, hops, ranks, stages):
    """Whether every stage that uses a value has it when it crosses these hops alone."""
    has = set()
    for stage in range(stages):
        if stage == value.produced:
            has.add(stage % ranks)
        if stage in value.used and stage % ranks not in has:
            return False
        if stage in hops:
            if stage % ranks not in has:
                return False
            has.add((stage + 1) % ranks)
    return True


def test_a_partial_sum_is_a_new_value_at_every_cut_its_block_spans():
    schedules = {"main": plan_schedule(8, AttnResConfig(boundaries=[6]))}
    values = stage_values([StreamCost("main", 0, 8, 5)], schedules, (0, 2, 3, 7))
    assert [(v.label, v.produced, v.used) for v in values] == [
        ("v_0", 0, (1, 2, 3)),
        ("b_1[:2]", 0, (1,)),
        ("b_1[:3]", 1, (2,)),
        ("b_1", 2, (3,)),
        ("b_2[:1]", 2, (3,)),
    ]


def test_the_plain_residual_sends_one_state_over_every_hop():
    values = stage_values([StreamCost("main", 0, 8, 5)], None, (0, 2, 3, 7))
    assert [(v.name, v.produced, v.used) for v in values] == [
        ("main:h[:2]", 0, (1,)),
        ("main:h[:3]", 1, (2,)),
        ("main:h[:7]", 2, (3,)),
    ]
    assert count_traffic(values, num_stages=2, virtual_stages=2).exact.forward == (5, 5, 5)


def test_aligned_local_blocks_send_one_summary_over_every_hop():
    schedules = {"main": plan_schedule(8, AttnResConfig(variant="local", block_size=2))}
    values = stage_values([StreamCost("main", 0, 8, 5)], schedules, (0, 2, 4, 6))
    assert [(v.label, v.produced, v.used) for v in values] == [("c_2", 0, (1,)), ("c_3", 1, (2,)), ("c_4", 2, (3,))]


def test_an_encoders_output_travels_and_the_decoder_begins_with_its_own_root():
    streams = [StreamCost("encoder", 0, 4, 3), StreamCost("decoder", 4, 4, 7)]
    schedules = {s.name: plan_schedule(4, AttnResConfig(block_size=2)) for s in streams}
    carried = [CarriedValue("memory", 11, 3, (5, 7)), CarriedValue("mask", 1, 0, (1, 2, 6), differentiable=False)]
    values = stage_values(streams, schedules, (0, 2, 4, 6), carried=carried)
    assert [(v.name, v.produced, v.used, v.bytes, v.differentiable) for v in values] == [
        ("encoder:v_0", 0, (1,), 3, True),
        ("encoder:b_1", 0, (1,), 3, True),
        ("decoder:v_0", 2, (3,), 7, True),
        ("decoder:b_1", 2, (3,), 7, True),
        ("memory", 1, (2, 3), 11, True),
        ("mask", 0, (1, 3), 1, False),
    ]
    traffic = count_traffic(values, num_stages=2, virtual_stages=2)
    assert traffic.naive.forward == (3 + 3 + 1, 11 + 1, 7 + 7 + 11 + 1)
    assert traffic.naive.backward == (6, 11, 25)
    # The last hop's receiver, rank 1, made the memory and has had the mask.
    assert traffic.exact.forward == (7, 11, 14)
    assert traffic.cache_bytes == (6 + 1 + 14 + 11, 7 + 11 + 14)
    # Rank 1 receives over the first and the last hop, and the gradients of the second; rank 0 the rest.
    assert traffic.exact.backward == (6, 11, 14)
    assert traffic.receive_buffer_bytes(10) == (10 * (11 + 6 + 14), 10 * (7 + 14 + 11))
    assert traffic.receive_buffer_bytes(1, cache=False) == (12 + 6 + 25, 7 + 26 + 11)


def test_on_one_rank_nothing_travels():
    traffic = block_traffic(1, 4, 1, root=True)
    assert traffic.naive.total == traffic.cached.total == traffic.exact.total == 0
    assert traffic.exact.peak == 0
    assert traffic.cache_bytes == (4,)


def test_a_thousand_sublayers_of_full_are_routed_in_seconds():
    schedules = {"main": plan_schedule(1000, AttnResConfig(variant="full"))}
    values = stage_values([StreamCost("main", 0, 1000, 1)], schedules, [15 * i for i in range(64)])
    assert len(values) == 1 + 15 * 63
    assert count_traffic(values, num_stages=8, virtual_stages=8).naive.peak == 1 + 15 * 63


def test_the_table_names_hops_ranks_and_values():
    text = block_traffic(2, 2, 1, root=True).table()
    assert [line.split("  ")[-1].strip() for line in text.splitlines()[2:]] == ["v_0, b_1", "b_2", "b_3", "4 B", "2 B"]
    assert "1 → 2     1 → 0" in text
    full = {"main": plan_schedule(40, AttnResConfig(variant="full"))}
    values = stage_values([StreamCost("main", 0, 40, 10**9)], full, (0, 20))
    assert "v_0, v_1 … v_20 (21 values)" in count_traffic(values, num_stages=2).table()


def test_sizes_have_three_digits():
    assert [size(n) for n in (0, 999, 1_000, 117_440_512, 1.5e9, 2e12)] == [
        "0 B", "999 B", "1 kB", "117 MB", "1.5 GB", "2 TB",
    ]  # fmt: skip


@pytest.mark.parametrize("starts", [(), (1, 2), (0, 2, 2), (0, 3, 2), (0, 8)])
def test_empty_stages_are_refused(starts):
    with pytest.raises(PlanError, match="so that no stage is empty"):
        stage_values([StreamCost("main", 0, 8, 5)], None, starts)


def test_a_schedule_of_another_length_is_refused():
    for schedules, words in (({}, "there is none"), ({"main": plan_schedule(7, AttnResConfig())}, "it is of 7")):
        with pytest.raises(PlanError, match=words):
            stage_values([StreamCost("main", 0, 8, 5)], schedules, (0, 4))
