"""What depth attention keeps and holds: row statistics and one float copy at a time, never all sources."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attnres_fx.ops import depth_attention


def bfloat16_inputs(count: int, rows: int, width: int) -> list[Tensor]:
    """`count` bfloat16 sources [rows, width], then a float32 query and key_weight."""
    sources = [torch.randn(rows, width).bfloat16().requires_grad_() for _ in range(count)]
    return [*sources, torch.randn(width, requires_grad=True), torch.randn(width, requires_grad=True)]


@pytest.mark.parametrize("mode", [contextlib.nullcontext, lambda: FlopCounterMode(display=False)], ids=["", "watched"])
def test_backward_saves_the_inputs_and_two_numbers_a_row_for_each_source(mode):
    count, rows, width = 33, 64, 256
    leaves = bfloat16_inputs(count, rows, width)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with mode(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = depth_attention(leaves[:-2], *leaves[-2:], gain=count)
    given = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*leaves, out)}
    beside = sum(size for place, size in saved.items() if place not in given)
    assert 0 < beside <= 2 * 4 * rows * count
    assert sum({**saved, **given}.values()) <= 1.5 * sum(given.values())


def peak_bytes(step: Callable[[], object]) -> int:
    """Most memory that `step` held at once, by the allocator's own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_a_training_step_holds_a_few_float_copies_of_one_source_not_of_all():
    count, rows, width = 33, 64, 256
    leaves = bfloat16_inputs(count, rows, width)
    grad = torch.randn(rows, width).bfloat16()
    one_float_copy = 4 * rows * width
    gradients = sum(t.nbytes for t in leaves)

    def step() -> list[Tensor]:
        out = depth_attention(leaves[:-2], *leaves[-2:], gain=count)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    temporaries = peak_bytes(step) - gradients - grad.nbytes
    assert 0 < temporaries <= 5 * one_float_copy


def test_inference_holds_a_few_float_copies_of_one_source_not_of_all():
    *sources, query, key_weight = (t.detach() for t in bfloat16_inputs(33, 64, 256))
    assert 0 < peak_bytes(lambda: depth_attention(sources, query, key_weight)) <= 5 * 4 * 64 * 256
