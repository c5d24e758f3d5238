"""One pass alone: the graph as text, and what must hold after a pass that changes it and after one that does not."""

import torch
from torch import nn
from torch.fx import Interpreter

from attnres_fx.passes import propagate_values_
from attnres_fx.passes.graph.nodes import tensor_of
from tests.support.stream_text import assert_near, captured, toy


def graph_text(gm):
    """One line a call, attributes by their path; unused attributes are left out."""
    return "\n".join(_line(n) for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))


def _line(node):
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    args = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    return f"{node.name} = {name}({', '.join(args)})"


def _text(argument):
    if isinstance(argument, torch.fx.Node):
        return str(argument.target) if argument.op == "get_attr" else argument.name
    if isinstance(argument, list | tuple):
        return f"[{', '.join(map(_text, argument))}]"
    return str(argument)


class TrueValues(Interpreter):
    """Runs a graph; every value noted on a node has the dtype and the shape that the node computes."""

    def run_node(self, n):
        result = super().run_node(n)
        value = tensor_of(n)
        if isinstance(result, torch.Tensor) and n.op not in ("placeholder", "get_attr", "output"):
            assert value is not None, f"{n} has no value"
            assert (value.dtype, value.shape) == (result.dtype, result.shape), n.format_node()
        return result


def check_pass(run, gm, args, tolerance=1e-6):
    """A pass that changes the graph: linted, same function, same effect on inputs, true values, metadata kept."""
    old = set(gm.graph.nodes)
    mine, theirs, watched = ([a.clone() for a in args] for _ in range(3))
    expected = torch.utils._pytree.tree_leaves(gm(*theirs))
    result = run(gm)
    assert result.modified and result.graph_module is gm
    assert result.removed or result.replaced
    assert not set(result.removed) & {n.name for n in gm.graph.nodes if n in old}
    gm.graph.lint()
    gm.recompile()
    for x, y in zip(torch.utils._pytree.tree_leaves(gm(*mine)), expected, strict=True):
        assert_near(x, y, tolerance)
    for x, y in zip(mine, theirs, strict=True):
        assert_near(x, y, tolerance)
    TrueValues(gm).run(*watched)
    new = [n for n in gm.graph.nodes if n not in old]
    assert new
    return new


def check_idle(run, gm):
    """A pass with nothing to do says so and leaves the graph as it is."""
    before = str(gm.graph), [dict(n.meta) for n in gm.graph.nodes]
    result = run(gm)
    assert not result.modified and not result.removed and not result.replaced
    assert str(gm.graph) == before[0]
    for node, meta in zip(gm.graph.nodes, before[1], strict=True):
        assert node.meta.keys() == meta.keys()


def check_metadata(new, path):
    """New nodes say where in the user's code they come from."""
    for node in new:
        assert __file__ in node.meta["stack_trace"], node
        assert path in str(node.meta["nn_module_stack"]), node


def symbolic(program, *args):
    gm = torch.fx.symbolic_trace(program)
    propagate_values_(gm, args)
    return gm


def exported(program, *args):
    return captured(Inside(program), args, "export")


class Inside(nn.Module):
    """A program one module down, so that its nodes have a module path."""

    def __init__(self, program):
        super().__init__()
        self.inner = toy(program)

    def forward(self, x):
        return self.inner(x)


def plain(m, x):
    return x + m.attn_1(m.norm_1(x))
