"""The table of operations: what a pass writes is read back as what it meant, in every dialect."""

import pytest
import torch
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from attnres_fx.passes.graph.emit import emit, emit_switch
from attnres_fx.passes.graph.operation_table import ALIASES, BY_NAME, OPERATIONS, Trait
from attnres_fx.passes.graph.operations import has_trait, op_name

X = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
ARGUMENTS = {
    "rsub": (X, 1.0),
    "detach": (X,),
    "clone": (X,),
    "contiguous": (X,),
    "permute": (X, [1, 0]),
    "zeros_like": (X,),
    "to": (X, torch.float64),
    "bmm": (X[None], X[None] + 1),
    "cat": ([X, X + 1], 1),
    "stack": ([X, X + 1], 1),
    "select": (X, 1, 2),
    "slice_scatter": (X, X[:, 1:] + 1, 1, 1),
    "select_scatter": (X, X[:, 1] + 1, 1, 1),
    "index_put": (X, [torch.tensor([1])], X[1:2] + 1),
}
EMITTED = [o.name for o in OPERATIONS if o.aten]


def emitted(name, dialect):
    """A graph with one operation in a dialect, and the arguments it runs on."""
    args = ARGUMENTS.get(name, (X, X + 1))
    graph = Graph()
    tensors = [a for a in tree_leaves(args) if isinstance(a, torch.Tensor)]
    inputs = {id(a): graph.placeholder(f"x{i}") for i, a in enumerate(tensors)}
    first = next(iter(inputs.values()))
    like = graph.call_function(torch.ops.aten.neg.default if dialect == "aten" else torch.neg, (first,))
    node = emit(graph, name, tree_map(lambda a: inputs.get(id(a), a), args), like=like, value=tensors[0])
    graph.output(node)
    return GraphModule({}, graph), node, [a.clone() for a in tensors]


@pytest.mark.parametrize("name", EMITTED)
def test_what_is_emitted_has_the_canonical_name_and_one_value_in_both_dialects(name):
    results = []
    for dialect in ("aten", "torch"):
        gm, node, args = emitted(name, dialect)
        assert op_name(node) == name
        assert isinstance(node.target, torch._ops.OpOverload) == (dialect == "aten")
        results.append(gm(*args))
    assert torch.equal(results[0], results[1]) and results[0].dtype == results[1].dtype


def test_every_operation_stands_in_the_table_once_and_no_alias_is_a_canonical_name():
    assert len(BY_NAME) == len(OPERATIONS)
    assert not ALIASES.keys() & BY_NAME.keys()
    assert len(ALIASES) == sum(len(o.also) for o in OPERATIONS)


def test_an_operation_is_written_in_both_dialects_or_in_none():
    assert all(bool(o.aten) == (o.function is not None) for o in OPERATIONS)


def test_a_trait_is_asked_of_whatever_spelling_a_node_has():
    graph = Graph()
    x = graph.placeholder("x")
    moves = [
        graph.call_method("swapaxes", (x, 0, 1)),
        graph.call_function(torch.transpose, (x, 0, 1)),
        graph.call_function(torch.ops.aten.transpose.int, (x, 0, 1)),
    ]
    assert all(has_trait(n, Trait.TOKEN_MOVE) and not has_trait(n, Trait.CAST) for n in moves)
    assert not has_trait(x, Trait.TOKEN_MOVE)


def test_the_product_inside_a_fused_addition_can_be_written():
    products = {o.fused.product for o in OPERATIONS if o.fused is not None}
    assert products == {"mm", "bmm", "mul", "div"}
    assert products <= set(EMITTED)


@pytest.mark.parametrize("name", [o.name for o in OPERATIONS if o.switch is not None])
def test_a_switch_that_is_written_is_read_back_and_switches_nothing_meanwhile(name):
    graph = Graph()
    x = graph.placeholder("x")
    like = graph.call_function(torch.neg, (x,))
    args = {"_set_grad_enabled": (False,), "_enter_autocast": ("cpu", torch.bfloat16, True, None)}.get(name, ())
    node = emit_switch(graph, name, args, like=like)
    assert op_name(node) == name and has_trait(node, Trait.SWITCHES_MODE | Trait.ASKS_MODE)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert "val" not in node.meta and "example_value" not in node.meta
