"""Depth attention under torch.compile for the CPU: numbers, the loops generated, what is kept for backward."""

import math
import re

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.func import grad, vmap

from attnres_fx.ops import depth_attention
from tests.support.operator_oracle import TOLERANCE, oracle, random_inputs, worst_ratio

GAIN = 1.5
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.threads": 2, "force_disable_caches": True}):
        yield


def read(*leaves: Tensor) -> Tensor:
    return depth_attention(leaves[:-2], *leaves[-2:], gain=GAIN)


def compiled_step(leaves: list[Tensor], function=read, **options) -> tuple[list[Tensor], list[str]]:
    """Output and gradients of what wants one, and the generated code of forward and backward."""
    compiled = torch.compile(function, fullgraph=True, **options)

    def step() -> list[Tensor]:
        out = compiled(*leaves)
        torch.manual_seed(1)
        wanted = [t for t in leaves if t.requires_grad]
        return [out, *torch.autograd.grad(out, wanted, torch.randn(out.shape).to(out.dtype))]

    return run_and_get_code(step)


def check_against_oracle(leaves: list[Tensor], function=read, definition=oracle, **options) -> None:
    (out, *found), _ = compiled_step(leaves, function, **options)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    expected = definition(exact[:-2], *exact[-2:], gain=GAIN)
    assert worst_ratio(out, expected) <= TOLERANCE[out.dtype][0]
    torch.manual_seed(1)
    cotangent = torch.randn(out.shape).to(out.dtype).double()
    wanted = [t for t in leaves if t.requires_grad]
    right = torch.autograd.grad(expected, [t for t in exact if t.requires_grad], cotangent)
    for leaf, a, b in zip(wanted, found, right, strict=True):
        assert a.dtype == leaf.dtype
        assert worst_ratio(a, b) <= max(TOLERANCE[leaf.dtype][1], TOLERANCE[f32 if out.dtype != f64 else f64][1])


@pytest.mark.parametrize(
    ("shape", "sources", "weights"),
    [
        ((7, 100), [f32] * 18, f32),
        ((33,), [f64] * 2, f64),
        ((0, 32), [bf16] * 2, f32),
        ((3, 11, 64), [f32, bf16, f16], bf16),
    ],
    ids=str,
)
@pytest.mark.slow
def test_forward_and_every_gradient_match_the_definition(shape, sources, weights):
    check_against_oracle(random_inputs(shape, sources, weights))


@pytest.mark.slow
def test_sizes_may_be_dynamic():
    check_against_oracle(random_inputs((3, 5, 40), [f32] * 2), dynamic=True)


@pytest.mark.slow
def test_frozen_inputs_get_no_gradient_and_do_not_disturb_the_others():
    leaves = random_inputs((6, 32), [f32] * 2)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in (1, 2))
    check_against_oracle(leaves)


@pytest.mark.slow
def test_gradients_of_a_tensor_given_twice_add():
    def twice(a, b, query, key_weight):
        return depth_attention([a, b, a, a], query, key_weight, gain=GAIN)

    def expected(sources, query, key_weight, gain):
        a, b = sources
        return oracle([a, b, a, a], query, key_weight, gain=gain)

    check_against_oracle(random_inputs((6, 32), [f32] * 2), twice, expected)


@pytest.mark.slow
def test_one_source_is_only_scaled_and_its_query_gets_a_gradient_of_exactly_zero():
    leaves = random_inputs((6, 32), [f32])
    (out, _, query_grad, key_grad), _ = compiled_step(leaves)
    assert torch.equal(out, GAIN * leaves[0])
    assert not query_grad.any() and not key_grad.any()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("dtype", "huge"), [(f16, 6e4), (bf16, 1e15)], ids=str)
