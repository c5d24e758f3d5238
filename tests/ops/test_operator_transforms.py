"""Depth attention under torch.func, higher and forward-mode autograd, autocast, tracers and compilers."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attnres_fx.ops import depth_attention

DEPTH_ATTENTION = torch.ops.attnres_fx.depth_attention.default
GAIN = 3.0


def attend(a: Tensor, b: Tensor, c: Tensor, query: Tensor, key_weight: Tensor) -> Tensor:
    return depth_attention([a, b, c], query, key_weight, gain=GAIN)


def oracle(a: Tensor, b: Tensor, c: Tensor, query: Tensor, key_weight: Tensor) -> Tensor:
    values = torch.stack([a, b, c])
    keys = torch.nn.functional.rms_norm(values, values.shape[-1:], key_weight, 1e-6)
    weights = torch.einsum("s...d,d->s...", keys, query).softmax(0)
    return GAIN * torch.einsum("s...,s...d->...d", weights, values)


def inputs(*shape: int, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> list[Tensor]:
    """Three sources [*shape], a query and a key_weight."""
    torch.manual_seed(0)
    tensors = [*(torch.randn(shape, dtype=dtype) for _ in range(3)), *torch.randn(2, shape[-1], dtype=dtype)]
    return [t.clone().requires_grad_(requires_grad) for t in tensors]


def same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def loss(function):
    return lambda *args: function(*args).sin().sum()


EVERY = (0, 1, 2, 3, 4)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.slow
def test_the_operator_keeps_the_rules_of_custom_operators(requires_grad):
    *sources, query, key_weight = inputs(3, 8, dtype=torch.float32, requires_grad=requires_grad)
    results = torch.library.opcheck(DEPTH_ATTENTION, (sources, query, key_weight, 1e-6, GAIN))
    assert set(results.values()) == {"SUCCESS"}


# -- torch.func


def test_func_grad_and_vjp_give_the_gradients_of_the_definition():
    args = inputs(4, 3, 8)
    same(grad(loss(attend), EVERY)(*args), grad(loss(oracle), EVERY)(*args))
    cotangent = torch.randn(4, 3, 8, dtype=torch.float64)
    same(vjp(attend, *args)[1](cotangent), vjp(oracle, *args)[1](cotangent))


@pytest.mark.parametrize(
    ("batched", "axes"),
    [
        ("all sources", (0, 0, 0, None, None)),
        ("one source", (None, 0, None, None, None)),
        ("the last axis but one of a source", (None, 1, None, None, None)),
        ("query", (None, None, None, 0, None)),
        ("key_weight", (None, None, None, None, 0)),
        ("sources and query", (0, 1, 0, 0, None)),
        ("everything", (0, 0, 0, 1, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_vmap_is_the_loop_over_its_examples(batched, axes):
    args = inputs(3, 8)
    examples = [[t if a is None else torch.randn_like(t) for t, a in zip(args, axes, strict=True)] for _ in range(5)]
    stacked = [
        t if a is None else torch.stack([e[i] for e in examples], a)
        for i, (t, a) in enumerate(zip(args, axes, strict=True))
    ]
    same(vmap(attend, axes)(*stacked), torch.stack([oracle(*e) for e in examples]))
    per_sample = vmap(grad(loss(attend), EVERY), axes)(*stacked)
    expected = [grad(loss(oracle), EVERY)(*e) for e in examples]
    same(per_sample, tuple(torch.stack(parts) for parts in zip(*expected, strict=True)))


def test_vmap_nests():
    a, b, c, _query, key_weight = inputs(2, 3, 8)
    queries = torch.randn(4, 8, dtype=torch.float64)
    nested = vmap(vmap(attend, (None, None, None, 0, None)), (0, 0, 0, None, None))
    expected = [[oracle(a[i], b[i], c[i], q, key_weight) for q in queries] for i in range(2)]
    same(nested(a, b, c, queries, key_weight), torch.stack([torch.stack(row) for row in expected]))


def test_jvp_and_linearize_give_the_directional_derivative_of_the_definition():
    args, tangents = inputs(3, 8), [torch.randn_like(t) for t in inputs(3, 8)]
    expected = jvp(oracle, tuple(args), tuple(tangents))
    same(jvp(attend, tuple(args), tuple(tangents)), expected)
    same(linearize(attend, *args)[1](*tangents), expected[1])


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians_match_the_definition(transform):
    args = inputs(2, 4)
    same(transform(attend, EVERY)(*args), jacrev(oracle, EVERY)(*args))


def test_hessian_matches_the_definition():
    args = inputs(2, 4)
    same(hessian(loss(attend), EVERY)(*args), hessian(loss(oracle), EVERY)(*args))


# -- autograd beyond one backward


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
def test_gradients_of_gradients_are_right(shape):
    args = inputs(*shape, requires_grad=True)
    assert torch.autograd.gradcheck(attend, args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(attend, args)


def test_gradients_of_gradients_are_right_for_a_tensor_given_twice_and_frozen_weights():
    a, b, _, query, key_weight = inputs(2, 3, requires_grad=True)
    query.requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda a, b, k: attend(a, b, a, query, k), (a, b, key_weight))


@pytest.mark.parametrize("slots", [(0, 1, 2, 3, 4), (0, 1, 0, 3, 4), (0, 1, 2, 3, 3)], ids=str)
def test_a_gradient_kept_for_a_second_backward_is_the_same_gradient(slots):
    leaves = inputs(3, 8, requires_grad=True)
    args = [leaves[slot] for slot in slots]
    plain = torch.autograd.grad(loss(attend)(*args), args)
    same(torch.autograd.grad(loss(attend)(*args), args, create_graph=True), plain)


def test_batched_gradients_are_the_gradients_one_by_one():
    args = inputs(3, 8, requires_grad=True)
    out, grads = attend(*args), torch.randn(4, 3, 8, dtype=torch.float64)
    one_by_one = [torch.autograd.grad(out, args, g, retain_graph=True) for g in grads]
    batched = torch.autograd.grad(out, args, grads, is_grads_batched=True)
    same(batched, tuple(torch.stack(parts) for parts in zip(*one_by_one, strict=True)))


def test_forward_mode_duals_carry_the_tangent_of_the_definition():
    args, tangents = inputs(3, 8), [torch.randn_like(t) for t in inputs(3, 8)]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(args, tangents, strict=True)]
        primal, tangent = forward_ad.unpack_dual(attend(*duals))
    same((primal, tangent), jvp(oracle, tuple(args), tuple(tangents)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient(use_reentrant):
    args = inputs(3, 8, requires_grad=True)
    plain = torch.autograd.grad(loss(attend)(*args), args)
    checkpoint(loss(attend), *args, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(args, plain, strict=True))


# -- modes


def test_autocast_changes_nothing_for_inputs_of_one_dtype():
    args = inputs(3, 8, dtype=torch.float32, requires_grad=True)
    expected = attend(*args)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*args)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    same(torch.autograd.grad(loss(lambda: out)(), args), torch.autograd.grad(loss(lambda: expected)(), args))


def test_under_autocast_a_float32_embedding_meets_bfloat16_outputs():
    embedding, b, _, query, key_weight = inputs(3, 8, dtype=torch.float32, requires_grad=True)
    linear = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        branch = linear(b)
        out = attend(embedding, branch, branch, query, key_weight)
    assert branch.dtype == torch.bfloat16 and out.dtype == torch.float32
    exact = oracle(embedding, branch.float(), branch.float(), query, key_weight)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    leaves = (embedding, b, query, key_weight, linear.weight)
    found, right = (torch.autograd.grad(y.sum(), leaves, retain_graph=True) for y in (out, exact))
    torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2)


def test_inference_mode_gives_the_same_bits():
    args = inputs(3, 8, requires_grad=True)
    with torch.inference_mode():
        out = attend(*args)
    assert out.is_inference() and torch.equal(out, attend(*args))


def test_being_watched_by_a_dispatch_mode_changes_no_number():
    args = inputs(3, 8, requires_grad=True)
    with FlopCounterMode(display=False):
        watched = attend(*args)
        found = torch.autograd.grad(watched.sin().sum(), args)
    same((watched, *found), (attend(*args), *torch.autograd.grad(loss(attend)(*args), args)))


# -- tracers and compilers


class Reader(torch.nn.Module):
    """Depth attention between two other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(8))
        self.key_weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return depth_attention([a, b.relu(), a], self.query, self.key_weight, gain=3.0).tanh()


