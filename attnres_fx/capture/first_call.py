"""Whether the calls after a first one compute what the first computes, tables that it makes aside."""

from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.fx import Node

from attnres_fx.capture.recorder import Recording
from attnres_fx.passes.graph.operations import op_name

_DRAWS = ("rand", "normal", "bernoulli", "dropout", "multinomial", "uniform", "exponential", "poisson")
_MADE_BY_SHAPE = ("size", "numel", "dim", "zeros_like", "ones_like", "empty_like", "full_like", "new_", "sym_size")


def same_path(first: Recording, later: Recording, arguments: Collection[int], later_arguments: Collection[int]) -> bool:
    """Whether two calls do the same with the values of their arguments and with random draws.

    Args:
        first: Of a call that sets state of the model.
        later: Of one that finds the state set.
        arguments: The ids of the tensors that the first was called with.
        later_arguments: The ids of those of the later call.
    """
    return _steps(first, arguments) == _steps(later, later_arguments)


def _steps(recording: Recording, arguments: Collection[int]) -> list[Any]:
    """What is done with values that differ from call to call, in order."""
    graph = recording.gm.graph
    inputs = dict(zip((n for n in graph.nodes if n.op == "placeholder"), recording.inputs, strict=True))
    differ: set[Node] = {n for n, value in inputs.items() if isinstance(value, Tensor) and id(value) in arguments}
    steps = []
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = op_name(node)
        if any(word in name for word in _DRAWS) and not name.startswith("_"):
            differ.add(node)
        elif name.startswith(_MADE_BY_SHAPE) or differ.isdisjoint(node.all_input_nodes):
            continue
        else:
            differ.add(node)
        plain = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, int | float | str)]
        steps.append((name, plain))
    return steps
