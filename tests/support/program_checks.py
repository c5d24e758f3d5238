"""What every random program must satisfy, and how many of them are tried.

`ATTNRES_FUZZ=2000` tries that many instead of the usual 200, drawn from `ATTNRES_FUZZ_SEED`; the seed of a failure is
in the name of its test.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import seed as seeded
from torch import Tensor, nn
from torch.export import ExportedProgram

import attnres_fx as ax
from attnres_fx.passes import propagate_values_
from tests.support.brute_force import Setting, notes_of, read_parameters, run_brute_force
from tests.support.brute_force_states import Notes
from tests.support.plain_programs import PlainProgram, example
from tests.support.post_norm_programs import PostNormProgram, gate_of, post_norm_definition

SETTINGS = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False)
USUAL, SHARD = 200, 25
FUZZ = int(os.environ.get("ATTNRES_FUZZ", "0"))
SEED = int(os.environ.get("ATTNRES_FUZZ_SEED", "1"))
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
Source = nn.Module | ExportedProgram


def shards(count: int) -> list[str]:
    """Parameters of a test that tries `count` of the usual programs: one, or parts of a fuzz run, each with a seed."""
    parts = -(-count * FUZZ // (USUAL * SHARD)) if FUZZ else 0
    return [f"seed={SEED}, part {i}" for i in range(parts)] or ["usual"]


def tried(part: str, count: int, **drawn: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Run a check on `count` programs, or on those of one part of a fuzz run."""

    def decorate(check: Callable[..., None]) -> Callable[[], None]:
        if part == "usual":
            return settings(SETTINGS, max_examples=count)(given(**drawn)(check))
        fuzz = settings(SETTINGS, derandomize=False, database=None, max_examples=SHARD)
        return seeded(part)(fuzz(given(**drawn)(check)))

    return decorate


def captured(program: nn.Module, capture: str) -> Source:
    if capture == "dynamo":
        return program
    if capture == "export":
        return torch.export.export(program, (example(),))
    gm = torch.fx.symbolic_trace(program)
    propagate_values_(gm, (example(),))
    with torch.no_grad():  # symbolic_trace writes `+=` down as `+`, which an alias can tell apart
        assume(all(map(torch.equal, run(gm), run(program))))
    return gm


