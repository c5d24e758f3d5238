"""Checks of the Triton kernels, run in Triton's interpreter on the CPU: `python tests/support/kernel_checks.py NAME`.

Each is held against float64 arithmetic written out here, apart from the library's own definition.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import itertools
import logging
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import opcheck

from attnres_fx.ops import depth_attention, kernels
from attnres_fx.ops.epilogue import Epilogue
from attnres_fx.ops.fused import depth_attention_fused
from attnres_fx.ops.kernels import autograd, kernel_read, layout
from attnres_fx.ops.kernels import launch as launches
from attnres_fx.ops.phases import depth_attention_batch, depth_attention_merge
from attnres_fx.ops.read_tensors import read_of

CHECKS: dict[str, Callable[[], None]] = {}
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (8e-3, 2e-2), torch.float16: (2e-3, 5e-3)}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def oracle(
    sources: list[Tensor],
    query: Tensor,
    key_weight: Tensor,
    gain: float,
    delta: Tensor | None = None,
    norm: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    norm_eps: float = 1e-5,
) -> list[Tensor]:
    partial = sources[-1] + delta if delta is not None else None
    values = torch.stack([*sources[:-1], partial] if partial is not None else sources)
    keys = values / (values.pow(2).mean(-1, keepdim=True) + eps).sqrt() * key_weight
    out = gain * (torch.softmax((keys * query).sum(-1), 0).unsqueeze(-1) * values).sum(0)
    if norm == 1:
        out = out / (out.pow(2).mean(-1, keepdim=True) + norm_eps).sqrt()
    if norm == 2:
        out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, keepdim=True, correction=0) + norm_eps).sqrt()
    out = out if norm_weight is None else out * norm_weight
    out = out if norm_bias is None else out + norm_bias
    return [out] if partial is None else [out, partial]


def compare(
    sources: list[Tensor],
    *,
    gain: float | None = None,
    delta: Tensor | None = None,
    norm: int = 0,
    weighted: bool = True,
    tolerance: tuple[float, float] | None = None,
    threaded: bool = False,
) -> list[Tensor]:
    """Outputs and gradients against the oracle; returns the gradients of sources, query and key gain."""
    width = sources[0].shape[-1]
    gain = float(len(sources)) if gain is None else gain
    dtype = sources[0].dtype
    query = torch.randn(width).mul(width**-0.5)
    key_weight = 1 + 0.1 * torch.randn(width)
    norm_weight = 1 + 0.1 * torch.randn(width) if norm and weighted else None
    norm_bias = torch.randn(width) if norm == 2 and weighted else None
    given = [*sources, delta, query, key_weight, norm_weight, norm_bias]
    leaves = [t.detach().requires_grad_() if t is not None else None for t in given]
    exact = [t.detach().double().requires_grad_() if t is not None else None for t in given]
    count = len(sources)
    epilogue = Epilogue(leaves[count], norm, leaves[count + 3], leaves[count + 4], 1e-5)
    weights = leaves[count + 1], leaves[count + 2]
    read = read_of(leaves[:count], *weights, 1e-6, gain, epilogue, returns_sources=threaded)
    out = kernel_read(*read, lambda *_: [])
    expected = oracle(
        exact[:count], exact[count + 1], exact[count + 2], gain, exact[count], norm, exact[count + 3], exact[count + 4]
    )
    if threaded:
        expected += exact[: count - (delta is not None)]
    grads = [torch.randn(o.shape).to(o.dtype) for o in out]
    wanted = [t for t in leaves if t is not None]
    found = torch.autograd.grad(out, wanted, grads)
    right = torch.autograd.grad(expected, [t for t in exact if t is not None], [g.double() for g in grads])
    forward, backward = tolerance or TOLERANCES[dtype]
    for a, b in zip(out, expected, strict=True):
        _close(a, b, forward, "output")
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        _close(a, b, backward, f"gradient {i}")
    return list(found)


def _close(found: Tensor, right: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == right.shape, (what, found.shape, right.shape)
    assert torch.isfinite(found).all(), f"{what} is not finite"
    if right.numel() == 0:
        return
    scale = right.abs().max().clamp_min(1e-12)
    error = ((found.double() - right).abs().max() / scale).item()
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance}"


def _heard() -> list[str]:
    """What the library says in the log from here on."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("attnres_fx").addHandler(handler)
    return heard


def sources_of(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(*shape).to(dtype) for _ in range(count)]


