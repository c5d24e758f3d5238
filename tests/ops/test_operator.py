"""Depth attention against a float64 definition written another way: numbers, dtypes, layouts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnres_fx.ops import depth_attention, depth_weights
from tests.support.operator_oracle import EPS, TOLERANCE, oracle, oracle_weights, random_inputs, worst_ratio

SHAPES = [(1, 1, 1), (33, 7, 2047), (9, 65, 2049), (129, 8, 8192), (37, 8, 200), (5, 0, 32)]
SHAPES += [(4, 6, 1000), (3, 5, 7186)]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another on a busy machine cost more here than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_against_oracle(
    leaves: list[Tensor],
    *,
    gain: float = 1.0,
    eps: float = EPS,
    arrange: Callable[[list[Tensor]], list[Tensor]] = list,
    arrange_grad: Callable[[Tensor], Tensor] = torch.clone,
) -> None:
    """Output, and gradient of every leaf that wants one; `arrange` makes the sources from the leaves."""
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    out = depth_attention(arrange(leaves[:-2]), *leaves[-2:], eps=eps, gain=gain)
    expected = oracle(arrange(exact[:-2]), *exact[-2:], eps=eps, gain=gain)
    assert worst_ratio(out, expected) <= TOLERANCE[out.dtype][0]

    grad = arrange_grad(torch.randn(out.shape).to(out.dtype))
    wanted = [t for t in leaves if t.requires_grad]
    found = torch.autograd.grad(out, wanted, grad)
    right = torch.autograd.grad(expected, [t for t in exact if t.requires_grad], grad.double())
    arithmetic = torch.float64 if out.dtype == torch.float64 else torch.float32
    for i, (leaf, a, b) in enumerate(zip(wanted, found, right, strict=True)):
        assert a.dtype == leaf.dtype
        tolerance = max(TOLERANCE[leaf.dtype][1], TOLERANCE[arithmetic][1])
        assert worst_ratio(a, b) <= tolerance, f"gradient {i} of {len(wanted)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient_match_the_definition(shape, dtype):
    count, *rest = shape
    check_against_oracle(random_inputs(tuple(rest), [dtype] * count))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 65, 249), (5, 0, 32), (4, 6, 1000)], ids=str)
def test_float16_and_float64_match_the_definition(shape, dtype):
    count, *rest = shape
    check_against_oracle(random_inputs(tuple(rest), [dtype] * count), gain=count)


@pytest.mark.parametrize("shape", [(32,), (2, 3, 32), (2, 3, 1, 5, 32), (1, 0, 2, 32)], ids=str)
def test_sources_may_have_any_number_of_leading_dimensions(shape):
    check_against_oracle(random_inputs(shape, [torch.float32] * 4))


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_eps_is_added_to_the_mean_square(eps):
    check_against_oracle(random_inputs((5, 32), [torch.float64] * 3), eps=eps)


f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("sources", "weights", "expected"),
    [
        ([f32, bf16, bf16], f32, f32),
        ([bf16, f16], f32, f32),
        ([bf16, bf16], f32, bf16),
        ([f32, f32], bf16, f32),
        ([f32, f32], f64, f32),
        ([bf16, f64, f32], f32, f64),
    ],
)
def test_mixed_dtypes_promote_as_addition_does(sources, weights, expected):
    leaves = random_inputs((6, 64), sources, weights)
    assert depth_attention(leaves[:-2], *leaves[-2:]).dtype == sum(leaves[:-2]).dtype == expected
    check_against_oracle(leaves)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda leaves: [t.transpose(0, 1) for t in leaves],
        lambda leaves: [t[:, ::2] for t in leaves],
        lambda leaves: [t[..., 1::2] for t in leaves],
        lambda leaves: [t.flatten()[3 : 3 + 8 * 10].view(8, 10) for t in leaves],
        lambda leaves: [leaves[0].mT.contiguous().mT, leaves[1], leaves[2].transpose(0, 1).transpose(0, 1)],
    ],
    ids=["transposed", "strided rows", "strided channels", "misaligned", "one of each"],
)
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_layout_of_sources_does_not_matter(arrange, dtype):
    leaves = random_inputs((8, 12, 10), [dtype] * 3)
    width = arrange(leaves[:-2])[0].shape[-1]
    leaves[-2:] = [w.detach()[:width].requires_grad_() for w in leaves[-2:]]
    check_against_oracle(leaves, arrange=arrange)


def test_gradients_of_a_tensor_given_twice_add():
    leaves = random_inputs((6, 32), [f32] * 2)
    check_against_oracle(leaves, arrange=lambda s: [s[0], s[1], s[0], s[0]])


def test_query_and_key_weight_may_be_one_tensor():
    *sources, query, _ = random_inputs((6, 32), [f64] * 3)
    (found,) = torch.autograd.grad(depth_attention(sources, query, query).square().sum(), query)
    (right,) = torch.autograd.grad(oracle(sources, query, query).square().sum(), query)
    assert worst_ratio(found, right) <= 1e-11


def test_gradients_of_an_expanded_source_sum_over_what_it_was_expanded():
    *sources, query, key_weight = random_inputs((7, 32), [f32] * 3)
    leaves = [torch.randn(1, 32, requires_grad=True), torch.randn(7, 1, requires_grad=True), *sources]
    check_against_oracle([*leaves, query, key_weight], arrange=lambda s: [t.expand(7, 32) for t in s])


@pytest.mark.parametrize(
    "arrange_grad",
    [lambda g: g.mT.contiguous().mT, lambda g: g[:1, :1].expand_as(g), lambda g: g.repeat(1, 2)[:, ::2]],
    ids=["transposed", "expanded", "strided"],
)
def test_layout_of_the_incoming_gradient_does_not_matter(arrange_grad):
    leaves = random_inputs((6, 32), [f32] * 3)
    assert not arrange_grad(torch.randn(6, 32)).is_contiguous()
    check_against_oracle(leaves, arrange_grad=arrange_grad)


@pytest.mark.parametrize("wanted", range(5), ids=["v_0", "v_1", "v_2", "query", "key_weight"])
def test_frozen_inputs_get_no_gradient_and_do_not_disturb_the_others(wanted):
    leaves = random_inputs((6, 32), [f32] * 3)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == wanted)
    check_against_oracle(leaves)
    depth_attention(leaves[:-2], *leaves[-2:]).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(5)]


def test_nothing_requires_grad_when_no_input_does():
    *sources, query, key_weight = (t.detach() for t in random_inputs((6, 32), [f32] * 3))
    assert not depth_attention(sources, query, key_weight).requires_grad


@pytest.mark.parametrize("dtype", [f32, bf16, f16, f64], ids=str)
def test_one_source_gives_exactly_gain_times_it_and_a_zero_query_gradient(dtype):
    source, query, key_weight = random_inputs((6, 33), [dtype])
    out = depth_attention([source], query, key_weight, gain=3.0)
    assert torch.equal(out, source * 3.0)
    grad = torch.randn(6, 33).to(dtype)
    found = torch.autograd.grad(out, (source, query, key_weight), grad)
    assert torch.equal(found[0], grad * 3.0)
    assert torch.equal(found[1], torch.zeros_like(query))
    assert torch.equal(found[2], torch.zeros_like(key_weight))


@pytest.mark.parametrize("count", [2, 3, 9, 33, 129])
def test_zero_query_with_gain_of_the_count_is_the_plain_running_sum(count):
    *sources, query, key_weight = random_inputs((6, 64), [f32] * count)
    out = depth_attention(sources, torch.zeros_like(query), key_weight, gain=count)
    assert worst_ratio(out, sum(s.double() for s in sources)) <= 1e-6


def test_large_logits_pick_one_source_and_stay_finite():
    *sources, query, key_weight = random_inputs((6, 32), [f32] * 4)
    check_against_oracle([*sources, (query * 1e4).detach(), key_weight])
    weights = depth_weights(sources, query * 1e4, key_weight)
    assert torch.allclose(weights.amax(0), torch.ones(6))


def test_sources_of_zeros_are_mixed_without_nan():
    *sources, query, key_weight = random_inputs((6, 32), [f32] * 3)
    sources[1] = torch.zeros(6, 32, requires_grad=True)
    check_against_oracle([*sources, query, key_weight])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_two_runs_give_the_same_bits(dtype, threads):
    torch.set_num_threads(threads)
    leaves = random_inputs((64, 513), [dtype] * 9)
    grad = torch.randn(64, 513).to(dtype)

    def run() -> list[Tensor]:
        out = depth_attention(leaves[:-2], *leaves[-2:], gain=9.0)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_inputs_are_not_changed():
    leaves = random_inputs((6, 32), [f32] * 3)
    before = [leaf.detach().clone() for leaf in leaves]
    depth_attention(leaves[:-2], *leaves[-2:], gain=3.0).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


def test_changing_a_source_in_place_before_backward_is_an_error_not_a_wrong_gradient():
    *sources, query, key_weight = random_inputs((6, 32), [f32] * 3)
    out = depth_attention([sources[0] * 1, *sources[1:]], query, key_weight)
    with torch.no_grad():
        sources[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_weights_match_the_definition_and_sum_to_one(dtype):
    *sources, query, key_weight = random_inputs((2, 5, 64), [dtype] * 7)
    weights = depth_weights(sources, query, key_weight)
    assert weights.shape == (7, 2, 5) and weights.dtype == torch.float32
    assert worst_ratio(weights, oracle_weights(sources, query, key_weight)) <= 1e-5
    assert torch.allclose(weights.sum(0), torch.ones(2, 5))
