"""In-place operations made values: random programs of views and writes compute what they computed."""

import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule, Interpreter, Proxy

from attnres_fx.passes import functionalize_mutations_pass, propagate_values_
from attnres_fx.passes.graph.aliasing import mutated_arguments, reshaped_in_place
from attnres_fx.passes.graph.nodes import tensor_of

SETTINGS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in ((2, 4, 6), (4, 6)))


# --- programs ----------------------------------------------------------------------------------------


def call(target, *args):
    """A call of what symbolic tracing does not catch by itself."""
    for arg in args:
        if isinstance(arg, Proxy):
            return arg.tracer.create_proxy("call_function", target, args, {})
    return target(*args)


#: Of a tensor's rank and two small numbers, an operation on it.
ALONE = {
    "transpose": lambda rank, i, j: lambda t: t.transpose(i % rank, j % rank),
    "permute": lambda rank, i, j: lambda t: t.permute([(d + i) % rank for d in range(rank)]),
    "flatten": lambda rank, i, j: lambda t: t.flatten(),
    "view": lambda rank, i, j: lambda t: t.view(-1, 2),
    "reshape": lambda rank, i, j: lambda t: t.reshape(2, -1),
    "unsqueeze": lambda rank, i, j: lambda t: t.unsqueeze(i % rank),
    "from": lambda rank, i, j: lambda t: t[i % 2 :],
    "columns": lambda rank, i, j: lambda t: t[..., i : i + 2],
    "every other": lambda rank, i, j: lambda t: t[i % 2 :: 2],
    "pick": lambda rank, i, j: lambda t: t[i % 2],
    "select": lambda rank, i, j: lambda t: t.select(j % rank, i % 2),
    "narrow": lambda rank, i, j: lambda t: t.narrow(j % rank, i % 2, 1),
    "expand": lambda rank, i, j: lambda t: t.unsqueeze(0).expand(2, *[-1] * rank),
    "chunk": lambda rank, i, j: lambda t: t.chunk(2, j % rank)[i % 2],
    "split": lambda rank, i, j: lambda t: t.split(1, j % rank)[i % 2],
    "unbind": lambda rank, i, j: lambda t: t.unbind(j % rank)[i % 2],
    "mT": lambda rank, i, j: lambda t: t.mT,
    "diagonal": lambda rank, i, j: lambda t: t.diagonal(i % 2),
    "[[1, 0]]": lambda rank, i, j: lambda t: t[[1, 0]],
    "contiguous": lambda rank, i, j: lambda t: t.contiguous(),
    "clone": lambda rank, i, j: lambda t: t.clone(),
    "half": lambda rank, i, j: lambda t: t * 0.5,
    "add_ 1": lambda rank, i, j: lambda t: t.add_(1.0),
    "mul_ 2": lambda rank, i, j: lambda t: t.mul_(2.0),
    "relu_": lambda rank, i, j: lambda t: t.relu_(),
    "torch.relu_": lambda rank, i, j: lambda t: torch.relu_(t),
    "zero_": lambda rank, i, j: lambda t: t.zero_(),
    "fill_": lambda rank, i, j: lambda t: t.fill_(0.25),
    "index_fill_": lambda rank, i, j: lambda t: t.index_fill_(j % rank, torch.tensor([0]), 3.0),
    "masked_fill_": lambda rank, i, j: lambda t: t.masked_fill_(t > 0.5, -1.0),
    "+= 1": lambda rank, i, j: lambda t: call(operator.iadd, t, 1.0),
    "[i] = 5": lambda rank, i, j: lambda t: call(operator.setitem, t, i % 2, 5.0),
    "[..., i:j] = 4": lambda rank, i, j: lambda t: call(operator.setitem, t, (..., slice(i, i + 1)), 4.0),
}
OF_TWO = {
    "add": lambda t, other: t + other,
    "mul": lambda t, other: t * other,
    "add_": lambda t, other: t.add_(other),
    "add_ half": lambda t, other: t.add_(other, alpha=0.5),
    "mul_": lambda t, other: t.mul_(other),
    "copy_": lambda t, other: t.copy_(other),
    "+=": lambda t, other: call(operator.iadd, t, other),
    "[:] =": lambda t, other: call(operator.setitem, t, slice(None), other),
}


