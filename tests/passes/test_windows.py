"""Windows of a read: which of its sources it sees, and what a cut carries for it, against a simulation."""

from collections.abc import Iterator

import pytest

from attnres_fx import AttnResConfig
from attnres_fx.passes.schedule import DepthSchedule, plan_schedule
from tests.support.depth_simulation import Reads, cases, names, simulate

WINDOWS = [(1, True), (2, True), (2, False), (3, False), (5, True)]


def windowed(variant: str, window: int, keeps_root: bool) -> Iterator[tuple[Reads, DepthSchedule]]:
    """What every read sees of the sources of a simulation, and the schedule of the same window."""
    for _, sizes, plain in cases(variant, longest=9):
        expected = []
        for every in simulate(variant, sizes)[0]:
            newest = every[max(len(every) - window, 0) :]
            expected.append(["v_0", *newest] if keeps_root and "v_0" not in newest else newest)
        options = {"window": window, "window_keeps_root": keeps_root, "output": "mean"}
        blocks = {} if variant == "full" else {"boundaries": plain.starts[1:]}
        yield expected, plan_schedule(sum(sizes), AttnResConfig(variant=variant, **blocks, **options))


@pytest.mark.parametrize("variant", ["full", "block"])
@pytest.mark.parametrize(("window", "keeps_root"), WINDOWS)
def test_a_windowed_read_sees_the_newest_of_its_sources_and_the_root_if_it_is_kept(variant, window, keeps_root):
    for expected, schedule in windowed(variant, window, keeps_root):
        positions = range(schedule.num_sublayers + 1)
        assert [names(schedule.sources(p)) for p in positions] == expected
        assert [schedule.num_sources(p) for p in positions] == [len(e) for e in expected]


@pytest.mark.parametrize("variant", ["full", "block"])
@pytest.mark.parametrize(("window", "keeps_root"), WINDOWS)
def test_a_cut_carries_what_a_later_windowed_read_sees_or_builds_on(variant, window, keeps_root):
    for _, schedule in windowed(variant, window, keeps_root):
        for cut in range(1, schedule.num_sublayers):
            needed = set()
            for position in range(cut, schedule.num_sublayers + 1):
                for source in schedule.sources(position):
                    if source.stop <= cut:
                        needed.add((source.start, source.stop))
                    elif source.start < cut:  # of a sum that goes on, what it has so far
                        needed.add((source.start, cut))
            assert {(s.start, s.stop) for s in schedule.carried(cut)} == needed
            assert {s.source for s in schedule.spans if s.maker < cut <= s.last} == set(schedule.carried(cut))
