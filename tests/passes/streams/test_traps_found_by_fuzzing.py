"""Small programs that random ones were reduced to: rows, indices and branches in forms that ended a stream."""

import pytest

from tests.support.plain_programs import PlainProgram
from tests.support.post_norm_programs import Layer, PostNormProgram
from tests.support.program_checks import SHAPES, captured, check_post_norm, check_program
from tests.support.residual_programs import Step

FULL = SHAPES[0]
LAYER = Step("write", 0, ("mlp", "h + v"))


def check(*steps, capture="symbolic"):
    program = PlainProgram((Step("start", 0, ("embed",)), *steps, Step("head", 0)), seed=0)
    check_program(program, captured(program, capture), FULL)


@pytest.mark.parametrize("capture", ["symbolic", "export", "dynamo"])
def test_rows_are_replaced_by_rows_of_a_whole_branch_in_the_first_layer(capture):
    check(Step("rows", 0, ("mlp", "cat in the place")), LAYER, capture=capture)


def test_rows_are_replaced_by_rows_of_a_branch_that_is_a_sum():
    check(LAYER, Step("rows", 0, ("adapter", "cat in the place")), LAYER)


@pytest.mark.parametrize("write", ["index_copy", "index_add", "index_put"])
def test_the_index_of_rows_may_be_taken_twice(write):
    check(LAYER, Step("rows", 0, ("mlp", write)))


@pytest.mark.parametrize("capture", ["symbolic", "export", "dynamo"])
def test_a_sum_inside_a_post_norm_branch_is_not_what_is_normed(capture):
    program = PostNormProgram((Layer("mlp", "x + f"), Layer("adapter", "f + x"), Layer("mlp", "x + f")))
    check_post_norm(program, captured(program, capture), FULL)


def test_the_root_comes_back_after_a_sum_beside_the_stream_was_read():
    beside = Step("side", 0), Step("move", 0, ("roll",)), Step("positions", 0)
    check(Step("remember", 0), *beside, Step("recall", 0, ("h + e",), 1), Step("recall", 0, ("h + e",), 1))


def test_an_earlier_state_is_mixed_in_by_lerp_from_the_later_one():
    check(Step("side", 0), Step("remember", 0), Step("positions", 0), Step("recall", 0, ("lerp",), 2))
