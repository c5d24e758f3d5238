"""The passes that make a captured graph readable, in order."""

import copy
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from attnres_fx.errors import CaptureError
from attnres_fx.passes.graph.nodes import has_values
from attnres_fx.passes.graph.result import PassResult, run_pass
from attnres_fx.passes.normalize.dead_code import remove_dead_code_pass
from attnres_fx.passes.normalize.functionalize import functionalize_mutations_pass
from attnres_fx.passes.normalize.inline_regions import inline_regions_pass
from attnres_fx.passes.normalize.new_rows import split_new_rows_pass
from attnres_fx.passes.normalize.rejoin_rows import rejoin_rows_pass
from attnres_fx.passes.normalize.undo_reshapes import undo_reshapes_pass
from attnres_fx.passes.normalize.unfold_row_writes import unfold_row_writes_pass
from attnres_fx.passes.normalize.unfuse_additions import unfuse_additions_pass

#: In this order, each in place, each linted and logged when it changed something.
NORMALIZATION: tuple[Callable[[GraphModule], PassResult], ...] = (
    inline_regions_pass,  # first: what is hidden in a body is seen by none of the others
    functionalize_mutations_pass,  # before anything asks which value a node holds
    unfuse_additions_pass,  # only then does every residual addition stand as one
    rejoin_rows_pass,  # after that: what is added to some rows may have been fused
    split_new_rows_pass,  # after that: a join of pieces of one tensor brings nothing new beside it
    unfold_row_writes_pass,  # the same, of rows that are written into a copy
    undo_reshapes_pass,  # after them: what is added or joined in another shape
    remove_dead_code_pass,  # last: the others leave some behind, and the model may hold more of it
)


def normalize_(gm: GraphModule) -> tuple[PassResult, ...]:
    """Run the normalisation passes on a graph, in place.

    Args:
        gm: A module with values on the nodes of its graph, attributes aside.

    Returns:
        What each pass did, in the order of `NORMALIZATION`.
    """
    set_attribute_values_(gm)
    results = tuple(run_pass(each, gm) for each in NORMALIZATION)
    set_attribute_values_(gm)
    return results


def set_attribute_values_(gm: GraphModule) -> None:
    """Give attribute nodes the tensor they name as their value, where the tracer gave none."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta and "example_value" not in node.meta:
            value = attrgetter(str(node.target))(gm)
            if isinstance(value, torch.Tensor):
                node.meta["val"] = value


class _Propagation(FakeTensorProp):
    """Runs a graph on stand-ins for its tensors and modules: what it writes into a buffer does not reach the buffer."""

    def __init__(self, gm: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm, mode)
        tensors = {id(t): t for t in (*gm.parameters(), *gm.buffers())}
        self._stand_ins: dict[int, Any] = {i: mode.from_tensor(t, static_shapes=True) for i, t in tensors.items()}

    def fetch_attr(self, target: str) -> Any:
        held = super().fetch_attr(target)
        if isinstance(held, torch.Tensor) and id(held) not in self._stand_ins:
            self._stand_ins[id(held)] = self._mode.from_tensor(held, static_shapes=True)
        if isinstance(held, torch.nn.Module) and not isinstance(held, GraphModule):
            return copy.deepcopy(held, self._stand_ins)  # the same copy for every call
        return self._stand_ins.get(id(held), held)


def propagate_values_(gm: GraphModule, args: Sequence[Any]) -> None:
    """Give every node of a trace without values a fake one, by running it on fake copies of example arguments.

    Args:
        gm: The trace; one whose nodes have values is left as it is.
        args: An example argument for each of its inputs.

    Raises:
        CaptureError: The graph does not run on them.
    """
    if has_values(gm):
        return
    try:
        _Propagation(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*args)
    except Exception as error:
        raise CaptureError(
            f"the graph does not run on the example arguments ({type(error).__name__}: {_said(error)}). "
            f"Give the arguments that the graph was traced for."
        ) from error


def _said(error: Exception) -> str:
    """What an error at a node says, without the interpreter's own paragraphs behind it."""
    return str(error).partition("\n\n")[0].strip().rstrip(".!")
