"""Fused and two-phase depth attention against a float64 oracle, and under every transform."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

from attnres_fx.ops import depth_attention, depth_attention_batch, depth_attention_fused, depth_attention_merge
from tests.support.operator_oracle import TOLERANCE, oracle, random_inputs, worst_ratio

FUSED = torch.ops.attnres_fx.depth_attention_fused.default
BATCH = torch.ops.attnres_fx.depth_attention_batch.default
MERGE = torch.ops.attnres_fx.depth_attention_merge.default
NORMS = {"none": 0, "rms": 1, "layer": 2}
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def oracle_norm(x: Tensor, norm: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if norm == 1:
        return F.rms_norm(x, x.shape[-1:], weight, eps) + (0 if bias is None else bias)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) if norm == 2 else x


def fused_inputs(shape, dtypes, weights=None):
    """Sources, delta (of the last source's dtype), query, key_weight, norm weight, norm bias."""
    *sources, query, key_weight = random_inputs(shape, dtypes, weights)
    delta = torch.randn(shape).to(dtypes[-1]).requires_grad_()
    norm_weight = torch.randn(shape[-1]).mul(0.3).add(1).to(query.dtype).requires_grad_()
    norm_bias = torch.randn(shape[-1]).mul(0.3).to(query.dtype).requires_grad_()
    return sources, delta, query, key_weight, norm_weight, norm_bias


def check(run, exact, leaves, dtype):
    """Every output, and the gradient of every leaf, against the oracle on float64 copies."""
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    found, expected = run(*leaves), exact(*doubles)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert worst_ratio(a, b) <= TOLERANCE[dtype][0]
    grads = [torch.randn(a.shape).to(a.dtype) for a in found]
    actual = torch.autograd.grad(found, leaves, grads, allow_unused=True)
    right = torch.autograd.grad(expected, doubles, [g.double() for g in grads], allow_unused=True)
    for i, (leaf, a, b) in enumerate(zip(leaves, actual, right, strict=True)):
        if b is None:
            assert a is None or not a.any()
            continue
        assert a.dtype == leaf.dtype
        assert worst_ratio(a, b) <= max(TOLERANCE[leaf.dtype][1], TOLERANCE[dtype][1]), f"gradient {i}"


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


SHAPES = [(3, 2, 5, 48), (1, 4, 33), (9, 7, 200), (2, 0, 16)]
FUSED_READS = [(*case, "eager") for case in itertools.product(SHAPES, NORMS, [False, True], [f32, bf16, f64])]
# A trace costs a thousand times a call: every fold once, and once each shape and dtype.
FUSED_READS += [
    *((SHAPES[0], norm, with_delta, f32, "traced") for norm in NORMS for with_delta in (False, True)),
    *((shape, "layer", True, f32, "traced") for shape in SHAPES[1:]),
    *((SHAPES[0], "layer", True, dtype, "traced") for dtype in (bf16, f64)),
]


@pytest.mark.parametrize(("shape", "norm", "with_delta", "dtype", "how"), FUSED_READS, ids=str)
@pytest.mark.slow_after(len(SHAPES) * 18)
def test_the_fused_read_matches_the_definition(shape, norm, with_delta, dtype, how):
    count, *rest = shape
    sources, delta, *weights = fused_inputs(tuple(rest), [dtype] * count)

    def run(query, key_weight, w, b, delta, *sources):
        return depth_attention_fused(
            sources,
            query,
            key_weight,
            gain=2.0,
            delta=delta if with_delta else None,
            norm=NORMS[norm],
            norm_weight=w if NORMS[norm] else None,
            norm_bias=b if NORMS[norm] else None,
            norm_eps=1e-5,
        )

    def exact(query, key_weight, w, b, delta, *sources):
        sources = list(sources)
        if with_delta:
            sources[-1] = sources[-1] + delta
        read = oracle(sources, query, key_weight, gain=2.0)
        return [oracle_norm(read, NORMS[norm], w, b, 1e-5), *sources[-1:]][: 1 + with_delta]

    check(run if how == "eager" else compiled(run), exact, [*weights, delta, *sources], dtype)


def two_phase(query, key_weight, other_query, other_key, w, b, delta, partial, *sources, **options):
    mixed, also_mixed, lse, also_lse = depth_attention_batch(
        sources, [query, other_query], [key_weight, other_key], eps=1e-6
    )
    merged = depth_attention_merge(
        mixed, lse, partial, query, key_weight, gain=3.0, delta=delta, norm=2, norm_weight=w, norm_bias=b, **options
    )
    return [*merged, *depth_attention_merge(also_mixed, also_lse, merged[1], other_query, other_key)]


def two_phase_exact(query, key_weight, other_query, other_key, w, b, delta, partial, *sources):
    total = partial + delta
    first = oracle([*sources, total], query, key_weight, gain=3.0)
    return [oracle_norm(first, 2, w, b, 1e-6), total, oracle([*sources, total], other_query, other_key)]


TWO_PHASES = [(*case, "eager") for case in itertools.product(SHAPES, [f32, bf16, f64])]
TWO_PHASES += [*((shape, f32, "traced") for shape in SHAPES), *((SHAPES[0], d, "traced") for d in (bf16, f64))]


@pytest.mark.parametrize(("shape", "dtype", "how"), TWO_PHASES, ids=str)
@pytest.mark.slow_after(len(SHAPES) * 3)
def test_two_phases_match_the_definition(shape, dtype, how):
    count, *rest = shape
    sources, delta, query, key_weight, w, b = fused_inputs(tuple(rest), [dtype] * (count + 1))
    other = [t.detach().flip(0).clone().requires_grad_() for t in (query, key_weight)]
    leaves = [query, key_weight, *other, w, b, delta, sources[-1], *sources[:-1]]
    check(two_phase if how == "eager" else compiled(two_phase), two_phase_exact, leaves, dtype)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.slow
def test_inductor_compiles_both_forms(dtype):
    sources, delta, query, key_weight, w, b = fused_inputs((4, 6, 40), [dtype] * 3)
    other = [t.detach().flip(0).clone().requires_grad_() for t in (query, key_weight)]
    leaves = [query, key_weight, *other, w, b, delta, sources[-1], *sources[:-1]]
    check(compiled(two_phase, "inductor"), two_phase_exact, leaves, dtype)


@pytest.mark.parametrize(
    ("sources", "delta", "partial", "out"),
    [([f32, bf16], bf16, bf16, f32), ([bf16, bf16], f32, f32, f32), ([bf16, bf16], bf16, bf16, bf16)],
)
@pytest.mark.parametrize("how", ["eager", "traced"])
def test_dtypes_promote_as_addition_does(sources, delta, partial, out, how):
    values, _, query, key_weight, *_ = fused_inputs((3, 16), sources, f32)
    change = torch.randn(3, 16).to(delta)

    def run(change, *values):
        return depth_attention_fused(values, query, key_weight, delta=change)

    def narrow(change, *values):
        return depth_attention_fused(values, query, key_weight, delta=change, norm=1, dtype=f16)

    run, narrow = (run, narrow) if how == "eager" else (compiled(run), compiled(narrow))
    assert [t.dtype for t in run(change, *values)] == [out, partial]
    assert [t.dtype for t in narrow(change, *values)] == [f16, partial]


def test_a_merge_with_one_completed_source_is_a_read_of_two():
    *sources, query, key_weight = random_inputs((3, 16), [f64] * 2)
    mixed, lse = depth_attention_batch(sources[:1], [query], [key_weight])
    (out,) = depth_attention_merge(mixed, lse, sources[1], query, key_weight, gain=2.0)
    torch.testing.assert_close(out, depth_attention(sources, query, key_weight, gain=2.0), rtol=1e-12, atol=1e-12)


def test_one_tensor_may_stand_in_several_places():
    x = torch.randn(3, 8, dtype=f64, requires_grad=True)
    w = torch.randn(8, dtype=f64, requires_grad=True)
    (found,) = depth_attention_merge(x, x.sum(-1), x, w, w, norm=1, norm_weight=w)
    y, v = x.detach().requires_grad_(), w.detach().requires_grad_()
    expected = F.rms_norm(y, (8,), v, 1e-6)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found.sin().sum(), [x, w])
    for a, b in zip(grads, torch.autograd.grad(expected.sin().sum(), [y, v]), strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_outputs_that_are_used_need_gradients():
    sources, delta, query, key_weight, *_ = fused_inputs((3, 16), [f64] * 2)
    mixed, lse = depth_attention_batch(sources, [query], [key_weight])
    (found,) = torch.autograd.grad(lse.sum(), [query], retain_graph=True)
    logits = torch.stack([(s * query * key_weight).sum(-1) * (s.square().mean(-1) + 1e-6).rsqrt() for s in sources])
    torch.testing.assert_close(found, torch.autograd.grad(logits.logsumexp(0).sum(), [query])[0])
    _, partial = depth_attention_merge(mixed, lse, sources[0], query, key_weight, delta=delta)
    (found,) = torch.autograd.grad(partial.sum(), [delta])
    assert torch.equal(found, torch.ones_like(delta))


# -- transforms


def small_leaves():
    torch.manual_seed(0)
    weights = torch.randn(6, 6, dtype=f64).unbind(0)
    return [*weights, *torch.randn(4, 3, 6, dtype=f64).unbind(0)]


def loss(function):
    return lambda *leaves: sum((i + 1) * t.sin().sum() for i, t in enumerate(function(*leaves)))


@pytest.mark.slow
def test_gradients_of_gradients_are_right():
    leaves = [t.requires_grad_() for t in small_leaves()]
    assert torch.autograd.gradgradcheck(lambda *t: tuple(two_phase(*t)), leaves, atol=1e-4)


def test_func_grad_jvp_and_vmap_give_what_the_definition_gives():
    leaves = small_leaves()
    every = tuple(range(len(leaves)))
    close = torch.testing.assert_close
    close(grad(loss(two_phase), every)(*leaves), grad(loss(two_phase_exact), every)(*leaves))
    tangents = tuple(torch.randn_like(t) for t in leaves)
    close(jvp(two_phase, tuple(leaves), tangents), jvp(two_phase_exact, tuple(leaves), tangents))
    batched = [torch.stack([t, -t, 2 * t]) for t in leaves]
    close(vmap(two_phase)(*batched), vmap(two_phase_exact)(*batched))
    per_sample = vmap(grad(loss(two_phase), every))(*batched)
    close(per_sample, vmap(grad(loss(two_phase_exact), every))(*batched))


class TwoPhase(torch.nn.Module):
    def forward(self, *leaves):
        return two_phase(*leaves)


def test_each_is_one_node_in_an_exported_graph():
    program = torch.export.export(TwoPhase(), tuple(small_leaves()))
    targets = [n.target for n in program.graph.nodes]
    assert targets.count(BATCH) == 1 and targets.count(MERGE) == 2
    for a, b in zip(program.module()(*small_leaves()), two_phase(*small_leaves()), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_the_operators_keep_the_rules_of_custom_operators():
    sources, delta, query, key_weight, w, b = fused_inputs((3, 8), [f32] * 3)
    calls = [
        (FUSED, (sources, query, key_weight, 1e-6, 2.0, delta, 2, w, b, 1e-5, None)),
        (BATCH, (sources, [query, query], [key_weight, key_weight], 1e-6)),
        (MERGE, (sources[0], torch.zeros(3), sources[1], query, key_weight, 1e-6, 1.0, delta, 1, w, None, 0.0, None)),
    ]
    for op, args in calls:
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def saved(function):
    seen: dict[int, int] = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = function()
    assert kept is not None
    return sum(seen.values())


def test_eager_reads_save_what_they_are_given_and_no_temporaries():
    sources, delta, query, key_weight, w, b = fused_inputs((512, 64), [bf16] * 4)
    one = sources[0].nbytes

    def run():
        return two_phase(query, key_weight, query, key_weight, w, b, delta, sources[-1], *sources[:-1])

    assert saved(run) <= 3.2 * one + 3 * one + 0.5 * one  # completed sources; two mixtures and the partial sum; rows
