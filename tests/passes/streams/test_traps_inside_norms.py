"""A norm that is written out takes in one state, whatever it multiplies or takes off first."""

import pytest
import torch
from torch.nn import functional as F

from attnres_fx.passes import analyze_
from tests.support.stream_text import SPELLINGS, TWO_LAYERS, captured, check_trap, tokens, toy


def gain_first(x, gain, bias):
    return gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def gain_first_divided(x, gain, bias):
    return (x * (1 + gain)) / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def gain_first_after_a_cast(x, gain, bias):
    wide = x.double()
    return ((gain * wide) * (wide * wide).mean(-1, keepdim=True).add(1e-6).rsqrt()).to(x.dtype)


def gain_first_and_a_bias(x, gain, bias):
    return torch.addcmul(bias, gain * x, torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def bias_for_the_variance(x, gain, bias):
    return x * ((x - bias).pow(2).mean(-1, keepdim=True) ** -0.5) * gain.mean().exp()


def scaled_for_the_variance(x, gain, bias):
    return x * (0.25 * x).pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * gain


def gain_first_and_centred(x, gain, bias):
    return (gain * x - (gain * x).mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)


NORMS = (
    gain_first,
    gain_first_divided,
    gain_first_after_a_cast,
    gain_first_and_a_bias,
    bias_for_the_variance,
    scaled_for_the_variance,
    gain_first_and_centred,
)


@pytest.mark.parametrize(
    "norm",
    NORMS,
    ids=lambda f: f.__name__,
)
def test_a_norm_that_is_written_out_reads_once(norm):
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(norm(h, m.carry, m.norm_1.bias))
        h = h + m.mlp_1(norm(h, m.carry, m.norm_2.bias))
        return m.head(norm(h, m.carry, m.norm_f.bias))

    expected = TWO_LAYERS.replace("norm_2", "stream.read_1").replace("norm_f", "stream.read_2")
    check_trap(program, (tokens(),), expected)


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8)], ids=str)
def test_a_gain_that_norms_share_is_carried_by_no_gate(shape):
    def program(m, x):
        gain = m.carry.view(shape)
        h = m.embed(x)
        h = h + m.attn_1(gain_first_and_centred(h, gain, None))
        h = h + m.mlp_1(gain_first_and_centred(h, gain, None))
        return m.head(gain_first_and_centred(h, gain, None))

    assert analyze_(captured(toy(program), (tokens(),), "symbolic")).refusals == ()


def test_a_factor_that_a_branch_reads_as_well_is_a_read_of_its_own():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        scaled = m.carry * h
        h = h + m.mlp_1(scaled * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)) + m.mlp_2(scaled)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: attn_1
          2: mlp_1 + mlp_2
          stream.read_1 reads 1
          stream.read_1#2 reads 1
          norm_f reads 2
    """
    check_trap(program, (tokens(),), expected)


UNIT_LENGTH = {
    "functional": lambda x: F.normalize(x, dim=-1),
    "divided by its norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "divided by a norm of linalg": lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12),
}


@pytest.mark.parametrize("norm", UNIT_LENGTH.values(), ids=UNIT_LENGTH.keys())
def test_a_stream_that_is_brought_to_length_one_after_every_sum_is_one_post_norm_stream(norm):
    """As nGPT has it: a step from the state towards what a layer makes of it, and back to the sphere."""

    def program(m, x):
        h = m.embed(x)
        for layer in (m.attn_1, m.mlp_1, m.attn_2):
            h = norm(h + m.carry * (norm(layer(h)) - h))
        return m.head(h)

    for spelling in SPELLINGS:
        (stream,) = analyze_(captured(toy(program), (tokens(),), spelling)).streams
        assert stream.post_norm, spelling
        assert [r.position for r in stream.depth_reads] == [1, 2, 3], spelling
