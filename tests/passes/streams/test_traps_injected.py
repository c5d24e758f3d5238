"""Addends from outside a stream, and the root added again (design section 4)."""

import attnres_fx as ax
from tests.support.stream_text import TWO_LAYERS, check_trap, found_text, rows, tokens, toy


def test_an_addend_from_outside_joins_the_stream_once_it_has_two_terms():
    def program(m, x, y):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        n = m.norm_2(h)
        h = h + m.positions(y)
        h = h + m.mlp_1(n)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: attn_1
          2: positions + mlp_1
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (tokens(), tokens()), expected)


def test_an_addend_between_two_reads_is_a_sublayer_of_its_own():
    def program(m, x, y):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        first = m.norm_2(h)
        h = m.positions(y) + h
        h = h + m.mlp_1(m.norm_3(h)) + m.mlp_2(first)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: attn_1
          2: positions
          3: mlp_1 + mlp_2
          norm_2 reads 1
          norm_3 reads 2
          norm_f reads 3
    """
    check_trap(program, (tokens(), tokens()), expected)


def test_an_addend_from_outside_on_the_root_makes_a_new_root():
    def program(m, x, y):
        h = m.embed(x)
        skipped = m.mlp_2(m.norm_3(h))
        h = h + m.positions(y)
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h)) + m.head(skipped)

    check_trap(program, (tokens(), tokens()), TWO_LAYERS.replace("embed", "add"))


def test_the_root_added_again_is_a_term():
    def program(m, x):
        first = m.embed(x)
        h = first + m.attn_1(m.norm_1(first))
        h = h + m.mlp_1(m.norm_2(h))
        h = h + first
        h = h + m.mlp_2(m.norm_3(h))
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: attn_1
          2: mlp_1 + embed
          3: mlp_2
          norm_2 reads 1
          norm_3 reads 2
          norm_f reads 3
    """
    check_trap(program, (tokens(),), expected)


def test_the_root_injected_again_from_the_first_layer_on_stays_one_stream():
    def program(m, x):
        h = x0 = m.embed(x)
        for norm, layer in ((m.norm_1, m.attn_1), (m.norm_2, m.mlp_1), (m.norm_3, m.attn_2)):
            h = m.carry[0] * h + m.carry[1] * x0
            h = h + layer(norm(h))
        return m.head(m.norm_f(h))

    model = toy(program)
    text = found_text(model, (tokens(),), "export")
    assert text.count("\nstream") == 0 and text.count("reads") == 3, text
    assert "norm_f reads 3" in text
    assert ax.verify(model, ax.convert(model, (tokens(),)), (tokens(),)).passed


def test_a_layer_that_reads_the_state_with_an_embedding_added_is_still_a_layer():
    def program(m, x, time):
        h = x
        for i in (1, 2, 3):
            h = h + getattr(m, f"attn_{i}")(getattr(m, f"norm_{i}")(h + time))
        return m.head(m.norm_f(h))

    report = ax.inspect(toy(program, 2), (rows(), rows(1)))
    assert [len(s.depth_reads) for s in report.streams] == [3]
