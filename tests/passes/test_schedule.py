"""Which source each read sees, against a simulation that writes sublayers one at a time."""

import pytest

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import ConfigError, ScheduleError
from attnres_fx.passes.schedule import plan_schedule
from tests.support.depth_simulation import cases, names, simulate, sublayers


@pytest.mark.parametrize("variant", ["full", "block", "local"])
def test_every_read_sees_what_writing_one_sublayer_at_a_time_leaves(variant):
    for _, sizes, schedule in cases(variant):
        expected, _ = simulate(variant, sizes)
        assert [names(schedule.sources(p)) for p in range(sum(sizes) + 1)] == expected, sizes


@pytest.mark.parametrize("variant", ["full", "block", "local"])
def test_a_cut_carries_what_the_simulation_keeps_there(variant):
    for _, sizes, schedule in cases(variant):
        _, expected = simulate(variant, sizes)
        assert [names(schedule.carried(p)) for p in range(sum(sizes) + 1)] == expected, sizes


@pytest.mark.parametrize("variant", ["block", "local"])
def test_blocks_have_the_sizes_asked_for(variant):
    for _, sizes, schedule in cases(variant):
        assert [len(block) for block in schedule.blocks] == sizes
        assert [i for block in schedule.blocks for i in block] == list(range(sum(sizes)))
        assert schedule.num_blocks == len(sizes)


def test_in_full_and_block_the_sources_of_a_read_hold_the_root_and_each_sublayer_once():
    for _, sizes, schedule in cases("full", "block"):
        for position in range(sum(sizes) + 1):
            first, *rest = schedule.sources(position)
            assert first.kind == "root" and sublayers(first) == []
            assert all(s.kind != "root" for s in rest)
            assert [i for s in rest for i in sublayers(s)] == list(range(position)), (sizes, position)


def test_in_local_the_first_source_stands_for_all_before_the_block_and_the_rest_are_its_sublayers():
    for _, sizes, schedule in cases("local"):
        for position in range(1, sum(sizes) + 1):
            first, *own = schedule.sources(position)
            assert [i for s in own for i in sublayers(s)] == list(range(schedule.starts[first.block], position))
            assert {(s.kind, s.block, len(sublayers(s))) for s in own} == {("sublayer", first.block, 1)}
            assert first.kind == ("root" if first.block == 0 else "summary")


def test_in_mode_sum_every_read_of_every_variant_is_the_plain_running_sum():
    for _, sizes, schedule in cases("full", "block", "local"):
        summaries, written = {}, [1000**i for i in range(1, sum(sizes) + 1)]
        for position in range(sum(sizes) + 1):
            value = 0
            for s in schedule.sources(position):
                known = {"root": 1, "summary": summaries.get(s.block)}
                value += known[s.kind] if s.kind in known else sum(written[i] for i in sublayers(s))
            assert value == 1 + sum(written[:position]), (sizes, position)
            if position in schedule.starts:
                summaries[schedule.starts.index(position)] = value


def test_reads_of_a_block_schedule_with_a_short_last_block():
    schedule = plan_schedule(5, AttnResConfig(block_size=2))
    assert [" ".join(names(schedule.sources(p))) for p in range(6)] == [
        "v_0",
        "v_0 b_1[:1]",
        "v_0 b_1",
        "v_0 b_1 b_2[:1]",
        "v_0 b_1 b_2",
        "v_0 b_1 b_2 b_3",
    ]


def test_reads_of_a_local_schedule_with_a_short_last_block():
    schedule = plan_schedule(5, AttnResConfig(variant="local", block_size=2))
    assert [" ".join(names(schedule.sources(p))) for p in range(6)] == [
        "v_0",
        "v_0 v_1",
        "v_0 v_1 v_2",
        "c_2 v_3",
        "c_2 v_3 v_4",
        "c_3 v_5",
    ]


def test_a_blocks_first_read_does_not_count_the_finished_block_twice():
    for _, sizes, schedule in cases("block"):
        for start in schedule.starts[1:]:
            sources = schedule.sources(start)
            assert [s.kind for s in sources] == ["root", *["block"] * schedule.starts.index(start)], sizes


@pytest.mark.parametrize("count", range(1, 15))
@pytest.mark.parametrize("options", [{"block_size": 1}, {"num_blocks": None}], ids=["block_size", "num_blocks"])
def test_one_sublayer_a_block_sees_the_same_sums_as_full(count, options):
    options = {name: value or count for name, value in options.items()}
    full = plan_schedule(count, AttnResConfig(variant="full"))
    block = plan_schedule(count, AttnResConfig(variant="block", **options))
    for position in range(count + 1):
        assert [(s.start, s.stop) for s in block.sources(position)] == [
            (s.start, s.stop) for s in full.sources(position)
        ]


@pytest.mark.parametrize("count", range(1, 15))
def test_local_with_one_block_is_full(count):
    full = plan_schedule(count, AttnResConfig(variant="full"))
    local = plan_schedule(count, AttnResConfig(variant="local", num_blocks=1))
    assert [names(local.sources(p)) for p in range(count + 1)] == [names(full.sources(p)) for p in range(count + 1)]


def test_num_blocks_gives_sizes_that_differ_by_at_most_one_with_the_longer_first():
    for count in range(1, 40):
        for blocks in range(1, count + 1):
            schedule = plan_schedule(count, AttnResConfig(num_blocks=blocks))
            sizes = [len(block) for block in schedule.blocks]
            assert len(sizes) == blocks and sum(sizes) == count
            assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize(("count", "size"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (64, 8), (100, 13)])
