"""What ends a stream is in the report, with its place, and what only follows a stream is not (design section 4)."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.passes import analyze_
from tests.support.stream_text import captured, tokens, toy


def two_halves(between):
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        h = between(m, h)
        h = h + m.attn_2(m.norm_3(h))
        h = h + m.mlp_2(m.norm_4(h))
        return m.head(m.norm_f(h))

    return program


def pooled(m, h):
    scores = m.positions.weight[:4] @ m.attn_3(h).transpose(-1, -2)
    return scores.softmax(-1) @ h


def rms(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


ENDS = {
    "clamp": (lambda m, h: h.clamp(-5, 5), "clamp"),
    "far from the next sum": (lambda m, h: (h.clamp(-5, 5) * 2.0).transpose(0, 1).tanh(), "clamp"),
    "a layer without a residual": (lambda m, h: m.mlp_3(m.attn_3(h).relu()), "inear"),
    "attention pooling": (pooled, "matmul"),
    "a maximum over tokens": (lambda m, h: h.amax(1, keepdim=True), "amax"),
    "a running sum": (lambda m, h: h.cumsum(1), "cumsum"),
    "sorted rows": (lambda m, h: torch.sort(h, 1)[0], "sort"),
    "a norm that is carried on": (lambda m, h: m.norm_4(h), "layer_norm"),
    "a written norm that is carried on": (lambda m, h: rms(h), "mul"),
}
BEGINNINGS = {
    "a head": lambda m, h: m.mlp_3(m.norm_4(h)),
    "a head behind a written norm": lambda m, h: m.mlp_3(rms(h)),
    "a decoder that embeds its own": lambda m, h: m.positions(torch.arange(5)) * 1.0,
}


def interruptions(model, args, spelling):
    return [r for r in analyze_(captured(model, args, spelling)).refusals if r.kind == "interrupted"]


@pytest.mark.parametrize("spelling", ["symbolic", "export", "dynamo"])
def test_one_sublayer_that_only_makes_the_root_of_a_stream_is_in_the_report(spelling):
    def program(m, x):
        h = m.embed(x)
        h = m.norm_4(h + m.attn_1(m.norm_1(h)))
        h = h + m.mlp_1(m.norm_2(h))
        h = h + m.attn_2(m.norm_3(h))
        return m.head(m.norm_f(h))

    found = analyze_(captured(toy(program), (tokens(),), spelling))
    (stream,) = found.streams
    (refusal,) = found.refusals
    assert [r.position for r in stream.depth_reads] == [1, 2]
    assert refusal.kind == "interrupted" and f"part of the root of {stream.name!r}" in refusal.reason


@pytest.mark.parametrize("end", ENDS)
def test_what_ends_a_stream_is_named(end):
    between, called = ENDS[end]
    for spelling in ("symbolic", "export", "dynamo"):
        (refusal,) = interruptions(toy(two_halves(between)), (tokens(),), spelling)
        assert f"{called}' is no sum" in refusal.reason, spelling
        assert spelling != "dynamo" or "test_traps_ends.py:" in refusal.place


@pytest.mark.parametrize("spelling", ["symbolic", "export", "dynamo"])
def test_a_stream_that_ends_after_its_first_sublayer_is_named_too(spelling):
    def program(m, x):
        h = m.embed(x)
        h = (h + m.attn_1(m.norm_1(h))).clamp(-5, 5)
        h = h + m.attn_2(m.norm_3(h))
        h = h + m.mlp_2(m.norm_4(h))
        return m.head(m.norm_f(h))

    found = analyze_(captured(toy(program), (tokens(),), spelling))
    assert [len(s.depth_reads) for s in found.streams] == [1, 2]
    assert ["clamp" in r.reason for r in found.refusals if r.kind == "interrupted"] == [True]


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_stream_that_begins_behind_another_is_not_called_interrupted(beginning):
    for spelling in ("symbolic", "export"):
        assert interruptions(toy(two_halves(BEGINNINGS[beginning])), (tokens(),), spelling) == []


class Branching(nn.Module):
    """A stream that goes through one of two bodies."""

    def __init__(self):
        super().__init__()
        self.toy = toy(lambda m, x: x)

    def forward(self, x):
        def either(m, h):
            return torch.cond(h.sum() > 0, lambda v: v + 1.0, lambda v: v - 1.0, (h,))

        return two_halves(either)(self.toy, x)


def test_a_stream_through_a_conditional_is_named():
    for spelling in ("export", "dynamo"):
        (refusal,) = interruptions(Branching(), (tokens(),), spelling)
        assert "'cond' is no sum" in refusal.reason
        assert spelling != "dynamo" or "test_traps_ends.py:" in refusal.place


def test_a_stream_inside_a_sublayer_of_the_next_is_not_what_goes_on():
    def program(m, x):
        e = m.embed(x)
        e = e + m.attn_1(m.norm_1(e))
        e = e + m.mlp_1(m.norm_2(e))
        d = m.positions(x)
        for cross, adapter in ((m.attn_2, m.mlp_2), (m.attn_3, m.mlp_3)):
            y = m.norm_3(d) * cross(e)
            d = d + (y + adapter(y))
        return m.head(m.norm_f(d))

    assert interruptions(toy(program), (tokens(),), "export") == []


def test_two_streams_that_are_joined_both_end_in_the_report():
    """Text and image tokens in layers of their own, then layers over both: the single blocks behind double ones."""

    def program(m, x):
        a, b = m.embed(x), m.positions(x)
        a = a + m.attn_1(m.norm_1(a))
        b = b + m.attn_2(m.norm_2(b))
        h = torch.cat([a, b], 1)
        h = h + m.attn_3(m.norm_3(h))
        h = h + m.mlp_3(m.norm_4(h))
        return m.head(m.norm_f(h))

    report = ax.inspect(toy(program), (tokens(),))
    (refusal,) = report.refusals
    assert refusal.kind == "interrupted"
    first, second, joined = (s.name for s in report.streams)
    assert f"{first!r} and {second!r} end here and {joined!r} begins, because 'cat'" in refusal.reason
