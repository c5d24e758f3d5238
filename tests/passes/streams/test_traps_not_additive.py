"""Streams that are not additive are refused by name (design section 4)."""

import pytest
import torch

import attnres_fx as ax
from attnres_fx.errors import NotAdditiveError
from tests.support.stream_text import (
    tokens,
    toy,
)


def highway(m, x):
    h = m.embed(x)
    for norm, mlp, gate in ((m.norm_1, m.mlp_1, m.attn_1), (m.norm_2, m.mlp_2, m.attn_2)):
        g = torch.sigmoid(gate(h))
        h = g * h + (1 - g) * mlp(norm(h))
    return m.head(m.norm_f(h))


def gated_carry(m, x):
    h = m.embed(x)
    for norm, mlp, gate in ((m.norm_1, m.mlp_1, m.attn_1), (m.norm_2, m.mlp_2, m.attn_2)):
        h = torch.sigmoid(gate(h)) * h + mlp(norm(h))
    return m.head(m.norm_f(h))


def hyper_connections(m, x):
    streams = m.embed(x).unsqueeze(2).expand(-1, -1, 4, -1)
    for norm, mlp, mix in ((m.norm_1, m.mlp_1, m.attn_1), (m.norm_2, m.mlp_2, m.attn_2)):
        weights = torch.tanh(mix(streams.mean(2)))[..., :4]
        out = mlp(norm((weights.unsqueeze(-1) * streams).sum(2)))
        streams = torch.einsum(
            "btij,btjd->btid", torch.softmax(weights, -1).unsqueeze(-1).expand(-1, -1, -1, 4), streams
        )
        streams = streams + weights.unsqueeze(-1) * out.unsqueeze(2)
    return m.head(m.norm_f(streams.sum(2)))


@pytest.mark.parametrize("program", [highway, gated_carry, hyper_connections])
def test_a_stream_that_is_not_additive_is_refused_by_name(program):
    model = toy(program)
    with pytest.raises((ax.errors.NotAdditiveError, ax.errors.NoStreamError)) as raised:
        ax.convert(model, (tokens(),), config=ax.AttnResConfig(variant="full"))
    assert isinstance(raised.value, ax.errors.NotAdditiveError)


GATED = {
    "lerp": lambda h, f, g: torch.lerp(h, f, g),
    "moved towards the branch": lambda h, f, g: h + g * (f - h),
    "highway": lambda h, f, g: h * (1 - g) + f * g,
}


@pytest.mark.parametrize("how", GATED)
def test_a_carry_gated_by_the_stream_is_refused_however_it_is_spelled(how):
    def program(m, x):
        h = m.embed(x)
        for i in (1, 2, 3):
            h = GATED[how](h, getattr(m, f"attn_{i}")(getattr(m, f"norm_{i}")(h)), torch.sigmoid(m.mlp_1(h)))
        return m.head(m.norm_f(h))

    with pytest.raises(NotAdditiveError, match="gated carry"):
        ax.convert(toy(program), (tokens(),))


def test_a_gate_inside_a_sublayer_is_no_remark():
    def program(m, x):
        h = m.embed(x)
        for i in (1, 2):
            n = getattr(m, f"norm_{i}")(h)
            weights = torch.sigmoid(m.mlp_1(n))
            h = h + (weights * n + (1 - weights) * getattr(m, f"attn_{i}")(n))
        return m.head(m.norm_f(h))

    converted = ax.convert(toy(program), (tokens(),))
    assert len(converted.attnres.reads) == 2
    assert not converted.report.refusals


def test_naming_a_stream_goes_past_what_is_refused_elsewhere():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.attn_2(m.norm_2(h))
        g = m.positions(x)
        for _ in range(2):
            g = torch.lerp(g, m.attn_3(m.norm_3(g)), torch.sigmoid(m.mlp_1(g)))
        return m.head(m.norm_f(h)), g

    with pytest.raises(NotAdditiveError):
        ax.convert(toy(program), (tokens(),))
    name = ax.inspect(toy(program), (tokens(),)).streams[0].name
    assert len(ax.convert(toy(program), (tokens(),), config=ax.AttnResConfig(streams=[name])).attnres.reads) == 2


def test_where_a_stream_is_cut_by_something_that_is_no_sum_the_report_says_so():
    def program(m, x):
        h = m.embed(x)
        h = (h + m.attn_1(m.norm_1(h))).clamp(-9, 9)
        h = h + m.attn_2(m.norm_2(h))
        return m.head(m.norm_f(h))

    text = " ".join(str(ax.convert(toy(program), (tokens(),)).report).split())
    assert "interrupted: " in text and "'clamp' is no sum" in text and "do not reach what was written before" in text
