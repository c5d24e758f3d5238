"""Random residual programs: converted graphs against the brute-force definition, and against the program.

200 programs, or `make fuzz` for as many as one likes.
"""

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.support.brute_force import Interpreter, Setting
from tests.support.plain_programs import PlainProgram
from tests.support.post_norm_programs import PostNormProgram, post_norm_programs
from tests.support.program_checks import (
    SETTINGS,
    SHAPES,
    assert_same,
    captured,
    check_post_norm,
    check_program,
    run,
    shards,
    tolerance_of,
    tried,
)
from tests.support.residual_programs import Step, channel_programs, programs

shapes, captures, seeds = st.sampled_from(SHAPES), st.sampled_from(("symbolic", "export")), st.integers(0, 3)


def described(steps: tuple[Step, ...]) -> str:
    return "\n".join(f"s{i}: {step}" for i, step in enumerate(steps))


def check_steps(steps: tuple[Step, ...], capture: str, shape: Setting, seed: int, channels_first: bool = False) -> None:
    note(described(steps))
    program = PlainProgram(steps, seed, channels_first)
    check_program(program, captured(program, capture), shape)


@pytest.mark.parametrize("part", shards(100))
@pytest.mark.slow
def test_traced_programs_compute_the_definition(part):
    @tried(part, 100, steps=programs(), shape=shapes, seed=seeds)
    def check(steps, shape, seed):
        check_steps(steps, "symbolic", shape, seed)

    check()


@pytest.mark.parametrize("part", shards(20))
@pytest.mark.slow
def test_exported_programs_compute_the_definition(part):
    @tried(part, 20, steps=programs(assignments=True), shape=shapes, seed=seeds)
    def check(steps, shape, seed):
        check_steps(steps, "export", shape, seed)

    check()


@pytest.mark.parametrize("part", shards(10))
@pytest.mark.slow
def test_captured_programs_compute_the_definition(part):
    @tried(part, 10, steps=programs(assignments=True), shape=shapes, seed=seeds)
    def check(steps, shape, seed):
        check_steps(steps, "dynamo", shape, seed)

    check()


@pytest.mark.parametrize("part", shards(35))
@pytest.mark.slow
def test_programs_with_their_channels_first_compute_the_definition(part):
    @tried(part, 35, steps=channel_programs(), shape=shapes, seed=seeds)
    def check(steps, shape, seed):
        check_steps(steps, "symbolic", shape, seed, channels_first=True)

    check()


@pytest.mark.parametrize("part", shards(35))
@pytest.mark.slow
def test_post_norm_programs_compute_the_definition(part):
    @tried(part, 35, layers=post_norm_programs(), shape=shapes, capture=captures)
    def check(layers, shape, capture):
        program = PostNormProgram(layers)
        check_post_norm(program, captured(program, capture), shape)

    check()


@given(steps=programs(), seed=st.integers(0, 3))
@settings(SETTINGS, max_examples=50)
def test_the_brute_force_at_zero_queries_is_the_program(steps, seed):
    """The check of the checker: without notes the interpreter is the plain program."""
    program = PlainProgram(steps, seed)
    with torch.no_grad():
        assert_same(run(Interpreter(program).run), run(program), tolerance_of(program), described(steps))


@given(steps=channel_programs(), seed=st.integers(0, 3))
@settings(SETTINGS, max_examples=20)
def test_it_is_with_the_channels_first(steps, seed):
    program = PlainProgram(steps, seed, channels_first=True)
    with torch.no_grad():
        assert_same(run(Interpreter(program).run), run(program), tolerance_of(program), described(steps))


@pytest.mark.parametrize("capture", ["symbolic", "export"])
@pytest.mark.slow
def test_a_deep_program_of_every_step(capture):
    steps = (
        Step("start", 0, ("two embeddings",)),
        Step("write", 0, ("mlp", "h + v")),
        Step("write", 0, ("parallel", "(b+h)+a")),
        Step("factor", 0, ("half",)),
        Step("write", 0, ("raw", "add_")),
        Step("flat write", 0, ("scaled", "v + h")),
        Step("side", 0),
        Step("inject", 0),
        Step("write", 0, ("adapter", "sub")),
        Step("start", 1, ("from",), 0),
        Step("write", 1, ("cross", "sum"), 0),
        Step("move", 1, ("sequence first",)),
        Step("write", 1, ("mlp", "alpha")),
        Step("move", 1, ("all but the first token",)),
        Step("head", 1),
        Step("write", 0, ("in-place activation", "add_ then zero v")),
        Step("head", 0),
    )
    program = PlainProgram(steps, seed=0)
    source = captured(program, capture)
    for shape in SHAPES:
        check_program(program, source, shape)
