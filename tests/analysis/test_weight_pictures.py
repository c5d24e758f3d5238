"""Depth weights in text, HTML and figures: what they show is what was weighed, at 6 layers and at 96."""

import csv
import json
import math
import sys
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.text import Text

import attnres_fx as ax
from attnres_fx.analysis.depth_weights import DepthWeights
from attnres_fx.analysis.read_weights import ReadWeights
from attnres_fx.errors import ArgumentError, MissingPackageError


def read(position, weights=None, name=None, stream="model.layers"):
    weights = torch.full((position + 1,), 1 / (position + 1)) if weights is None else torch.tensor(weights)
    back = tuple(float(position - i) for i in range(position + 1))
    return ReadWeights(
        name or f"model.layers.{position // 2}.norm_{position % 2}",
        stream,
        tuple(f"v_{i}" for i in range(position + 1)),
        weights,
        back,
    )


def local(layers, jumps=()):
    """Reads that weigh what is near most, but for those that jump to a source."""
    reads = []
    for position in range(1, 2 * layers + 1):
        weights = torch.tensor([0.7 ** (position - i) for i in range(position + 1)])
        for at, source in jumps:
            if at == position:
                weights[source] = 3.0
        reads.append(read(position, (weights / weights.sum()).tolist()))
    return DepthWeights(tuple(reads))


def test_entropy_reach_and_locality_are_those_of_the_definition():
    one = read(3, [0.5, 0.25, 0.125, 0.125])
    assert one.entropy == pytest.approx(-sum(w * math.log(w) for w in (0.5, 0.25, 0.125, 0.125)))
    assert one.reach == pytest.approx(3 * 0.5 + 2 * 0.25 + 1 * 0.125) and one.newest == 0.125
    assert one.jump == 0 and read(3).jump is None and read(3, [0.1, 0.1, 0.7, 0.1]).jump is None
    assert json.loads(json.dumps(DepthWeights((one,)).to_dict()))["reads"][0]["weights"] == [0.5, 0.25, 0.125, 0.125]


def test_entropy_per_token_is_averaged_over_tokens():
    tokens = torch.tensor([[1.0, 0.5], [0.0, 0.5]])
    one = ReadWeights("r", "s", ("v_0", "v_1"), tokens, (1.0, 0.0))
    assert one.entropy == pytest.approx(math.log(2) / 2) and one.mean() == [0.75, 0.25]


def test_the_map_of_96_layers_fits_a_screen_and_shows_where_each_read_looks():
    lines = str(local(96, jumps=[(100, 16)])).splitlines()
    assert max(map(len, lines)) <= 120 and len(lines) == 2 + 2 + 192
    assert "one shade for 4 sources" in lines[0]
    row = next(line for line in lines if "layers.50.norm_0" in line)
    begin = lines[2].index("v_0")
    strip = row[begin : begin + 49]
    assert strip.index("█") == 16 // 4 and strip.index(".") == 100 // 4 + 1
    assert "v_16" in row
    for position, line in enumerate(lines[4:], start=1):
        if position != 100:
            assert line[begin : begin + 49].index("█") >= (position - 3) // 4, "the near is darkest in its own row"


def test_streams_have_maps_of_their_own():
    both = DepthWeights((read(1, stream="encoder", name="a"), read(1, stream="decoder", name="b")))
    assert [line for line in str(both).splitlines() if line in ("encoder", "decoder")] == ["encoder", "decoder"]


