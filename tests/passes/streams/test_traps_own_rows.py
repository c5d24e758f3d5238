"""A root that is prepared by its own rows, weighed: no sublayer, so nothing reads it over depth."""

import pytest
import torch
from torch.nn import functional as F

import attnres_fx as ax
from tests.support.stream_text import TWO_LAYERS, check_trap, tokens, toy

GATES = {
    "a number a row": lambda m, x: torch.sigmoid(m.mlp_4(x)[..., :1]),
    "a number a feature": lambda m, x: torch.tanh(m.mlp_4(m.norm_4(x))),
    "of a few features": lambda m, x: torch.sigmoid(F.linear(x[..., :4], m.mlp_4.weight[:1, :4])),
}


def smeared_by_cat(x, gate):
    return torch.cat([x[:, :1], x[:, 1:] + gate[:, 1:] * x[:, :-1]], 1)


def smeared_by_padding(x, gate):
    return x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))


def smeared_by_roll(x, gate):
    return x + gate * torch.roll(x, 1, 1)


def mixed_with_the_row_before(x, gate):
    before = F.pad(x, (0, 0, 1, -1))
    return x + gate * (before - x)


def lerped_with_the_row_before(x, gate):
    return torch.lerp(x, F.pad(x, (0, 0, 1, -1)), gate)


def of_two_rows_before(x, gate):
    return x + gate * torch.roll(x, 1, 1) + gate * torch.roll(x, 2, 1)


def layers(m, h):
    h = h + m.attn_1(m.norm_1(h))
    h = h + m.mlp_1(m.norm_2(h))
    return m.head(m.norm_f(h))


SMEARS = (
    smeared_by_cat,
    smeared_by_padding,
    smeared_by_roll,
    mixed_with_the_row_before,
    lerped_with_the_row_before,
    of_two_rows_before,
)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("smear", SMEARS, ids=lambda f: f.__name__)
def test_a_gated_smear_before_the_first_layer_is_part_of_the_root(smear, gate):
    def program(m, x):
        x = m.embed(x)
        return layers(m, smear(x, GATES[gate](m, x)))

    assert [r.name for r in reads_of(program)] == ["norm_2", "norm_f"]


def test_the_root_is_the_smeared_sum():
    def program(m, x):
        x = m.embed(x)
        return layers(m, smeared_by_padding(x, GATES["a number a row"](m, x)))

    check_trap(program, (tokens(),), TWO_LAYERS.replace("embed", "add"))


def test_the_root_that_later_layers_take_in_again_is_the_smeared_one():
    def program(m, x):
        x = m.embed(x)
        h = x = smeared_by_cat(x, GATES["of a few features"](m, x))
        h = h + m.attn_1(m.norm_1(h))
        h = 0.9 * h + 0.1 * x
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    assert [r.name for r in reads_of(program)] == ["norm_2", "norm_f"]


def test_rows_that_were_projected_are_a_sublayer():
    def program(m, x):
        x = m.embed(x)
        return layers(m, x + m.attn_4(torch.roll(x, 1, 1)))

    expected = """
        stream stream from embed
          1: attn_4
          2: attn_1
          3: mlp_1
          norm_1 reads 1
          norm_2 reads 2
          norm_f reads 3
    """
    check_trap(program, (tokens(),), expected)


def test_a_smear_that_is_not_read_by_itself_is_a_term_of_the_first_sublayer():
    def program(m, x):
        h = m.embed(x)
        h = h + torch.sigmoid(m.mlp_4(h)) * torch.roll(h, 1, 1) + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: mul + attn_1
          2: mlp_1
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (tokens(),), expected)


def test_a_model_whose_every_layer_weighs_its_rows_keeps_them_all():
    def program(m, x):
        h = m.embed(x)
        for gate in (m.mlp_1, m.mlp_2, m.mlp_3):
            h = h + torch.sigmoid(gate(h)) * torch.roll(h, 1, 1)
        return m.head(m.norm_f(h))

    assert [r.position for r in reads_of(program)] == [1, 2, 3]


def reads_of(program):
    (stream,) = ax.inspect(toy(program), (tokens(),)).streams
    return stream.depth_reads