def is_write(name):
    return "=" in name or name.split()[0].endswith("_")


class Program(nn.Module):
    """Steps on numbered tensors; every tensor made is returned, so that every alias is compared.

    A step is the name of an operation, the number of its tensor and of another one, the rank, two numbers.
    """

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def forward(self, a, b):
        tensors = [a, b]
        for one in self.steps:
            run(one, tensors)
        return tuple(tensors)


def run(one, tensors):
    name, at, other, rank, i, j = one
    made = OF_TWO[name](tensors[at], tensors[other]) if name in OF_TWO else ALONE[name](rank, i, j)(tensors[at])
    if "] =" not in name:
        tensors.append(made)


def cells(t):
    """Which cells of its storage a tensor shows."""
    numbers = torch.arange(t.untyped_storage().nbytes() // t.element_size())
    shown = numbers.as_strided(t.shape, t.stride(), t.storage_offset()).flatten().tolist()
    return {(t.untyped_storage().data_ptr(), n) for n in shown}


def is_defined(name, t, other):
    """Whether PyTorch says what a write does: to cells shown once, from the same tensor or from other cells."""
    if not is_write(name):
        return True
    if len(cells(t)) < t.numel():
        return False
    same = t.shape == other.shape and t.stride() == other.stride() and t.storage_offset() == other.storage_offset()
    return name not in OF_TWO or same or not cells(t) & cells(other)


@st.composite
def programs(draw, longest=9):
    """Steps that run in eager mode."""
    tensors, steps = list(inputs()), []
    writes = sorted(n for n in (*ALONE, *OF_TWO) if is_write(n))
    others = sorted(n for n in (*ALONE, *OF_TWO) if not is_write(n))
    for _ in range(draw(st.integers(2, longest))):
        name = draw(st.sampled_from(writes if draw(st.booleans()) else others))
        at, other = (draw(st.integers(0, len(tensors) - 1)) for _ in range(2))
        one = (name, at, other, tensors[at].dim(), draw(st.integers(0, 2)), draw(st.integers(0, 2)))
        if not is_defined(name, tensors[at], tensors[other]):
            continue
        try:
            run(one, tensors)
        except (RuntimeError, IndexError, ZeroDivisionError):
            continue
        steps.append(one)
    return tuple(steps)


# --- checks ------------------------------------------------------------------------------------------


def traced(model, spelling):
    if spelling == "export":
        return torch.export.export(model, inputs(), strict=False).module(check_guards=False)
    gm = torch.fx.symbolic_trace(model)
    propagate_values_(gm, inputs())
    return gm


class Watcher(Interpreter):
    """Runs a graph and sees to it that its metadata is true and that nodes mean one value for good.

    A copy that the pass made for one write holds its value from that write on, so nobody may look earlier.
    """

    def __init__(self, gm):
        super().__init__(gm)
        self.seen = {}

    def run_node(self, n):
        written = mutated_arguments(n)
        result = super().run_node(n)
        value = tensor_of(n)
        if value is not None and n.op != "get_attr":
            assert value.dtype == result.dtype and value.dim() == result.dim(), n.format_node()
            assert all(isinstance(x, torch.SymInt) or x == y for x, y in zip(value.shape, result.shape, strict=True))
        for node in n.all_input_nodes:
            held = self.env[node]
            if node not in written and isinstance(held, torch.Tensor) and not shares(result, held):
                kept = self.seen.setdefault(node, held.clone())
                assert torch.equal(kept, held), f"{node} does not mean one value: {n.format_node()}"
        return result


def shares(result, tensor):
    found = result if isinstance(result, tuple | list) else [result]
    tensors = [r for r in found if isinstance(r, torch.Tensor)]
    return any(r.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for r in tensors)


def assert_same(found, expected, where):
    for k, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.dtype == y.dtype and x.shape == y.shape, f"{where} {k}"
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True, msg=f"{where} {k}")