def reader_and_inputs(rows: int = 5) -> tuple[Reader, list[Tensor]]:
    torch.manual_seed(0)
    return Reader(), [torch.randn(rows, 8, requires_grad=True) for _ in range(2)]


def calls(graph: torch.fx.Graph) -> list:
    return [node.target for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_export_keeps_one_node(strict, dynamic):
    reader, args = reader_and_inputs()
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(reader, tuple(args), strict=strict, dynamic_shapes=(rows, rows) if dynamic else None)
    aten = torch.ops.aten
    assert calls(program.graph) == [aten.relu.default, DEPTH_ATTENTION, aten.tanh.default]
    more = reader_and_inputs(11 if dynamic else 5)[1]
    torch.testing.assert_close(program.module()(*more), reader(*more))


def test_decomposing_an_exported_program_leaves_aten_operations_and_the_numbers():
    reader, args = reader_and_inputs()
    program = torch.export.export(reader, tuple(args)).run_decompositions()
    assert DEPTH_ATTENTION not in calls(program.graph)
    torch.testing.assert_close(program.module()(*args), reader(*args))


def test_dynamo_keeps_one_node():
    seen = []

    def look(gm, example_inputs):
        seen.extend(calls(gm.graph))
        return gm

    reader, args = reader_and_inputs()
    torch.testing.assert_close(torch.compile(reader, backend=look, fullgraph=True)(*args), reader(*args))
    assert seen.count(DEPTH_ATTENTION) == 1


def check_compiled(backend: str) -> None:
    """Numbers and every gradient, at two sizes of which the second is dynamic."""
    torch.compiler.reset()
    reader, _ = reader_and_inputs()
    compiled = torch.compile(reader, backend=backend, fullgraph=True, dynamic=True)
    for rows in (5, 11):
        args = reader_and_inputs(rows)[1]
        wanted = [*args, *reader.parameters()]
        outs = compiled(*args), reader(*args)
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), wanted) for out in outs))


