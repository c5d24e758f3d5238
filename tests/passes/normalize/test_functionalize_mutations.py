"""Mutations become values: the graph before and after, metadata and function kept, nothing done twice."""

import pytest

from attnres_fx.passes import (
    functionalize_mutations_pass,
)
from tests.support.pass_checks import (
    check_idle,
    check_metadata,
    check_pass,
    exported,
    graph_text,
    symbolic,
)
from tests.support.stream_text import assert_near, dedented, rows


def test_writes_become_values_and_views_are_made_again():
    def program(x):
        h = x * 2.0
        flat = h.view(-1)
        h.add_(1.0)
        return flat + 1.0, h

    gm = symbolic(program, rows())
    functionalize_mutations_pass(gm)
    assert graph_text(gm) == dedented("""
        mul = mul(x, 2.0)
        view = view(mul, -1)
        add_1 = add(mul, 1.0)
        view_1 = view(add_1, -1)
        add = add(view_1, 1.0)
        return [add, add_1]
    """)


def test_a_write_to_picked_rows_goes_to_a_copy_and_an_input_gets_its_value_last():
    def program(x):
        x[1].zero_()
        return x + 1.0

    gm = symbolic(program, rows())
    functionalize_mutations_pass(gm)
    assert graph_text(gm) == dedented("""
        getitem = getitem(x, 1)
        clone = clone(x)
        getitem_1 = getitem(clone, 1)
        zero__1 = zero_(getitem_1)
        add = add(clone, 1.0)
        copy_ = copy_(x, clone)
        return add
    """)


def inner_writes(m, x):
    h = m.attn_1(x)
    first = h[:, 0]
    h.add_(m.mlp_1(x))
    h[:, 1].mul_(2.0)
    return h * 1.0, first


def writes_to_the_input(m, x):
    x.add_(m.attn_1(x))
    return m.head(x)


@pytest.mark.parametrize("program", [inner_writes, writes_to_the_input])
def test_functionalizing_keeps_function_and_metadata(program):
    new = check_pass(functionalize_mutations_pass, exported(program, rows()), [rows()])
    check_metadata([n for n in new if "copy_" not in n.name], "inner")


def test_functionalizing_is_done_once():
    def program(x):
        h = x * 2.0
        h.add_(1.0).relu_()
        return h, h.view(-1)

    gm = symbolic(program, rows())
    assert functionalize_mutations_pass(gm).removed == ("add_", "relu_")
    check_idle(functionalize_mutations_pass, gm)


def test_functionalizing_twice_still_computes_the_same():
    gm = exported(inner_writes, rows())
    expected = gm(rows())
    functionalize_mutations_pass(gm)
    functionalize_mutations_pass(gm)
    gm.graph.lint()
    gm.recompile()
    for x, y in zip(gm(rows()), expected, strict=True):
        assert_near(x, y, 1e-6)
