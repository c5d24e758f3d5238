"""Depth attention on a CUDA device against a float64 oracle: `pytest -m gpu tests/test_gpu.py`."""

import copy
import functools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.ops import depth_attention
from tests.support.brute_force import depth_attention as definition

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SHAPES = [(1, 1, 1), (33, 7, 2047), (9, 65, 2049), (129, 8, 8192), (37, 8, 200), (3, 130, 1000), (2, 64, 7186)]
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.float16: (4e-3, 1e-2), torch.bfloat16: (8e-3, 2e-2)}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def make(sources: int, tokens: int, width: int, dtypes: list[torch.dtype], seed: int = 0) -> list[Tensor]:
    """Sources [N, D], then query and key gain [D], then the output's gradient [N, D]."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator)

    values = [normal(tokens, width).to(dtypes[i % len(dtypes)]) for i in range(sources)]
    query, key_weight = normal(width) * (2 / width**0.5), 1 + 0.1 * normal(width)
    return [*values, query, key_weight, normal(tokens, width)]


def run(tensors: list[Tensor], gain: float = 1.5) -> list[Tensor]:
    """Output, then the gradients of sources, query and key gain."""
    leaves = [t.detach().requires_grad_() for t in tensors[:-1]]
    out = depth_attention(leaves[:-2], leaves[-2], leaves[-1], gain=gain)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[-1].to(out.dtype))]


def oracle(tensors: list[Tensor], gain: float = 1.5) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in tensors[:-1]]
    out = definition(leaves[:-2], leaves[-2], leaves[-1], gain)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[-1].double())]


def worst(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    if not wanted.numel():
        return 0.0
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def check(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    forward, gradients = TOLERANCES[dtype]
    assert worst(found[0], wanted[0]) <= forward
    for i, (a, b) in enumerate(zip(found[1:], wanted[1:], strict=True)):
        assert worst(a, b) <= gradients, f"gradient {i} of {len(found) - 1}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_output_and_every_gradient_match_the_oracle(shape):
    tensors = make(*shape, [BF16])
    check(run(tensors), oracle(tensors), BF16)


@pytest.mark.parametrize(
    ("dtypes", "coarsest"),
    [([FP32], FP32), ([FP16], FP16), ([FP32, BF16], BF16), ([BF16, FP16, FP32], BF16), ([BF16, FP16], BF16)],
    ids=str,
)
def test_other_and_mixed_dtypes_match_the_oracle(dtypes, coarsest):
    tensors = make(9, 65, 2049, dtypes)
    found = run(tensors)
    assert found[0].dtype == functools.reduce(torch.promote_types, dtypes)
    assert [g.dtype for g in found[1:10]] == [t.dtype for t in tensors[:9]]
    check(found, oracle(tensors), coarsest)


def test_one_source_gives_exactly_gain_times_it_and_a_zero_query_gradient():
    tensors = make(1, 33, 1000, [BF16])
    out, _, query_grad, key_grad = run(tensors, gain=2.0)
    assert torch.equal(out, 2 * tensors[0])
    assert not query_grad.any()
    assert not key_grad.any()


def test_the_kernels_take_these_sources():
    kernels = pytest.importorskip("attnres_fx.ops.kernels")
    tensors = make(9, 65, 2049, [BF16])
    assert kernels.usable(tensors[:9], tensors[9], tensors[10])


@pytest.mark.parametrize("shape", [(9, 4099, 1024), (33, 7, 2047)], ids=str)
def test_two_runs_give_the_same_bits(shape):
    tensors = make(*shape, [BF16])
    for a, b in zip(run(tensors), run(tensors), strict=True):
        assert torch.equal(a, b)


def test_a_cuda_graph_replayed_with_changed_inputs_gives_the_changed_result():
    static, changed = make(5, 67, 1000, [BF16]), make(5, 67, 1000, [BF16], seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = run(static)
    graph.replay()
    first = [t.clone() for t in found]
    for target, source in zip(static, changed, strict=True):
        target.copy_(source)
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(found[0], first[0])
    for a, b in zip(found, run(changed), strict=True):
        assert torch.equal(a, b)


def test_more_than_two_to_the_31_elements_a_source():
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free device memory")
    tokens, width = 2**19 + 129, 4096
    generator = torch.Generator(DEVICE).manual_seed(0)
    values = [torch.empty(tokens, width, dtype=BF16, device=DEVICE).normal_(generator=generator) for _ in range(2)]
    small = make(2, 1, width, [BF16])
    grad = torch.empty(tokens, width, dtype=BF16, device=DEVICE).normal_(generator=generator)
    out, *grads = run([*values, small[2], small[3], grad])
    for row in (0, tokens // 2, 2**31 // width - 1, 2**31 // width, tokens - 1):
        part = slice(row, row + 1)
        wanted = oracle([*(v[part] for v in values), small[2], small[3], grad[part]])
        assert worst(out[part], wanted[0]) <= 8e-3
        for found, want in zip(grads[:2], wanted[1:3], strict=True):
            assert worst(found[part], want) <= 2e-2
    assert all(torch.isfinite(g).all() for g in grads[2:])


def padded_rows(t: Tensor) -> Tensor:
    wide = torch.full((t.shape[0], t.shape[1] + 24), float("nan"), dtype=t.dtype, device=t.device)
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


def misaligned(t: Tensor) -> Tensor:
    flat = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def columns_apart(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("arrange", [padded_rows, misaligned, columns_apart])
def test_layout_of_sources_does_not_matter(arrange, dtype):
    tensors = make(5, 65, 1000, [dtype])
    arranged = [*(arrange(t) for t in tensors[:5]), *tensors[5:]]
    check(run(arranged), oracle(tensors), dtype)


def test_layout_of_the_incoming_gradient_does_not_matter():
    tensors = make(5, 65, 1000, [BF16])
    for arrange in (padded_rows, misaligned, columns_apart):
        check(run([*tensors[:-1], arrange(tensors[-1])]), oracle(tensors), BF16)


def test_transposed_tokens_and_four_dimensions():
    tensors = make(3, 12, 200, [BF16])
    shaped = [t.view(3, 4, 200).transpose(0, 1) if t.dim() > 1 else t for t in tensors]
    found = run(shaped)
    wanted = oracle(tensors)
    back = [t.transpose(0, 1).reshape(12, 200) if t.dim() > 1 else t for t in found]
    check(back, wanted, BF16)


def test_gradients_of_a_tensor_given_twice_add():
    a, b, _, query, key_weight, grad = make(3, 65, 1000, [BF16])
    leaves = [t.detach().requires_grad_() for t in (a, b, query, key_weight)]
    out = depth_attention([leaves[0], leaves[1], leaves[0]], leaves[2], leaves[3])
    found = torch.autograd.grad(out, leaves, grad.to(BF16))
    wanted = oracle([a, b, a, query, key_weight, grad.to(BF16)], gain=1.0)
    assert worst(out.detach(), wanted[0]) <= 8e-3
    assert worst(found[0], wanted[1] + wanted[3]) <= 2e-2
    assert worst(found[1], wanted[2]) <= 2e-2
    assert worst(found[2], wanted[4]) <= 2e-2


def test_no_tokens_give_an_empty_output_and_zero_weight_gradients():
    found = run(make(5, 0, 32, [BF16]))
    assert found[0].shape == (0, 32)
    assert all(g.shape == (0, 32) for g in found[1:6])
    assert not found[6].any()
    assert not found[7].any()


def test_every_output_is_written_where_memory_held_nans():
    tensors = make(5, 67, 1000, [BF16])
    wanted = run(tensors)
    poison = [torch.full((n,), float("nan"), device=DEVICE) for n in (64, 1000, 8192, 67 * 1000) for _ in range(40)]
    torch.cuda.synchronize()
    del poison
    for a, b in zip(run(tensors), wanted, strict=True):
        assert torch.equal(a, b)


def test_logits_far_beyond_half_precision_stay_finite():
    tensors = make(5, 9, 512, [FP16])
    tensors[-3] *= 1e6
    found = run([*tensors[:-1], tensors[-1] * 1e-3])
    assert all(torch.isfinite(t).all() for t in found)


def test_no_recompiles_when_the_number_of_tokens_changes():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(backend=counter, dynamic=True, fullgraph=True)
    def read(sources: list[Tensor], query: Tensor, key_weight: Tensor) -> Tensor:
        return depth_attention(sources, query, key_weight) * 2

    compiled: list[int] = []
    for tokens in (7, 64, 129, 1000):
        tensors = make(5, tokens, 512, [BF16])
        leaves = [t.requires_grad_() for t in tensors[:-1]]
        out = read(leaves[:-2], leaves[-2], leaves[-1])
        grads = torch.autograd.grad(out, leaves, tensors[-1].to(out.dtype))
        check([out.detach(), *grads], oracle(tensors, gain=2.0), BF16)
        compiled.append(counter.frame_count)
    assert compiled == [compiled[0]] * 4  # the first call may compile twice: Dynamo starts again over the defaults


def small_gpt() -> tuple[SmallGPT, Tensor]:
    torch.manual_seed(0)
    model = SmallGPT(GPTConfig(vocabulary=32, layers=3, heads=2, width=64, context=32))
    return model, torch.randint(0, 32, (2, 17))


def stir_(reads) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for read in reads:
            read.query.copy_(0.3 * torch.randn(read.query.shape, generator=generator))


@pytest.mark.parametrize("variant", ["full", "block", "local"])
def test_a_converted_model_moved_to_the_device_computes_what_it_did(variant):
    model, ids = small_gpt()
    converted = ax.convert(model, (ids,), config=ax.AttnResConfig(variant=variant, num_blocks=_blocks(variant)))
    stir_(converted.attnres.reads)
    wanted = converted(ids)
    wanted.square().mean().backward()
    moved = copy.deepcopy(converted).to(DEVICE)
    moved.zero_grad()
    found = moved(ids.to(DEVICE))
    found.square().mean().backward()
    assert worst(found.detach().cpu(), wanted.detach().double()) <= 1e-4
    for (name, a), (_, b) in zip(moved.named_parameters(), converted.named_parameters(), strict=True):
        assert worst(a.grad.cpu(), b.grad.double()) <= 1e-3, name


def _blocks(variant: str) -> int | None:
    return None if variant == "full" else 2


@pytest.mark.parametrize("variant", ["full", "block"])
def test_the_backend_on_the_device_computes_what_the_converted_model_does(variant):
    torch.compiler.reset()
    model, ids = small_gpt()
    model, ids = model.to(DEVICE), ids.to(DEVICE)
    config = ax.AttnResConfig(variant=variant, num_blocks=_blocks(variant))
    converted = ax.convert(copy.deepcopy(model), (ids,), config=config)
    attached = ax.compile(model, (ids,), config=config)
    stir_(converted.attnres.reads)
    stir_(attached.reads)
    wanted, found = converted(ids), model(ids)
    wanted.square().mean().backward()
    found.square().mean().backward()
    assert worst(found.detach(), wanted.detach().double()) <= 1e-3
    grads = zip(attached.parameters(), converted.attnres.parameters(), strict=True)
    assert all(worst(a.grad, b.grad.double()) <= 1e-2 for a, b in grads)


def test_a_partial_sum_is_rounded_as_an_addition_is():
    from attnres_fx.ops.fused import depth_attention_fused

    first, last, delta = (torch.randn(64, 1024, device=DEVICE).to(BF16) for _ in range(3))
    weight = torch.randn(1024, device=DEVICE)
    _, partial = depth_attention_fused([first, last], weight, weight, delta=delta)
    assert torch.equal(partial, last + delta)