@check
def shapes() -> None:
    for count, tokens, width in [(1, 1, 1), (33, 2, 2047), (9, 2, 2049), (37, 8, 200), (3, 4, 1000), (2, 2, 7186)]:
        compare(sources_of(count, tokens, width))


@check
def wide_and_deep() -> None:
    compare(sources_of(9, 2, 7168, dtype=torch.bfloat16))
    compare(sources_of(129, 1, 8192), tolerance=(1e-5, 2e-4))


@check
def fusions() -> None:
    cases = list(itertools.product((5,), (0, 1, 2), (False, True)))
    cases += [(1, 0, True), (1, 1, True), (1, 2, False), (17, 0, False), (17, 1, False), (17, 2, True)]
    for count, norm, with_delta in cases:
        compare(sources_of(count, 4, 72), norm=norm, delta=torch.randn(4, 72) if with_delta else None)
    compare(sources_of(4, 4, 72), norm=1, weighted=False)
    compare(sources_of(4, 4, 72), norm=2, weighted=False)


@check
def dtypes() -> None:
    for dtype, norm in [(torch.float32, 2), *itertools.product((torch.bfloat16, torch.float16), (0, 1, 2))]:
        compare(sources_of(5, 4, 300, dtype=dtype), norm=norm, delta=torch.randn(4, 300).to(dtype))


@check
def mixed_dtypes() -> None:
    sources = [
        t.to(d) for t, d in zip(sources_of(3, 5, 64), (torch.float32, torch.bfloat16, torch.float16), strict=True)
    ]
    compare(sources, tolerance=(1e-5, 1e-2))
    out = kernel_read(*read_of(sources, torch.randn(64), torch.ones(64), 1e-6, 1.0), lambda *_: [])
    assert out[0].dtype == torch.float32
    halves = read_of([sources[1], sources[1]], torch.randn(64), torch.ones(64), 1e-6, 1.0)
    assert kernel_read(*halves, lambda *_: [])[0].dtype == torch.bfloat16


@check
def threaded_gradients() -> None:
    for count in (1, 5, 18):
        compare(sources_of(count, 4, 40), threaded=True)
        compare(sources_of(count, 4, 40), threaded=True, delta=torch.randn(4, 40), norm=1)


@check
def threaded_reads_leave_autograd_nothing_to_add() -> None:
    from torch._dynamo.backends.common import aot_autograd

    threaded, fused = torch.ops.attnres_fx.depth_attention_threaded, torch.ops.attnres_fx.depth_attention_fused
    rest = (torch.ones(32), 1e-6, 1.0, None, 0, None, None, 0.0, None)
    adds: list[int] = []

    def count(gm: torch.fx.GraphModule, _: Any) -> Any:
        from functorch.compile import make_boxed_func

        adds.append(sum(n.target is torch.ops.aten.add.Tensor and n.meta["val"].numel() > 32 for n in gm.graph.nodes))
        return make_boxed_func(gm.forward)

    def plain(q: Tensor, *s: Tensor) -> Tensor:
        return torch.cat([fused(list(s), (i + 1.0) * q, *rest)[0] for i in range(3)])

    def handed_on(q: Tensor, *s: Tensor) -> Tensor:
        outs, sources = [], list(s)
        for i in range(3):
            out, *sources = threaded(sources, (i + 1.0) * q, *rest)
            outs.append(out)
        return torch.cat(outs)

    given = (torch.linspace(-1, 1, 32), *torch.arange(3 * 5 * 32.0).sin().view(3, 5, 32))
    gradients = []
    for read in (plain, handed_on):
        compiled = torch.compile(read, backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True)
        leaves = [t.clone().requires_grad_() for t in given]
        gradients.append(torch.autograd.grad(compiled(*leaves).sin().sum(), leaves))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert adds == [0, 6, 0, 0], adds


