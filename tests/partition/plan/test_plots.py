"""Pictures of plans: what they show is what was simulated, and no text lies on another."""

import json
import sys

import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import PlanError
from attnres_fx.partition import StreamCost
from attnres_fx.partition.costs.stage_loads import StageLoad
from attnres_fx.partition.plan.plot_stage_map import StageMap, draw_stage_map
from attnres_fx.partition.plan.plot_style import BAR, BLOCK_COLOURS, COLOURS
from attnres_fx.partition.plan.plot_timeline import draw_timeline
from attnres_fx.partition.plan.plots import draw_plan
from attnres_fx.partition.plan.trace import trace_events, write_trace
from attnres_fx.partition.simulate.timeline import simulate
from attnres_fx.passes.schedule import plan_schedule


def plan(schedule="Interleaved1F1B", ranks=4, rounds=2, microbatches=8, per_stage=3, blocks=(5, 10, 15, 20), last=0):
    """`last`: sublayers that the last stage has more than the others."""
    load = StageLoad(1.0, 1.0, 1.0, send_forward=0.25, send_backward=0.25)
    how = {"num_stages": ranks, "virtual_stages": rounds, "num_microbatches": microbatches}
    timeline = simulate([load] * (ranks * rounds), schedule=schedule, **how)
    starts = range(0, per_stage * ranks * rounds, per_stage)
    count = per_stage * ranks * rounds + last
    config = AttnResConfig(boundaries=[b for b in blocks if b < count])
    stage_map = StageMap((StreamCost("main", 0, count, 1),), {"main": plan_schedule(count, config)}, starts, ranks)
    return timeline, stage_map


def drawn(draw, what):
    figure = Figure(figsize=(14, 4), layout="constrained")
    axes = figure.subplots()
    draw(what, axes)
    return axes


def rectangles(axes, colour):
    """(left, top, right, bottom) of the filled bars of a colour."""
    found = []
    for bars in axes.collections:
        if isinstance(bars, PolyCollection) and not isinstance(bars, LineCollection):
            for i, path in enumerate(bars.get_paths()):
                faces = bars.get_facecolor()
                if tuple(faces[i % len(faces)][:3]) == pytest.approx(colour):
                    box = path.get_extents()
                    found.append((box.x0, box.y0, box.x1, box.y1))
    return found


def test_bars_stand_where_computations_do_and_lines_where_hops_do():
    timeline, _ = plan("InterleavedZeroBubble", rounds=1)
    axes = drawn(draw_timeline, timeline)
    for kind in "FIW":
        expected = {
            (t.start, rank, t.end) for rank, ts in enumerate(timeline.ranks) for t in ts if t.action.kind == kind
        }
        bars = rectangles(axes, to_rgb(COLOURS[kind]))
        assert {(x0, (y0 + y1) / 2, x1) for x0, y0, x1, y1 in bars} == expected
    (lines,) = (c for c in axes.collections if isinstance(c, LineCollection))
    ends = {(seg[0][0], round(seg[0][1]), seg[1][0], round(seg[1][1])) for seg in lines.get_segments()}
    assert ends == {(h.start, h.source_rank, h.end, h.target_rank) for h in timeline.hops}
    assert [t.get_text() for t in axes.texts].count("7") == 3 * 4
    assert f"bubble {timeline.bubble:.1%}" in axes.get_title(loc="left")


def test_numbers_that_do_not_fit_are_left_out():
    timeline, _ = plan(microbatches=64)
    assert not drawn(draw_timeline, timeline).texts


def test_the_map_shows_blocks_that_span_stages():
    _, stage_map = plan()
    axes = drawn(draw_stage_map, stage_map)
    assert "5 blocks, 5 of them across stages" in axes.get_title(loc="left")
    styles = {line.get_xdata()[0]: line.get_linestyle() for line in axes.lines}
    assert styles == {n: "-" if n == 15 else "--" for n in range(3, 24, 3)}
    # Stage 1, in the row of rank 1, holds the end of the first block and the beginning of the second.
    row = [p for p in axes.patches if p.get_fill() and p.get_y() == 1 - BAR / 2]
    pieces = {(p.get_x(), p.get_width()): p.get_facecolor()[:3] for p in row if p.get_x() < 12}
    assert pieces == {
        (3, 2): to_rgb(BLOCK_COLOURS[0]),
        (5, 1): to_rgb(BLOCK_COLOURS[1]),
    }
    assert [t.get_text() for t in axes.texts].count("b_3") == 1