def test_without_options_a_block_has_an_eighth_of_the_sublayers(count, size):
    schedule = plan_schedule(count, AttnResConfig())
    assert schedule.starts == tuple(range(0, count, size))
    assert schedule.num_blocks <= 8


def test_block_of_is_the_block_a_sublayer_lies_in():
    for _, sizes, schedule in cases("full", "block", "local"):
        expected = [block for block, size in enumerate(sizes) for _ in range(size)]
        assert [schedule.block_of(i) for i in range(sum(sizes))] == expected
        assert [schedule.block_of_read(p) for p in range(sum(sizes) + 1)] == [0, *expected]


@pytest.mark.parametrize("variant", ["full", "block", "local"])
def test_sources_are_counted_without_making_them(variant):
    for _, sizes, schedule in cases(variant):
        positions = range(sum(sizes) + 1)
        assert [schedule.num_sources(p) for p in positions] == [len(schedule.sources(p)) for p in positions], sizes


@pytest.mark.parametrize("variant", ["full", "block", "local"])
def test_spans_say_source_by_source_what_cuts_carry(variant):
    for _, sizes, schedule in cases(variant):
        for cut in range(1, sum(sizes)):
            crossing = {s.source for s in schedule.spans if s.maker < cut <= s.last}
            assert crossing == set(schedule.carried(cut)), (sizes, cut)
        assert len({s.source for s in schedule.spans}) == len(schedule.spans), sizes


@pytest.mark.parametrize("variant", ["full", "block", "local"])
def test_a_block_ends_where_one_summary_is_all_that_crosses(variant):
    for _, sizes, schedule in cases(variant):
        for position in range(sum(sizes) + 1):
            summaries = [s for s in schedule.carried(position) if s.kind == "summary"]
            alone = position in schedule.starts[1:] and variant == "local"
            assert schedule.ends_block(position) == alone
            assert schedule.summary_at(position) == (summaries[0] if alone else None), (sizes, position)


def test_a_read_runs_where_its_sublayer_does_and_on_the_earlier_side_at_a_local_blocks_end_and_at_the_last():
    readers = {
        variant: [plan_schedule(4, AttnResConfig(variant=variant, **options)).reader_of(p) for p in range(5)]
        for variant, options in {"full": {}, "block": {"block_size": 2}, "local": {"block_size": 2}}.items()
    }
    assert readers == {"full": [0, 1, 2, 3, 3], "block": [0, 1, 2, 3, 3], "local": [0, 1, 1, 3, 3]}


def test_full_over_two_hundred_sublayers_has_l_plus_one_sources_at_each_read():
    schedule = plan_schedule(200, AttnResConfig(variant="full"))
    assert sum(schedule.num_sources(p) for p in range(1, 201)) == 200 * 203 // 2 == 20_300


def test_schedules_of_equal_options_are_equal_and_their_sources_are_shared_values():
    one, two = (plan_schedule(12, AttnResConfig(block_size=4)) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != plan_schedule(12, AttnResConfig(block_size=3))
    assert set(one.sources(8)) & set(two.sources(9)) == set(one.sources(8))


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("variant", ["full", "block", "local"])
def test_a_stream_without_sublayers_is_refused(variant, count):
    with pytest.raises(ScheduleError, match=f"at least one sublayer; this one has {count}"):
        plan_schedule(count, AttnResConfig(variant=variant))


@pytest.mark.parametrize("variant", ["block", "local"])
def test_more_blocks_than_sublayers_are_refused_with_the_range_to_choose_from(variant):
    with pytest.raises(ScheduleError, match=r"num_blocks=7 .*6 sublayers.*between 1 and 6"):
        plan_schedule(6, AttnResConfig(variant=variant, num_blocks=7))


@pytest.mark.parametrize("boundaries", [(6,), (2, 6), (7,), (1, 2, 100)])
def test_boundaries_past_the_last_sublayer_are_refused(boundaries):
    with pytest.raises(ScheduleError, match=r"boundaries=.*6 sublayers.*between 1 and 5"):
        plan_schedule(6, AttnResConfig(boundaries=boundaries))


@pytest.mark.parametrize("position", [-1, 7])
@pytest.mark.parametrize("variant", ["full", "block", "local"])
def test_positions_that_do_not_exist_are_refused(variant, position):
    schedule = plan_schedule(6, AttnResConfig(variant=variant))
    for question in (schedule.sources, schedule.carried):
        with pytest.raises(ScheduleError, match=f"read position {position} does not exist"):
            question(position)


@pytest.mark.parametrize("position", [-1, 7])
def test_no_block_has_a_read_at_a_position_that_does_not_exist(position):
    with pytest.raises(ScheduleError, match="does not exist"):
        plan_schedule(6, AttnResConfig()).block_of_read(position)


@pytest.mark.parametrize("sublayer", [-1, 6])
def test_sublayers_that_do_not_exist_are_refused(sublayer):
    schedule = plan_schedule(6, AttnResConfig())
    with pytest.raises(ScheduleError, match=f"sublayer {sublayer} does not exist: there are 6"):
        schedule.block_of(sublayer)


def test_schedule_errors_are_config_errors():
    assert issubclass(ScheduleError, ConfigError)