@check
def two_phases() -> None:
    for count, queries, tokens, width, dtype in [
        (3, 2, 5, 64, torch.float32),
        (9, 4, 7, 200, torch.float32),
        (2, 18, 3, 100, torch.float32),
        (1, 1, 0, 40, torch.float32),
        (4, 3, 70, 130, torch.bfloat16),
    ]:
        sources, partial = sources_of(count, tokens, width, dtype=dtype), torch.randn(tokens, width).to(dtype)
        delta = torch.randn(tokens, width).to(dtype)
        weights = [torch.randn(width).mul(width**-0.5) for _ in range(queries)]
        gains = [1 + 0.1 * torch.randn(width) for _ in range(queries)]
        given = [*sources, partial, delta, *weights, *gains]
        leaves = [t.detach().requires_grad_() for t in given]
        exact = [t.detach().double().requires_grad_() for t in given]
        q, k = slice(count + 2, count + 2 + queries), slice(count + 2 + queries, None)
        phase = depth_attention_batch(leaves[:count], leaves[q], leaves[k])
        out: list[Tensor] = [*phase[1:queries]]
        last = phase[0], phase[queries], leaves[count], leaves[q][0], leaves[k][0]
        out += depth_attention_merge(*last, gain=2.0, delta=leaves[count + 1], norm=1, norm_eps=1e-5)
        right = [oracle(exact[:count], a, b, 1.0)[0] for a, b in zip(exact[q][1:], exact[k][1:], strict=True)]
        right += oracle(exact[: count + 1], exact[q][0], exact[k][0], 2.0, exact[count + 1], 1)
        grads = [torch.randn(o.shape).to(o.dtype) for o in out]
        found = torch.autograd.grad(out, leaves, grads)
        wanted = torch.autograd.grad(right, exact, [g.double() for g in grads])
        forward, backward = TOLERANCES[dtype]
        for a, b in zip((*out, *found), (*right, *wanted), strict=True):
            _close(a, b, backward if a.requires_grad is False else 2 * forward, "two phases")