class Cells(HTMLParser):
    """The titles of the cells of each row; tags close in order."""

    def __init__(self):
        super().__init__()
        self.rows, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "i":
            self.rows[-1].append(dict(attrs).get("title", ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("layers", [6, 96])
def test_the_html_has_a_cell_for_every_source_with_its_weight_and_closes_its_tags(layers):
    weights = local(layers)
    cells = Cells()
    html = weights._repr_html_()
    cells.feed(html)
    assert not cells.open and "<script" not in html and "http" not in html and len(html) < 500_000
    head, *rows = cells.rows
    assert len(rows) == 2 * layers and not head
    each = -(-(2 * layers + 1) // 80)
    first = rows[0][0].split()
    assert first == [weights.reads[0].sources[1 if each > 1 else 0], f"{weights.reads[0].mean()[each > 1]:.3f}"]
    assert {len(r) for r in rows} == {-(-(2 * layers + 1) // each)}


@pytest.mark.parametrize("scale", ["row", "log", "linear"])
@pytest.mark.parametrize("layers", [6, 24, 96])
def test_no_label_of_the_figure_lies_on_another_and_none_is_smaller_than_7_points(tmp_path, monkeypatch, layers, scale):
    written = {}

    def write(text, renderer, plain=Text.draw):
        if text.get_text() and text.get_visible():
            written[text] = text.get_window_extent(renderer)
        return plain(text, renderer)

    monkeypatch.setattr(Text, "draw", write)
    local(layers, jumps=[(9, 1)]).plot(tmp_path / "weights.png", scale=scale)
    assert (tmp_path / "weights.png").stat().st_size > 10_000
    boxes = [(t.get_text(), t.get_fontsize(), box) for t, box in written.items()]
    for i, (text, points, box) in enumerate(boxes):
        assert points >= 7, text
        for other, _, beside in boxes[i + 1 :]:
            apart = box.x1 <= beside.x0 or beside.x1 <= box.x0 or box.y1 <= beside.y0 or beside.y1 <= box.y0
            assert apart, f"{text!r} lies on {other!r}"


def test_the_figure_marks_long_jumps_and_the_weights_of_a_row_are_scaled_by_the_largest():
    figure = local(6, jumps=[(9, 1), (11, 0)]).plot()
    heat = figure.axes[0]
    (marks,) = (line for line in heat.lines if line.get_label() == "long jump")
    assert {(x, y) for x, y in marks.get_xydata().tolist() if y > 3} == {(1, 8), (0, 10)}
    shown = heat.images[0].get_array()
    assert shown.max(axis=1).tolist() == pytest.approx([1.0] * 12)


def test_a_picture_without_matplotlib_names_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'attnres-fx\[plot\]'"):
        local(2).plot()


def test_what_cannot_be_drawn_is_refused_by_name(tmp_path):
    with pytest.raises(ArgumentError, match="scale must be"):
        local(2).plot(scale="sqrt")
    with pytest.raises(ArgumentError, match="cannot be drawn"):
        local(2).plot(tmp_path / "a.nothing")


def test_a_csv_file_gets_a_line_for_each_weight_of_each_step(tmp_path):
    weights, path = local(2), tmp_path / "weights.csv"
    ax.log_depth_weights(weights, 10, path)
    ax.log_depth_weights(weights, 20, path)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 2 * sum(len(r.sources) for r in weights)
    assert {r["step"] for r in rows} == {"10", "20"}
    found = [float(r["weight"]) for r in rows if r["read"] == weights.reads[3].name and r["step"] == "20"]
    assert found == pytest.approx(weights.reads[3].mean(), rel=1e-5)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ArgumentError, match="has the columns"):
        ax.log_depth_weights(weights, 30, path)


def test_a_summary_writer_gets_numbers_for_each_read_and_a_picture_for_each_stream():
    class Writer:
        def __init__(self):
            self.scalars, self.images = {}, {}

        def add_scalar(self, tag, scalar_value, global_step=None):
            self.scalars[tag, global_step] = scalar_value

        def add_image(self, tag, img_tensor, global_step=None):
            self.images[tag, global_step] = img_tensor

    writer, weights = Writer(), local(2)
    ax.log_depth_weights(weights, 5, writer)
    one = weights.reads[-1]
    assert writer.scalars[f"depth_reach/model.layers/{one.name}", 5] == one.reach
    assert len(writer.scalars) == 3 * len(weights)
    (image,) = writer.images.values()
    assert image.shape[0] == 3 and image.min() >= 0 and image.max() <= 1
    with pytest.raises(ArgumentError, match="SummaryWriter"):
        ax.log_depth_weights(weights, 5, 3)
