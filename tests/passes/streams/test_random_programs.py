"""Random residual programs: converted graphs against the brute-force definition, and against the program."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

import attnres_fx as ax
from attnres_fx.passes import propagate_values_
from tests.support.brute_force import Interpreter, Setting, notes_of, read_parameters, run_brute_force
from tests.support.brute_force_states import Notes
from tests.support.residual_programs import PlainProgram, Step, example, programs

SETTINGS = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False)
SHAPES = tuple(
    Setting(variant, output, **blocks)
    for output in ("sum", "mean")
    for variant, blocks in (
        ("full", {}),
        ("block", {"block_size": 2}),
        ("block", {"num_blocks": 2}),
        ("block", {"num_blocks": 1}),
        ("local", {"block_size": 2}),
        ("local", {"num_blocks": 2}),
        ("local", {"block_size": 1}),
    )
)


def config_of(setting: Setting) -> ax.AttnResConfig:
    return ax.AttnResConfig(
        variant=setting.variant,
        output=setting.output,
        num_blocks=setting.num_blocks,
        block_size=setting.block_size,
    )


def fitting(setting: Setting, notes: Notes) -> Setting:
    """The setting, with no more blocks than the shortest stream has sublayers."""
    shortest = min(notes.sublayers(s) for s in notes.lengths)
    if setting.num_blocks is None or setting.num_blocks <= shortest:
        return setting
    return dataclasses.replace(setting, num_blocks=shortest)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float, where: str) -> None:
    assert len(actual) == len(expected), where
    for i, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert left.shape == right.shape, f"{where}: output {i} has shape {tuple(left.shape)}"
        assert left.dtype == right.dtype, f"{where}: output {i} is {left.dtype}"
        difference = (left - right).abs().max().item()
        assert difference <= tolerance * right.abs().max().item(), f"{where}: output {i} differs by {difference:.3g}"


def captured(program: PlainProgram, capture: str) -> GraphModule | ExportedProgram:
    if capture == "export":
        return torch.export.export(program, (example(),))
    gm = torch.fx.symbolic_trace(program)
    propagate_values_(gm, (example(),))
    return gm


@torch.no_grad()
def check_program(program: PlainProgram, source: GraphModule | ExportedProgram, shape: Setting) -> None:
    x = example()
    notes = notes_of(program, x.clone())
    setting = fitting(shape, notes)
    expected = program(x.clone())
    converted = ax.convert(source, (x.clone(),), config=config_of(setting), check=False)
    assert sorted(converted.attnres.reads.names) == sorted(notes.named().values())
    if setting.output == "sum":
        assert_same(converted(x.clone()), expected, 1e-9, "zero queries")
    for read in converted.attnres.reads:
        query, key_weight = read_parameters(read.name)
        read.query.copy_(query)
        read.key_weight.copy_(key_weight)
    wanted = run_brute_force(program, x.clone(), setting, notes)
    assert_same(converted(x.clone()), wanted, 1e-9, "random queries")


def described(steps: tuple[Step, ...]) -> str:
    return "\n".join(f"s{i}: {step}" for i, step in enumerate(steps))


@given(steps=programs(), shape=st.sampled_from(SHAPES), seed=st.integers(0, 3))
@settings(SETTINGS, max_examples=80)
@pytest.mark.slow
def test_traced_programs_compute_the_definition(steps, shape, seed):
    note(described(steps))
    program = PlainProgram(steps, seed)
    traced = captured(program, "symbolic")
    with torch.no_grad():  # symbolic_trace writes `+=` down as `+`, which an alias can tell apart
        assume(all(map(torch.equal, traced(example()), program(example()))))
    check_program(program, traced, shape)


@given(steps=programs(), shape=st.sampled_from(SHAPES), seed=st.integers(0, 3))
@settings(SETTINGS, max_examples=15)
@pytest.mark.slow
def test_exported_programs_compute_the_definition(steps, shape, seed):
    note(described(steps))
    program = PlainProgram(steps, seed)
    check_program(program, captured(program, "export"), shape)


@given(steps=programs(), seed=st.integers(0, 3))
@settings(SETTINGS, max_examples=50)
def test_the_brute_force_at_zero_queries_is_the_program(steps, seed):
    """The check of the checker: without notes the interpreter is the plain program."""
    program, x = PlainProgram(steps, seed), example()
    with torch.no_grad():
        assert_same(Interpreter(program).run(x.clone()), program(x.clone()), 1e-12, described(steps))


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
