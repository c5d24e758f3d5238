"""One description of a report is its text, its HTML and its `repr`."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.report_page import ReportPage, Shown


class Cells(HTMLParser):
    """The cells of the table of a page, row by row, and the tags that are open at its end."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.open, self.paragraphs = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        elif self.open and self.open[-1] == "p":
            self.paragraphs.append(data)


class Report(Shown):
    def _page(self):
        rows = [{"name": "a<b", "count": 3}, {"name": "c", "count": 40}]
        return ReportPage(("two rows",), rows, ("", "note: x & y"))


def test_a_page_says_the_same_as_text_and_as_html():
    report = Report()
    assert str(report) == "two rows\n\nname  count\n----  -----\na<b       3\nc        40\n\nnote: x & y"
    html = Cells(report._repr_html_())
    assert html.rows == [["name", "count"], ["a<b", "3"], ["c", "40"]]
    assert html.paragraphs == ["two rows", "note: x & y"] and not html.open
    assert repr(report) == "<Report two rows; print it to see all>"


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.mix(self.norm(x))


@pytest.mark.slow
def test_every_report_has_a_short_repr_and_shows_its_table_in_a_notebook():
    model, x = nn.Sequential(Layer(), Layer(), nn.LayerNorm(4)), torch.randn(2, 4)
    converted = ax.convert(model, (x,))
    attached = nn.Sequential(Layer(), nn.LayerNorm(4))
    ax.attach(attached, (x,))
    plan = ax.plan(model, (x,), num_stages=2, num_microbatches=2)
    for report in (
        ax.inspect(model, (x,)),
        converted.report,
        ax.verify(model, converted, (x,)),
        ax.explain(attached),
        plan,
    ):
        assert len(repr(report)) < 200 and "\n" not in repr(report)
        assert not Cells(report._repr_html_()).open
        assert str(report).startswith(repr(report).split(" ", 1)[1].removesuffix("; print it to see all>"))
    assert "assumed of a rank: 400 TFLOP/s, 3 TB/s of memory, 50 GB/s of links, 10 us a message" in str(plan)
    assert len(Cells(plan._repr_html_()).rows) == 1 + 2