def check(model, spelling):
    gm = traced(model, spelling)
    written = any(mutated_arguments(n) or reshaped_in_place(n) for n in gm.graph.nodes)
    result = functionalize_mutations_pass(gm)
    assert isinstance(result.graph_module, GraphModule) and result.modified == written
    gm.graph.lint()
    gm.recompile()
    theirs, mine, watched = inputs(), inputs(), inputs()
    expected = model(*theirs)
    found = gm(*mine)
    assert_same(found, expected, "tensor")
    assert_same(mine, theirs, "input")
    assert_same(Watcher(gm).run(*watched), expected, "watched tensor")
    check_writes(gm)


def check_writes(gm):
    """Only copies that the pass made are written to, and at the end the inputs."""
    nodes = list(gm.graph.nodes)
    for k, node in enumerate(nodes):
        assert reshaped_in_place(node) is None
        for target in mutated_arguments(node):
            if target.op == "placeholder":
                assert "copy_" in str(node.target) or node.target is torch.Tensor.copy_
                assert not any(target in n.all_input_nodes for n in nodes[k + 1 :]), "inputs are written to last"
                continue
            while target.all_input_nodes and "clone" not in str(target.target):
                target = target.all_input_nodes[0]
            assert "clone" in str(target.target), node.format_node()


@given(programs())
@settings(SETTINGS, max_examples=200)
@pytest.mark.slow
def test_a_random_program_traced_symbolically_computes_the_same(steps):
    check(Program(steps), "symbolic")


@given(programs(longest=7))
@settings(SETTINGS, max_examples=60)
@pytest.mark.slow
def test_a_random_program_exported_computes_the_same(steps):
    check(Program(steps), "export")


# --- one operation each ------------------------------------------------------------------------------


class Of(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, a, b):
        return self.program(a, b)


SPELLINGS = pytest.mark.parametrize("spelling", ["symbolic", "export"])

#: What may share its argument's storage, or may not. The argument is [4, 6] and contiguous.
SECOND_LOOKS = {
    "T": lambda t: t.T,
    "mT": lambda t: t.mT,
    "t": lambda t: t.t(),
    "swapaxes": lambda t: t.swapaxes(0, 1),
    "movedim": lambda t: t.movedim(0, 1),
    "diagonal": lambda t: t.diagonal(),
    "unfold": lambda t: t.unfold(0, 2, 2),
    "as_strided": lambda t: t.as_strided((2, 3), (6, 1)),
    "ravel": lambda t: t.ravel(),
    "unflatten": lambda t: t.unflatten(1, (2, 3)),
    "squeeze": lambda t: t.unsqueeze(0).squeeze(),
    "hsplit": lambda t: t.hsplit(2)[1],
    "tensor_split": lambda t: t.tensor_split(3)[1],
    "split_with_sizes": lambda t: t.split_with_sizes([1, 5], 1)[1],
    "unsafe_chunk": lambda t: t.unsafe_chunk(2)[0],
    "reshape of a slice, rows kept": lambda t: t[:, :2].reshape(4, 2, 1),
    "reshape of a slice, rows merged": lambda t: t[:, :2].reshape(8),
    "reshape of a transpose, a dimension split": lambda t: t.transpose(0, 1).reshape(6, 2, 2),
    "flatten of a slice": lambda t: t[:, :2].unsqueeze(-1).flatten(1),
    "contiguous": lambda t: t.contiguous(),
    "contiguous of a transpose": lambda t: t.t().contiguous(),
    "clone": lambda t: t.clone(),
    "to the same dtype": lambda t: t.to(torch.float32),
    "to the same dtype, copied": lambda t: t.to(torch.float32, copy=True),
    "to another dtype": lambda t: t.to(torch.float64),
    "type_as": lambda t: t.type_as(t),
    "bits": lambda t: t.view(torch.int32),
    "complex numbers": lambda t: torch.view_as_real(torch.view_as_complex(t.view(4, 3, 2))),
    "rows by a list": lambda t: t[[1, 0, 3, 2]],
    "rows by a tensor": lambda t: t[torch.tensor([1, 0, 3, 2])],
    "index_select": lambda t: t.index_select(0, torch.tensor([1, 0, 3, 2])),
    "roll": lambda t: t.roll(1, 0),
    "flip": lambda t: t.flip(0),
    "repeat": lambda t: t.repeat(1, 1),
    "dropout of nothing": lambda t: F.dropout(t, 0.0, True),
    "dropout in eval": lambda t: F.dropout(t, 0.5, False),
}