@pytest.mark.slow
def test_aot_eager_computes_the_same():
    check_compiled("aot_eager")


@pytest.mark.slow
def test_inductor_computes_the_same():
    check_compiled("inductor")


@pytest.mark.parametrize("pre_dispatch", [True, False])
def test_make_fx_traces_with_symbolic_sizes(pre_dispatch):
    args = inputs(5, 8)
    traced = make_fx(attend, tracing_mode="symbolic", pre_dispatch=pre_dispatch)(*args)
    assert calls(traced.graph).count(DEPTH_ATTENTION) == pre_dispatch
    more = inputs(11, 8)
    same(traced(*more), oracle(*more))


def test_symbolic_trace_of_a_graph_that_holds_the_node_keeps_it():
    reader, args = reader_and_inputs()
    graph_module = torch.export.export(reader, tuple(args)).module(check_guards=False)
    traced = torch.fx.symbolic_trace(graph_module)
    assert calls(traced.graph).count(DEPTH_ATTENTION) == 1
    torch.testing.assert_close(traced(*args), reader(*args))


def test_functional_call_reads_with_the_weights_it_is_given():
    reader, args = reader_and_inputs()
    weights = {"query": torch.randn(8), "key_weight": torch.randn(8)}
    expected = depth_attention([args[0], args[1].relu(), args[0]], *weights.values(), gain=3.0).tanh()
    assert torch.equal(functional_call(reader, weights, tuple(args)), expected)


class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(8))
        self.key_weight = torch.nn.Parameter(torch.randn(8))

    def forward(self, x, y):
        return depth_attention([x, y], self.query, self.key_weight, gain=2.0)


def test_symbolic_trace_of_code_that_calls_the_function_holds_the_node():
    model, (x, y) = Mixture(), torch.randn(2, 3, 8)
    gm = torch.fx.symbolic_trace(model)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [DEPTH_ATTENTION]
    torch.testing.assert_close(gm(x, y), model(x, y), rtol=0, atol=0)
