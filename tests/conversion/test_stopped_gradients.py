"""What stops a gradient stops it in the converted model: detach, regions without gradients, straight-through sums."""

import pytest
import torch

from tests.support.ways_in import WAYS, check_same


def one_layer_detaches_the_stream(m, x):
    x = m.inp(x)
    for i in range(3):
        y = m.branch(i, x)
        x = (x.detach() if i == 1 else x) + y
    return m.norms[-1](x)


def detached_and_scaled(m, x):
    x = m.inp(x)
    x = x + m.branch(0, x)
    x = x.detach() * 0.5 + m.branch(1, x)
    x = x * 2
    x = x.detach() + m.branch(2, x)
    return m.norms[-1](x)


def a_sum_is_detached(m, x):
    x = m.inp(x)
    x = x + m.branch(0, x)
    x = (x + m.branch(1, x)).detach()
    x = x + m.branch(2, x)
    return m.norms[-1](x)


def detached_in_place(m, x):
    x = m.inp(x)
    x = x + m.branch(0, x)
    x.detach_()
    x = x + m.branch(1, x)
    return m.norms[-1](x)


def the_data_of_the_stream(m, x):
    x = m.inp(x)
    for i in range(3):
        y = m.branch(i, x)
        x = (x.data if i == 1 else x) + y
    return m.norms[-1](x)


def a_probe_reads_the_detached_stream(m, x):
    x = m.inp(x)
    probed = 0
    for i in range(3):
        x = x + m.branch(i, x)
        probed = probed + m.extra(x.detach()).mean()
    return m.norms[-1](x) + probed


def a_layer_without_gradients(m, x):
    x = m.inp(x)
    x = x + m.branch(0, x)
    with torch.no_grad():
        x = x + m.branch(1, x)
    x = x + m.branch(2, x)
    return m.norms[-1](x)


def a_look_without_gradients_before_the_layer(m, x):
    x = m.inp(x)
    x = (x + m.branch(0, x)) * 0.5
    x = x + m.branch(1, x)
    with torch.no_grad():
        scale = m.extra(x).mean()
    x = x + m.branch(2, x) * scale
    return m.norms[-1](x)


def written_where_no_gradient_sees_it(m, x):
    x = m.inp(x)
    x = x + m.branch(0, x)
    with torch.no_grad():
        x.mul_(0.5)
    y = m.mixes[1](x)
    y.detach().mul_(2.0)
    with torch.no_grad():
        y[:, :1].zero_()
    x = x + y
    x = x + m.branch(2, x)
    return m.norms[-1](x)


def straight_through_the_stream(m, x):
    x = m.inp(x)
    x = x + m.branch(0, x)
    x = x + (torch.round(x * 4) / 4 - x).detach()
    chosen = m.extra(x).softmax(-1) @ m.mixes[2].weight
    x = x + (chosen - x).detach()
    x = x + m.branch(1, x)
    return m.norms[-1](x)


def straight_through_in_branches(m, x):
    x = m.inp(x)
    for i in range(3):
        h = m.norms[i](x)
        step = h.abs().amax(-1, keepdim=True) / 7
        h = h - (h - torch.round(h / step) * step).detach()
        y = m.mixes[i](h)
        x = x + (y + (torch.round(y * 8) / 8 - y).detach())
    return m.norms[-1](x)


PROGRAMS = [
    one_layer_detaches_the_stream,
    detached_and_scaled,
    a_sum_is_detached,
    detached_in_place,
    the_data_of_the_stream,
    a_probe_reads_the_detached_stream,
    a_layer_without_gradients,
    a_look_without_gradients_before_the_layer,
    written_where_no_gradient_sees_it,
    straight_through_the_stream,
    straight_through_in_branches,
]
#: torch.export refuses `.data` itself.
CASES = [(p, w) for p in PROGRAMS for w in WAYS if (p, w) != (the_data_of_the_stream, "export")]


@pytest.mark.parametrize(("program", "way"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_a_stopped_gradient_stays_stopped(program, way):
    check_same(program, way)


@pytest.mark.parametrize("variant", ["block", "local"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_stopped_gradient_stays_stopped_in_every_variant(program, variant):
    check_same(program, "module", variant)


def over_a_fresh_tensor(m, x):
    x = m.inp(x)
    for i in range(3):
        out = torch.empty_like(x)
        out.copy_(x)
        x = out + m.branch(i, out)
    return m.norms[-1](x)


def over_a_whole_slice(m, x):
    x = m.inp(x)
    for i in range(3):
        h = x.clone()
        h[:] = x + m.branch(i, x)
        x = h
    return m.norms[-1](x)


def over_scores(m, x):
    x = m.inp(x)
    start = 0
    for i in range(3):
        h = m.norms[i](x)
        scores = h @ h.transpose(1, 2)
        scores[:, start:, start:] = scores[:, start:, start:] * 0.5
        x = x + scores.softmax(-1) @ m.mixes[i](h)
    return m.norms[-1](x)


def over_what_is_larger(m, x):
    x = m.inp(x)
    for i in range(3):
        y = m.branch(i, x)
        y[...] = y.mean(1, keepdim=True)
        x = x + y
    return m.norms[-1](x)


def over_another_dtype(m, x):
    x = m.inp(x)
    for i in range(3):
        held = torch.zeros(x.shape, dtype=torch.float64)
        held.copy_(m.branch(i, x))
        x = x + held.float()
    return m.norms[-1](x)


def by_numbers(m, x):
    x = m.inp(x)
    for i in range(3):
        y = m.branch(i, x)
        gate = y * 1
        gate[:] = 0.25
        if i == 1:
            y.zero_()
        x = x + y * gate.fill_(0.5)
    return m.norms[-1](x)


WHOLE = [over_a_fresh_tensor, over_a_whole_slice, over_scores, over_what_is_larger, over_another_dtype, by_numbers]
#: A symbolic trace cannot hold an assignment to an index.
ASSIGN = (over_a_whole_slice, over_scores, over_what_is_larger, by_numbers)
WRITTEN = [(p, w) for p in WHOLE for w in WAYS if not (p in ASSIGN and w == "symbolic trace")]


@pytest.mark.parametrize(("program", "way"), WRITTEN, ids=lambda x: getattr(x, "__name__", x))
def test_what_is_written_over_a_whole_tensor_has_the_gradient_of_what_was_written(program, way):
    found = check_same(program, way)
    assert len(found.attnres.reads) == 3