def run(model: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """A model's outputs; the draws of all runs are the same."""
    torch.manual_seed(3)
    return model(example())


def check_program(program: PlainProgram, source: Source, shape: Setting) -> None:
    """The converted program is the original at zero queries, gradients too, and the definition at random ones."""
    with torch.no_grad():
        notes = run(lambda x: notes_of(program, x))  # type: ignore[arg-type, return-value]
    setting = fitting(shape, notes, program)
    tolerance = tolerance_of(program)
    converted = ax.convert(source, (example(),), config=config_of(setting), check=False)
    actual, names = sorted(converted.attnres.reads.names), sorted(notes.named().values())
    assert actual == names, f"reads {actual}, not {names}"
    if setting.output == "sum":
        in_gradients = _gradient_tolerance(o for step in program.steps for o in step.options)
        check_preserved(program, converted, tolerance, max(10 * tolerance, in_gradients))
    with torch.no_grad():
        set_queries(converted)
        defined = run(lambda x: run_brute_force(program, x, setting, notes))
        assert_same(run(converted), defined, tolerance, "random queries: output")


def check_post_norm(program: PostNormProgram, source: Source, shape: Setting) -> None:
    """The same of a post-norm program."""
    setting = shape
    if shape.num_blocks is not None:
        setting = dataclasses.replace(shape, num_blocks=min(shape.num_blocks, len(program.layers)))
    converted = ax.convert(source, (example(),), config=config_of(setting), check=False)
    actual, names = list(converted.attnres.reads.names), [f"s{i}.norm" for i in range(len(program.layers))]
    assert actual == names, f"reads {actual}, not {names}"
    if setting.output == "sum":
        check_preserved(program, converted, 1e-9, _gradient_tolerance(layer.branch for layer in program.layers))
    with torch.no_grad():
        set_queries(converted)
        for i, read in enumerate(converted.attnres.reads):
            if read.gate is not None:
                read.gate.fill_(gate_of(i))
        defined = run(lambda x: post_norm_definition(program, setting, x))
        assert_same(run(converted), defined, 1e-9, "random queries: output")


def _gradient_tolerance(words: Iterable[str]) -> float:
    """A narrow output's gradient is rounded for every read of it, the original's once."""
    found = set(words)
    return 3e-2 if "bfloat16" in found else 1e-5 if "narrow" in found else 1e-8


def check_preserved(program: nn.Module, converted: nn.Module, tolerance: float, in_gradients: float) -> None:
    """Outputs and gradients of the program's own parameters are what they were."""
    with torch.no_grad():
        assert_same(run(converted), run(program), tolerance, "zero queries: output")
    held = {n for n, _ in converted.named_parameters()}  # a trace holds what it uses
    names = [n for n, _ in program.named_parameters() if n in held]
    wanted = gradients(program, names)
    if wanted is None:
        return
    found = gradients(converted, names)
    assert found is not None, "the original has gradients"
    largest = max(g.abs().max().item() for g in wanted)
    for name, left, right in zip(names, found, wanted, strict=True):
        assert (left - right).abs().max().item() <= in_gradients * largest, f"gradient of {name}"


def gradients(model: nn.Module, names: Sequence[str]) -> list[Tensor] | None:
    """Gradients of the program's own parameters; None where it wrote over what its backward needs."""
    parameters = dict(model.named_parameters())
    outputs = [y.double() for y in run(model)]
    loss = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)
    try:
        return list(torch.autograd.grad(loss, [parameters[n] for n in names], materialize_grads=True))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


def set_queries(converted: nn.Module) -> None:
    for read in converted.attnres.reads:  # type: ignore[union-attr]
        query, key_weight = read_parameters(read.name)
        read.query.copy_(query)
        read.key_weight.copy_(key_weight)


def config_of(setting: Setting) -> ax.AttnResConfig:
    return ax.AttnResConfig(
        variant=setting.variant,
        output=setting.output,
        num_blocks=setting.num_blocks,
        block_size=setting.block_size,
    )


def fitting(setting: Setting, notes: Notes, program: PlainProgram) -> Setting:
    """The setting, with no more blocks than the shortest stream has sublayers.

    What a state of an earlier block is worth in a later one is nowhere defined for `local`.
    """
    merges = any(step.kind == "recall" or {"lerp", "halves"} & set(step.options) for step in program.steps)
    if setting.variant == "local" and merges:
        setting = Setting("full", setting.output)
    shortest = min(notes.sublayers(s) for s in notes.lengths)
    if setting.num_blocks is None or setting.num_blocks <= shortest:
        return setting
    return dataclasses.replace(setting, num_blocks=shortest)


def tolerance_of(program: PlainProgram) -> float:
    """Everything is float64. A state that goes through float32 is rounded term by term, or as a whole.

    So is a narrow term where the state is multiplied: it is multiplied by itself, in its own dtype.
    """
    words = {o for step in program.steps for o in (step.kind, *step.options)}
    multiplied = bool(words & {"scalar", "recall", "halves", "lerp"})
    if "bfloat16" in words and multiplied:
        return 3e-2
    return 1e-5 if "float32 and back" in words or ("narrow" in words and multiplied) else 1e-9


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, where: str) -> None:
    assert len(actual) == len(expected), where
    for i, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert left.shape == right.shape, f"{where} {i} has shape {tuple(left.shape)}"
        assert left.dtype == right.dtype, f"{where} {i} is {left.dtype}"
        difference = (left - right).abs().max().item()
        assert difference <= tolerance * right.abs().max().item(), f"{where} {i} differs by {difference:.3g}"
