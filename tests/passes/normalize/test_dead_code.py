"""What nothing looks at is left out; what has an effect or draws random numbers stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnres_fx as ax
from attnres_fx.passes.normalize.dead_code import remove_dead_code_pass
from attnres_fx.passes.normalize.functional_form import functional_form
from tests.support.ways_in import WAYS, check_same


def names_left(function, *inputs):
    gm = torch.fx.symbolic_trace(function)
    remove_dead_code_pass(gm)
    left = [n.name for n in gm.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
    gm.recompile()
    assert torch.equal(gm(*inputs), function(*inputs))
    return left


def test_a_chain_of_unused_sums_goes_and_the_rest_stays():
    def program(x):
        unused = x + x.exp()
        unused.mean()
        return x * 2

    assert names_left(program, torch.ones(2)) == ["mul"]


def test_writes_draws_checks_and_foreign_calls_stay():
    def program(x):
        y = x.clone()
        y.mul_(2)  # a method that torch.fx's own pass takes for pure
        F.dropout(x, 0.5, True)
        torch.rand_like(x)
        F.batch_norm(x, torch.zeros(2), torch.ones(2), training=True)
        F.dropout(x, 0.5, False)
        torch._assert(x.sum() > 0, "positive")
        return y

    left = names_left(program, torch.ones(3, 2))
    assert [n for n in left if "mul_" in n or "rand" in n or "batch" in n or "assert" in n]
    assert sum("dropout" in n for n in left) == 1
    assert {"mul_", "rand_like", "batch_norm", "_assert"} <= set(left)


def test_a_pass_that_finds_nothing_dead_says_so():
    gm = torch.fx.symbolic_trace(lambda x: x * 2)
    before = str(gm.graph)
    assert not remove_dead_code_pass(gm).modified
    assert str(gm.graph) == before


def unused_sums(m, x):
    x = m.inp(x)
    for i in range(3):
        _ = x + m.extra(x)
        x = x + m.branch(i, x)
    return m.norms[-1](x)


def unused_sums_that_draw(m, x):
    x = m.inp(x)
    for i in range(3):
        _ = x + F.dropout(m.extra(x), 0.5, m.training)
        x = x + F.dropout(m.branch(i, x), 0.2, m.training)
    return m.norms[-1](x)


def the_shape_of_an_unused_sum(m, x):
    x = m.inp(x)
    unused = x + m.extra(x)
    zeros = torch.zeros(unused.shape)
    for i in range(3):
        x = x + m.branch(i, x)
    return m.norms[-1](x) + zeros


def unused_sums_in_place(m, x):
    x = m.inp(x)
    for i in range(3):
        unused = x.clone()
        unused += m.extra(x)
        unused.mul_(2)
        x = x + m.branch(i, x)
    return m.norms[-1](x)


def statistics_of_states(m, x):
    x = m.inp(x)
    for i in range(3):
        x = x + m.branch(i, x)
        (x * 2).std()
        m.ema.copy_(x.detach().mean((0, 1)))
    return m.norms[-1](x)


def the_same_state_twice(m, x):
    x = m.inp(x)
    for i in range(3):
        y = m.branch(i, x)
        x = x + y + 0 * x if i == 2 else x + y
    return m.norms[-1](x)


DEAD = [
    unused_sums,
    unused_sums_that_draw,
    the_shape_of_an_unused_sum,
    unused_sums_in_place,
    statistics_of_states,
    the_same_state_twice,
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("program", DEAD, ids=lambda p: p.__name__)
def test_a_model_with_dead_code_has_the_reads_it_has_without(program, way):
    found = check_same(program, way)
    assert len(found.attnres.reads) == 3
    assert all(r.query.grad is not None for r in found.attnres.reads)


def test_a_last_update_that_nobody_reads_is_no_sublayer():
    def program(m, x):
        x = m.inp(x)
        y = x
        for i in range(3):
            y = m.norms[-1](x)
            x = x + F.dropout(m.branch(i, x), 0.2, m.training)
        return y

    found = check_same(program, "module")
    assert [s.stream.num_sublayers for s in found.report.streams] == [2]


def test_a_state_that_only_a_buffer_sees_gets_no_read():
    def program(m, x):
        x = m.inp(x)
        x = x + m.branch(0, x)
        m.ema.copy_((x + m.branch(1, x)).detach().mean((0, 1)))
        x = x + m.branch(2, x)
        return m.norms[-1](x)

    found = check_same(program, "module")
    assert [r.name for r in found.attnres.reads] == ["norms.2", "norms.3"]
    assert all(r.query.grad is not None for r in found.attnres.reads)


def test_an_in_place_operation_whose_namesake_means_something_else_has_no_functional_form():
    def program(x):
        x.bernoulli_()
        x.zero_()
        x.normal_()
        x.add_(1)
        x.clamp_(0, 1)
        return x

    forms = {n.target: functional_form(n) for n in torch.fx.symbolic_trace(program).graph.nodes if "_" in n.name}
    assert forms == {"bernoulli_": None, "zero_": None, "normal_": None, "add_": "add", "clamp_": "clamp"}


class Heads(nn.Module):
    """A first residual head by head, a norm over the heads joined, a second residual of the whole width."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.out = (nn.Linear(width, width) for _ in range(3))
        self.norm0, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        q, k = (torch.cat(f(x).chunk(self.heads, -1), 0) for f in (self.q, self.k))
        o = q + torch.softmax(q @ k.transpose(1, 2), -1) @ k
        o = self.norm0(torch.cat(o.chunk(self.heads, 0), -1))
        return self.norm1(o + torch.relu(self.out(o)))


@pytest.mark.parametrize("variant", ["full", "block", "local"])
def test_two_widths_are_two_streams_and_the_report_says_where_one_ends(variant):
    torch.manual_seed(0)
    model, x = nn.Sequential(Heads(), Heads(), nn.Linear(16, 3)).eval(), torch.randn(2, 5, 16)
    found = ax.convert(model, (x,), config=ax.AttnResConfig(variant=variant))
    torch.testing.assert_close(found(x), model(x))
    assert sorted({s.stream.width for s in found.report.streams}) == [8, 16]
    assert "interrupted" in {r.kind for r in found.report.refusals}


def test_a_defect_of_a_pass_is_an_error_of_the_library(monkeypatch):
    def broken(*_):
        raise StopIteration

    monkeypatch.setattr("attnres_fx.passes.streams.analysis.find_streams", broken)
    with pytest.raises(ax.errors.RewriteError, match="StopIteration"):
        ax.inspect(Heads().eval(), (torch.randn(2, 5, 16),))
