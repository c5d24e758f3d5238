"""What counts as a read of a state (design sections 3 and 4)."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from tests.support.stream_text import TWO_LAYERS, check_trap, found_text, tokens, toy


def test_a_norm_and_a_branch_without_one_both_read():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(h)
        h = h + m.mlp_1(h).tanh()
        return m.head(h)

    expected = """
        stream stream from embed
          1: attn_1
          2: tanh
          mlp_1 reads 1
          head reads 2
    """
    check_trap(program, (tokens(),), expected)


def test_the_graphs_output_is_a_read():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        return h + m.mlp_1(m.norm_2(h))

    check_trap(program, (tokens(),), TWO_LAYERS.replace("norm_f", "output"))


def test_a_state_with_many_consumers_is_one_read():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h)) * m.mlp_2(m.norm_3(h)).sigmoid() * m.attn_2(h)
        return m.head(m.norm_f(h)), m.head(m.norm_4(h))

    check_trap(program, (tokens(),), TWO_LAYERS.replace("2: mlp_1", "2: mul"))


def test_hidden_states_that_are_returned_are_reads_of_the_same_states():
    def program(m, x):
        h = m.embed(x)
        states = (h,)
        h = h + m.attn_1(m.norm_1(h))
        states = (*states, h)
        h = h + m.mlp_1(m.norm_2(h))
        states = (*states, h)
        return m.head(m.norm_f(h)), states

    check_trap(program, (tokens(),), TWO_LAYERS)


def test_a_state_that_only_the_output_wants_is_a_read():
    def program(m, x):
        h = m.embed(x)
        n = m.norm_1(h)
        h = h + m.attn_1(n)
        middle = h
        h = h + m.mlp_1(n)
        end = h
        h = h + m.mlp_2(m.norm_2(h))
        return m.head(m.norm_f(h)), [middle, end, h]

    expected = """
        stream stream from embed
          1: attn_1
          2: mlp_1
          3: mlp_2
          output reads 1
          norm_2 reads 2
          norm_f reads 3
    """
    check_trap(program, (tokens(),), expected)


def test_reads_by_the_output_alone_are_numbered():
    def program(m, x):
        h = m.embed(x)
        n = m.norm_1(h)
        first = h + m.attn_1(n)
        second = first + m.mlp_1(n)
        return first, second

    expected = """
        stream stream from embed
          1: attn_1
          2: mlp_1
          output reads 1
          output#2 reads 2
    """
    check_trap(program, (tokens(),), expected)


def test_an_auxiliary_head_is_a_read():
    def program(m, x):
        h = m.embed(x)
        n = m.norm_1(h)
        h = h + m.attn_1(n)
        auxiliary = m.head(m.norm_3(h))
        h = h + m.mlp_1(n)
        return m.head(m.norm_f(h)), auxiliary

    check_trap(program, (tokens(),), TWO_LAYERS.replace("norm_2", "norm_3"))


def test_a_late_consumer_reads_the_state_it_was_given():
    def program(m, x):
        h = m.embed(x)
        first = h + m.attn_1(m.norm_1(h))
        second = first + m.mlp_1(m.norm_2(first))
        return m.head(m.norm_f(second)) + m.head(m.norm_3(first)) + m.head(m.norm_4(h))

    check_trap(program, (tokens(),), TWO_LAYERS)


# --- a read that is no prefix ------------------------------------------------------------------------
def test_a_read_of_the_state_plus_a_term_the_stream_does_not_keep():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        t = m.attn_2(m.norm_2(h))
        h = h + m.mlp_1(m.norm_3(h + t))
        h = h + m.mlp_2(m.norm_4(h))
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: attn_1
          2: mlp_1
          3: mlp_2
          norm_2 reads 1
          norm_3 reads 1 and attn_2
          norm_4 reads 2
          norm_f reads 3
    """
    check_trap(program, (tokens(),), expected)


def test_a_read_of_the_root_plus_a_term_the_stream_does_not_keep():
    def program(m, x):
        h = m.embed(x)
        t = m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h + t))
        h = h + m.mlp_2(m.norm_3(h))
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: mlp_1
          2: mlp_2
          norm_2 reads 0 and attn_1
          norm_3 reads 1
          norm_f reads 2
    """
    check_trap(program, (tokens(),), expected)


def test_the_term_a_side_read_saw_may_join_the_stream_later():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        t = m.attn_2(m.norm_2(h))
        u = m.mlp_1(m.norm_3(h + t))
        h = h + u + t
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: attn_1
          2: mlp_1 + attn_2
          norm_2 reads 1
          norm_3 reads 1 and attn_2
          norm_f reads 2
    """
    model = toy(program)
    for spelling in ("symbolic", "export", "dynamo"):
        lines = [line for line in found_text(model, (tokens(),), spelling).splitlines() if "reads" in line]
        wanted = [line.strip() for line in expected.splitlines() if "reads" in line]
        assert [line.strip() for line in lines] == wanted
    check_trap(program, (tokens(),), found_text(model, (tokens(),), "symbolic"), spellings=("symbolic",))


# --- dropout on the state ----------------------------------------------------------------------------
class Dropped(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.toy = toy(lambda m, x: x)
        self.dropout = nn.Dropout(p)
        self.eval()

    def forward(self, x):
        m = self.toy
        h = m.embed(x)
        h = self.dropout(h + m.attn_1(m.norm_1(h)))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))


@pytest.mark.parametrize("spelling", ["symbolic", "export"])
def test_dropout_on_the_state_is_a_read_even_when_it_is_not_active(spelling):
    expected = """\
stream stream from toy.embed
  1: toy.attn_1
  dropout reads 1
stream toy from dropout
  1: toy.mlp_1
  toy.norm_f reads 1"""
    assert found_text(Dropped(0.1), (tokens(),), spelling) == expected


def test_dropout_with_probability_zero_is_no_read():
    expected = """
        stream toy from toy.embed
          1: toy.attn_1
          2: toy.mlp_1
          toy.norm_2 reads 1
          toy.norm_f reads 2
    """
    check_trap(None, (tokens(),), expected, model=Dropped(0.0), spellings=("symbolic", "export"))


def test_dropout_on_the_branch_belongs_to_the_term():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.toy = toy(lambda m, x: x)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            m = self.toy
            h = m.embed(x)
            h = h + self.dropout(m.attn_1(m.norm_1(h)))
            h = h + self.dropout(m.mlp_1(m.norm_2(h)))
            return m.head(m.norm_f(h))

    converted = ax.convert(Model().train(), (tokens(),), config=ax.AttnResConfig(variant="full"))
    assert converted.attnres.reads.names == ("toy.norm_2", "toy.norm_f")
    converted.eval()
    model = Model().eval()
    model.load_state_dict(dict(converted.state_dict()), strict=False)
    torch.testing.assert_close(converted(tokens()), model(tokens()))