def test_maps_without_blocks_say_so():
    _, stage_map = plan()
    full = {"main": plan_schedule(24, AttnResConfig(variant="full"))}
    for schedules in (None, full):
        bare = StageMap(stage_map.streams, schedules, stage_map.starts, 4)
        assert "no blocks" in drawn(draw_stage_map, bare).get_title(loc="left")


@pytest.mark.parametrize(
    "shape",
    [
        {"schedule": "1F1B", "rounds": 1},
        {"schedule": "InterleavedZeroBubble"},
        {"ranks": 8, "rounds": 4, "microbatches": 16, "blocks": (24, 48, 72)},
        {"ranks": 16, "microbatches": 64, "per_stage": 1, "blocks": (2, 4, 9)},
        {"schedule": "1F1B", "rounds": 1, "per_stage": 1, "last": 190},
        {"rounds": 3, "microbatches": 12, "per_stage": 1, "last": 180, "blocks": (48, 96, 144)},
    ],
)
def test_no_text_lies_on_another_nor_outside(tmp_path, monkeypatch, shape):
    written = {}

    def write(text, renderer, plain=Text.draw):
        if text.get_text() and text.get_visible():
            written[text] = text.get_window_extent(renderer), text.get_figure().bbox.frozen()
        return plain(text, renderer)

    monkeypatch.setattr(Text, "draw", write)
    draw_plan(*plan(**shape), tmp_path / "plan.png")
    boxes = [(text.get_text(), *found) for text, found in written.items()]
    for i, (text, box, page) in enumerate(boxes):
        inside = box.x0 >= -1 and box.x1 <= page.x1 + 1 and box.y0 >= -1 and box.y1 <= page.y1 + 1
        assert inside, f"{text!r} is cut off"
        for other, beside, _ in boxes[i + 1 :]:
            apart = box.x1 <= beside.x0 or beside.x1 <= box.x0 or box.y1 <= beside.y0 or beside.y1 <= box.y0
            assert apart, f"{text!r} lies on {other!r}"


def test_paths_get_pictures(tmp_path):
    timeline, stage_map = plan(microbatches=4)
    draw_plan(timeline, stage_map, tmp_path / "plan.png")
    draw_plan(timeline, stage_map, str(tmp_path / "named.png"))
    for name in ("plan", "named"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_command_to_install_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlanError, match=r"pip install 'attnres-fx\[plot\]'"):
        draw_plan(*plan(microbatches=4), tmp_path / "plan.png")


def test_a_trace_has_every_computation_and_message_where_the_timeline_has_it(tmp_path):
    timeline, _ = plan(microbatches=4)
    write_trace(timeline, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    found = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    ran = {(e["name"], e["tid"], e["ts"], e["ts"] + e["dur"]) for e in found if e["pid"] == 0}
    assert ran == {(str(t.action), r, t.start * 1e6, t.end * 1e6) for r, ts in enumerate(timeline.ranks) for t in ts}
    sent = sorted((e["ts"], e["ts"] + e["dur"]) for e in found if e["pid"] == 1)
    assert sent == sorted((h.start * 1e6, h.end * 1e6) for h in timeline.hops)


def test_every_arrow_of_a_trace_begins_and_ends_inside_a_bar(tmp_path):
    timeline, _ = plan("InterleavedZeroBubble", microbatches=4)
    events = trace_events(timeline)["traceEvents"]
    bars = [e for e in events if e["ph"] == "X"]
    arrows = [e for e in events if e["ph"] in "stf"]
    assert len(arrows) == 3 * len(timeline.hops) > 0
    for arrow in arrows:
        where = arrow["pid"], arrow["tid"]
        own = [b for b in bars if (b["pid"], b["tid"]) == where]
        assert any(b["ts"] <= arrow["ts"] < b["ts"] + b["dur"] for b in own), arrow