@pytest.mark.slow_after(1)
def test_logits_beyond_half_precision_stay_finite(dtype, huge, compiled):
    leaves = random_inputs((6, 64), [dtype] * 3)
    leaves = [t.detach().sign().mul(huge).requires_grad_() for t in leaves[:-1]]
    leaves.append(torch.full((64,), 6e4).to(dtype).requires_grad_())
    out = (torch.compile(read, fullgraph=True) if compiled else read)(*leaves)
    # What is too large for fp16 by itself (the gain times 6e4, a gradient of 1e9) may be infinite, nothing NaN.
    mixture = out / GAIN if dtype == bf16 else depth_attention(leaves[:-2], *leaves[-2:])
    assert mixture.isfinite().all() and not out.isnan().any()
    assert mixture.abs().max() <= 1.01 * huge
    grads = torch.autograd.grad(out, leaves[:-2], torch.ones_like(out) / 64)
    assert not any(g.isnan().any() for g in grads)


# -- what Inductor makes of it


WIDTH = 128


def loops(code: str) -> tuple[int, int]:
    """Loop nests of the generated C++ that threads share: those that walk along rows [D], and the others."""
    nests = code.split("#pragma omp for")[1:]
    along_rows = sum(f"<static_cast<int64_t>({WIDTH}L)" in nest for nest in nests)
    return along_rows, len(nests) - along_rows


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.slow_after(1)
def test_few_loops_over_the_sources_forward_and_backward(count):
    _, (forward, backward) = compiled_step(random_inputs((256, WIDTH), [f32] * count), dynamic=False)
    # Along rows: the row sums and the mixture; <grad, v_i>, all gradients, one sum over tokens for the query's.
    # The others are the softmax over S numbers a token and what backward does with it.
    assert loops(forward)[0] == 2 and loops(forward)[1] <= 1
    assert loops(backward)[0] == 3 and loops(backward)[1] <= 3


@pytest.mark.slow
def test_no_buffer_of_the_generated_code_holds_all_sources():
    rows, width, count = 256, WIDTH, 5
    _, codes = compiled_step(random_inputs((rows, width), [bf16] * count, f32), dynamic=False)
    for code in codes:
        sizes = [
            math.prod(int(size) for size in re.findall(r"\d+", shape))
            for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", code)
        ]
        assert sizes and max(sizes) <= rows * width
    large = [
        (shape, dtype)
        for shape, dtype in re.findall(r"empty_strided_cpu\(\(([\d, ]*)\), \([\d, ]*\), (torch\.\w+)\)", codes[1])
        if math.prod(int(size) for size in re.findall(r"\d+", shape)) == rows * width and dtype == "torch.float32"
    ]
    assert len(large) <= 1  # the sum over sources that the query's gradient is made of, and no float copy of a source


@pytest.mark.slow
def test_backward_keeps_the_inputs_and_row_statistics_alone():
    count, rows, width = 9, 64, 256
    leaves = random_inputs((rows, width), [bf16] * count, f32)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    compiled = torch.compile(read, fullgraph=True)
    compiled(*leaves)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        saved.clear()
        out = compiled(*leaves)
    given = {t.untyped_storage().data_ptr() for t in (*leaves, out)}
    beside = sum(size for place, size in saved.items() if place not in given)
    assert 0 < beside <= 4 * rows * (3 * count + 1)


# -- transforms inside and around the compiler


def test_per_example_gradients_compile():
    *sources, query, key_weight = (t.detach() for t in random_inputs((4, 6, 32), [f64] * 3))

    def loss(query, *sources):
        return depth_attention(sources, query, key_weight, gain=GAIN).sin().sum()

    per_example = vmap(grad(loss), (None, 0, 0, 0))
    found = torch.compile(per_example, fullgraph=True, backend="aot_eager")(query, *sources)
    torch.testing.assert_close(found, per_example(query, *sources))


def test_a_functional_program_may_differentiate_twice():
    leaves = random_inputs((3, 8), [f64] * 3)

    def twice(read, leaves):
        first = torch.autograd.grad(read(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    with FunctionalTensorMode():
        inside = [FunctionalTensor.to_functional(t.detach()).requires_grad_() for t in leaves]
        found = [FunctionalTensor.from_functional(g) for g in twice(read, inside)]
    expected = twice(lambda *t: oracle(list(t[:-2]), *t[-2:], gain=GAIN), leaves)
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-9)