@SPELLINGS
@pytest.mark.parametrize("name", SECOND_LOOKS)
def test_a_view_shares_writes_and_a_copy_does_not(name, spelling):
    def program(a, b):
        whole = b * 1.0
        part = SECOND_LOOKS[name](whole)
        part.add_(1)
        seen = whole * 1.0
        whole.mul_(3.0)
        return whole, part, seen

    check(Of(program), spelling)


WRITES = {
    "iadd": lambda t, b: call(operator.iadd, t, b),
    "isub": lambda t, b: call(operator.isub, t, b),
    "imul": lambda t, b: call(operator.imul, t, b),
    "itruediv": lambda t, b: call(operator.itruediv, t, 3.0),
    "setitem with a tensor": lambda t, b: call(operator.setitem, t, torch.tensor([0, 2]), 7.0),
    "setitem of a view": lambda t, b: call(operator.setitem, t[1:], 0, b[0]),
    "iadd into a slice": lambda t, b: call(operator.setitem, t, slice(0, 2), call(operator.iadd, t[0:2], 1.0)),
    "sub_ scaled": lambda t, b: t.sub_(b, alpha=2),
    "addcmul_": lambda t, b: t.addcmul_(b, b, value=0.5),
    "addmm_": lambda t, b: t[:, :4].addmm_(b, b.t()),
    "lerp_": lambda t, b: t.lerp_(b, 0.5),
    "clamp_": lambda t, b: t[0].clamp_(min=0),
    "scatter_": lambda t, b: t.scatter_(0, torch.zeros(1, 6, dtype=torch.int64), 1.5),
    "index_add_": lambda t, b: t.index_add_(0, torch.tensor([0, 1]), b[:2]),
    "index_put_": lambda t, b: t.index_put_((torch.tensor([0, 2]),), torch.tensor(7.0)),
    "masked_scatter_": lambda t, b: t.masked_scatter_(t > 0, b),
    "copy_ of a row": lambda t, b: t.copy_(b[0]),
    "copy_ of itself": lambda t, b: t.copy_(t),
    "F.relu": lambda t, b: F.relu(t, inplace=True),
    "F.relu by keyword": lambda t, b: F.relu(input=t, inplace=True),
    "torch.relu_ by keyword": lambda t, b: torch.relu_(input=t),
    "out": lambda t, b: torch.mul(b, 2.0, out=t),
    "out into a row": lambda t, b: torch.mul(b[0], 2.0, out=t[1]),
    "a list of tensors": lambda t, b: call(torch._foreach_add_, [t], 1.0),
    "a wider tensor": lambda t, b: t.add_(b.double()),
    "an integer tensor": lambda t, b: t.add_(torch.ones(6, dtype=torch.int64)),
    "gt_": lambda t, b: t.gt_(0.0),
    "eq_": lambda t, b: t.eq_(b),
    "logical_not_": lambda t, b: t.logical_not_(),
    "unsqueeze_": lambda t, b: t.unsqueeze_(0),
    "transpose_": lambda t, b: t.transpose_(0, 1),
}


@SPELLINGS
@pytest.mark.parametrize("name", WRITES)
def test_a_write_changes_every_alias_and_nothing_that_was_read_before(name, spelling):
    def program(a, b):
        t = b * 1.0
        before, row = t * 1.0, t[1]
        WRITES[name](t, b)
        return before, row, t, t * 1.0

    check(Of(program), spelling)


def test_a_buffer_is_still_written_to():
    def program(a, b):
        model.seen.add_(1.0)
        return b + model.seen

    model = Of(program)
    model.register_buffer("seen", torch.zeros(()))
    gm = traced(model, "export")
    with torch.no_grad():
        model.seen.zero_()
    functionalize_mutations_pass(gm)
    (write,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.add_.Tensor]
    assert write.args[0].target == "seen" and not write.users  # who reads it asks the buffer again
    for times in (1.0, 2.0):
        assert torch.equal(gm(*inputs()), inputs()[1] + times)
