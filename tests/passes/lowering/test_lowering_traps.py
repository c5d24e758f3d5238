"""What lowering must leave alone: writes in place, reads that feed reads, norm modules that are not what they were."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attnres_fx as ax
from attnres_fx.ops import depth_attention

WIDTH = 16


def read(sources, query, key_weight):
    return depth_attention(sources, query, key_weight)


def written_in_place(a, b, c, d, *w):
    a, b = a.clone(), b.clone()
    p = d + c
    r1 = read([a, b, p], w[0], w[1])
    p = p + r1
    b[0] = 1.0
    r2 = read([a, b, p], w[2], w[3])
    p = p + r2
    a.add_(1)
    return r1, r2, read([a, b, p], w[4], w[5])


def input_written(a, b, c, d, *w):
    p = d + c
    r1 = read([a, b, p], w[0], w[1])
    p = p + r1
    a.mul_(2)
    return r1, read([a, b, p], w[2], w[3])


def a_read_is_added(a, b, c, d, *w):
    t = a + b
    r1 = read([c, t], w[0], w[1])
    t2 = t + r1
    return (read([c, t2], w[2], w[3]),)


def a_norm_is_a_weight(a, b, c, d, *w):
    n0 = F.rms_norm(read([a[0, 0], b[0, 0]], w[0], w[1]), (WIDTH,))
    return (F.rms_norm(read([a, b], w[2], n0), (WIDTH,), n0),)


@pytest.mark.parametrize("lowering", [{}, {"two_phase": True}, {"thread_gradients": True}], ids=str)
@pytest.mark.parametrize("program", [written_in_place, input_written, a_read_is_added, a_norm_is_a_weight])
@pytest.mark.slow_after(1)
def test_programs_with_reads_of_their_own_compute_the_same(program, lowering):
    torch.manual_seed(0)
    given = [torch.randn(2, 3, WIDTH) for _ in range(4)] + [torch.randn(WIDTH) for _ in range(6)]
    expected = program(*(t.clone() for t in given))
    options = {"inner": "aot_eager", "lowering": lowering}
    for context in (torch.no_grad, torch.enable_grad):
        torch._dynamo.reset()
        compiled = torch.compile(program, backend="attnres", fullgraph=True, options=options)
        with context():
            found = compiled(*(t.clone() for t in given))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


class Stack(nn.Module):
    def __init__(self, affine=True):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH, elementwise_affine=affine) for _ in range(3)])
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


def patched(module):
    module.forward = lambda h: h * 2


def given_a_weight(module):
    module.weight = nn.Parameter(torch.full((WIDTH,), 3.0))


@pytest.mark.parametrize("change", [patched, given_a_weight])
def test_a_norm_module_that_changes_after_convert_is_noticed(change):
    torch.manual_seed(0)
    x = torch.randn(2, WIDTH)
    outputs = []
    for lowering in (None, ax.Lowering(fuse_norms=False, fuse_partial_sums=False, two_phase=False)):
        torch.manual_seed(1)
        traced = torch.fx.symbolic_trace(Stack(affine=change is patched))
        converted = ax.convert(traced, (x,), lowering=lowering)
        change(converted.get_submodule("norms.1"))
        outputs.append(converted(x))
    torch.testing.assert_close(*outputs)


def test_a_norm_patched_before_convert_and_a_hook_on_all_modules_stay_in_force():
    x = torch.randn(2, WIDTH)
    model = Stack()
    patched(model.norms[1])
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(ax.convert(traced, (x,))(x), traced(x))
    torch.manual_seed(0)
    plain = ax.convert(torch.fx.symbolic_trace(Stack()), (x,))
    expected = plain(x)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: out * 2 if isinstance(module, nn.LayerNorm) else None
    )
    try:
        assert not torch.allclose(plain(x), expected)
    finally:
        handle.remove()
    torch.testing.assert_close(plain(x), expected)