@check
def gradients_of_gradients() -> None:
    weight, delta = torch.randn(24).double(), torch.randn(3, 24).double()
    sources = [t.double() for t in sources_of(3, 3, 24)]

    def loss(kind: str, dtype: torch.dtype, q: Tensor, *s: Tensor) -> Tensor:
        w, d = weight.to(dtype), delta.to(dtype)
        if kind == "fused":
            out = depth_attention_fused(s, q, w, delta=d, norm=2)[0]
        else:
            mixed, lse = depth_attention_batch(s[:2], [q], [w])
            out = depth_attention_merge(mixed, lse, s[2], q, w, delta=d, norm=1)[0]
        return out.sin().sum()

    for kind in ("fused", "two phases"):
        found = []
        for dtype in (torch.float32, torch.float64):
            leaves = [t.to(dtype).requires_grad_() for t in (weight + 1, *sources)]
            first = torch.autograd.grad(loss(kind, dtype, *leaves), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        for a, b in zip(*found, strict=True):
            _close(a, b, 1e-3, kind)


@check
def strides() -> None:
    wide = torch.randn(5, 3 * 64)
    compare([wide[:, :64], wide[:, 64:128], wide[:, 128:]])
    turned = torch.randn(4, 3, 64).transpose(0, 1)
    compare([turned, torch.randn(3, 4, 64)])
    compare([torch.randn(64, 6).t(), torch.randn(6, 64)])
    compare([torch.randn(1, 64).expand(6, 64), torch.randn(6, 64)])
    misaligned = torch.randn(6 * 64 + 3)[3:].view(6, 64)
    compare([misaligned, torch.randn(6, 64)])
    compare([t.view(2, 3, 1, 64) for t in sources_of(3, 6, 64)])


@check
def copies_are_said_once() -> None:
    autograd._say_copied.cache_clear()
    heard = _heard()
    for _ in range(3):
        depth_attention([torch.randn(64, 6).t()], torch.randn(64), torch.ones(64))
    assert len(heard) == 1 and "is copied" in heard[0], heard
    depth_attention([torch.randn(6, 128)[:, :64]], torch.randn(64), torch.ones(64))
    assert len(heard) == 1, heard


@check
def one_tensor_twice() -> None:
    value = torch.randn(5, 48, requires_grad=True)
    query, key_weight = torch.randn(48), torch.ones(48)
    out = depth_attention([value, value, torch.ones(5, 48)], query, key_weight)
    out.square().sum().backward()
    exact = value.detach().double().requires_grad_()
    ones = torch.ones(5, 48, dtype=torch.float64)
    (right,) = oracle([exact, exact, ones], query.double(), key_weight.double(), 1.0)
    right.square().sum().backward()
    _close(value.grad, exact.grad, 1e-4, "gradient")


@check
def no_tokens() -> None:
    for found in compare(sources_of(5, 0, 32), norm=1, delta=torch.randn(0, 32)):
        assert not found.any()


@check
def one_source() -> None:
    source = torch.randn(7, 100, requires_grad=True)
    query, key_weight = torch.randn(100, requires_grad=True), torch.randn(100, requires_grad=True)
    out = depth_attention([source], query, key_weight, gain=3.0)
    assert torch.equal(out, 3.0 * source)
    out.sin().sum().backward()
    assert not query.grad.any() and not key_weight.grad.any()


@check
def poisoned_memory() -> None:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    compare(sources_of(18, 5, 72), norm=1, delta=torch.randn(5, 72))
    compare(sources_of(3, 2, 72), norm=2)


@check
def same_bits_in_two_runs() -> None:
    def once() -> list[Tensor]:
        torch.manual_seed(1)
        return compare(sources_of(9, 11, 130, dtype=torch.bfloat16), norm=1, delta=torch.randn(11, 130).bfloat16())

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


@check
def large_logits_stay_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        sources = [
            torch.full((3, 64), 6e4).to(dtype),
            torch.full((3, 64), -6e4).to(dtype),
            torch.zeros(3, 64).to(dtype),
        ]
        leaves = [s.requires_grad_() for s in sources]
        query = torch.full((64,), 1e4, requires_grad=True)
        out = depth_attention(leaves, query, torch.ones(64))
        assert torch.isfinite(out).all() and torch.equal(out, leaves[0])
        out.float().sum().mul(1e-3).backward()
        assert all(torch.isfinite(t.grad).all() for t in (*leaves, query))


@check
def gradients_where_wanted() -> None:
    sources = sources_of(3, 4, 40)
    sources[1].requires_grad_()
    query = torch.randn(40)
    out = depth_attention(sources, query, torch.ones(40))
    out.sum().backward()
    assert sources[1].grad is not None and sources[0].grad is None
    exact = [s.detach().double() for s in sources]
    exact[1].requires_grad_()
    oracle(exact, query.double(), torch.ones(40, dtype=torch.float64), 1.0)[0].sum().backward()
    _close(sources[1].grad, exact[1].grad, 1e-4, "gradient")


@check
def transforms_take_the_definition() -> None:
    sources, query, key_weight = sources_of(3, 4, 16), torch.randn(16), torch.ones(16)

    def loss(q: Tensor, *s: Tensor) -> Tensor:
        return depth_attention(s, q, key_weight).sin().sum()

    eager = query.clone().requires_grad_()
    (right,) = torch.autograd.grad(loss(eager, *sources), eager)
    torch.testing.assert_close(torch.func.grad(loss)(query, *sources), right, rtol=1e-4, atol=1e-5)
    _, pushed = torch.func.jvp(lambda q: loss(q, *sources), (query,), (torch.ones(16),))
    torch.testing.assert_close(pushed, right.sum(), rtol=1e-4, atol=1e-4)
    mapped = torch.vmap(lambda s: depth_attention([s, s + 1], query, key_weight))(sources[0])
    torch.testing.assert_close(mapped, depth_attention([sources[0], sources[0] + 1], query, key_weight))
    first = torch.autograd.grad(loss(eager, *sources), eager, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.square().sum(), eager)
    exact = torch.func.grad(lambda q: torch.func.grad(loss)(q, *sources).square().sum())(query)
    torch.testing.assert_close(second, exact, rtol=1e-3, atol=1e-4)


@check
def operators_are_registered_right() -> None:
    rows, weight = sources_of(3, 5, 48), torch.randn(48)
    given: tuple[Any, ...] = (
        rows,
        weight,
        weight,
        1e-6,
        2.0,
        rows[0],
        None,
        None,
        1,
        weight,
        None,
        1e-6,
        torch.float32,
        True,
        None,
        False,
    )
    assert set(opcheck(torch.ops.attnres_fx.read_forward, given).values()) == {"SUCCESS"}
    out, partial, lse, stats, norm_stats = torch.ops.attnres_fx.read_forward(*given)
    rows = [*rows[:-1], partial]
    back = (
        *(out, None, [None, rows[0], None], rows, weight, weight, 2.0, None, None, 1, weight, None),
        *(lse, stats, norm_stats, [True, True, False], True, None, False),
    )
    assert set(opcheck(torch.ops.attnres_fx.read_backward, back).values()) == {"SUCCESS"}


@check
def compiled_without_recompiling() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    weight = torch.ones(64)

    def read(q: Tensor, *s: Tensor) -> Tensor:
        return depth_attention(s, q, weight)

    compiled = torch.compile(read, backend=counter, fullgraph=True, dynamic=True)
    first = 0
    for tokens in (4, 9, 17):
        sources = [t.requires_grad_() for t in sources_of(3, 2, tokens, 64)]
        query = torch.randn(64, requires_grad=True)
        found = torch.autograd.grad(compiled(query, *sources).sin().sum(), [query, *sources])
        right = torch.autograd.grad(read(query, *sources).sin().sum(), [query, *sources])
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        first = first or counter.frame_count  # one, or two where Dynamo begins again with a width that is fixed
        assert counter.frame_count == first, counter.frame_count
    inductor = torch.compile(read, fullgraph=True)
    sources = sources_of(3, 2, 5, 64)
    torch.testing.assert_close(inductor(torch.ones(64), *sources), read(torch.ones(64), *sources))


@check
def many_kernels_many_launches_same_bits() -> None:
    sources = sources_of(5, 10, 96)
    query, weight = torch.randn(96), torch.ones(96)
    usual = depth_attention(sources, query, weight)
    for launch in kernels.tuning.candidates("forward", 5, 96, torch.float32):
        with kernels.launch_with(launch):
            assert torch.equal(depth_attention(sources, query, weight), usual)
    for programs in (1, 2, 7, 64):
        launches._INTERPRETED_PROGRAMS = programs
        assert torch.equal(depth_attention(sources, query, weight), usual)


@check
def tensors_sharded_by_tokens() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    locals_ = sources_of(3, 2, 4, 64)
    query, gain, delta = torch.randn(64), torch.ones(64), torch.randn(2, 4, 64)

    def place(t: Tensor, *placements: Any) -> Any:
        return DTensor.from_local(t.clone(), mesh, placements).requires_grad_()

    for shard in (0, 1, 2):
        given = [place(t, Shard(shard)) for t in (*locals_, delta)]
        whole = [place(query, Replicate()), place(gain, Replicate())]
        if shard == 2:
            width = DTensor.from_local(torch.cat([query, query]), mesh, [Replicate()])
            out = depth_attention(given[:3], width, torch.ones_like(width))
            assert isinstance(out, DTensor)  # the definition, with its communication
            continue
        out, partial = depth_attention_fused(given[:3], *whole, delta=given[3], norm=1)
        right, summed = depth_attention_fused(locals_, query, gain, delta=delta, norm=1)
        assert out.placements == (Shard(shard),) and out.shape[shard] == 2 * right.shape[shard]
        assert torch.equal(out.to_local(), right) and torch.equal(partial.to_local(), summed)
        depth_attention(given[:3], *whole).sum().backward()
        assert whole[0].grad.placements[0].is_partial() and given[0].grad.placements == (Shard(shard),)
        assert out.grad_fn is not None and "Kernel" in _history(out)
    dist.destroy_process_group()


def _history(out: Tensor) -> str:
    seen, names, todo = set(), [], [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(type(node).__name__)
            todo += [n for n, _ in node.next_functions]
    return " ".join(names)


@check
def what_kernels_do_not_take() -> None:
    wide = torch.randn(2, layout.MOST_WIDTH + 1)
    query = torch.randn(layout.MOST_WIDTH + 1)
    assert not kernels.usable([wide], query)
    assert depth_attention([wide, wide], query, query).shape == wide.shape
    assert not kernels.usable([torch.randn(2, 4, dtype=torch.float64)])
    assert kernels.usable([torch.randn(2, 4)])
    heard = _heard()
    many, weight = sources_of(17, 3, 24), torch.randn(24)
    for _ in range(2):
        mixed, _ = depth_attention_batch(many, [weight], [torch.ones(24)])
    _close(mixed, oracle([s.double() for s in many], weight.double(), torch.ones(24).double(), 1.0)[0], 1e-5, "phase 1")
    assert len(heard) == 1 and "17 sources" in heard[0], heard


def passes(name: str) -> bool:
    """Whether a check passes in a child of this process: some leave switches set, and imports cost more than most."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    try:
        torch.manual_seed(0)
        CHECKS[name]()
        print(f"{name}: ok", flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    depth_attention([torch.ones(1, 8)], torch.ones(8), torch.ones(8))  # every child has what the first call imports
    sys.exit(not all(passes(name) for name in sys.argv[1:] or list(CHECKS)))
