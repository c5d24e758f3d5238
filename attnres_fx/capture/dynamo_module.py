"""An `nn.Module` to a graph of torch functions, through Dynamo, on a clone of its tree."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_fx.capture.bound_graph import bind_graph
from attnres_fx.capture.captured import CapturedGraph
from attnres_fx.capture.example_call import ExampleCall
from attnres_fx.capture.isolated_run import Mode, fast_path_off, set_mode_
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.capture.recorder import Recording, record
from attnres_fx.capture.side_effects import PythonChange, TensorWrite, attributes_of, changes_since, settle_
from attnres_fx.capture.size_guards import size_guards
from attnres_fx.capture.sizes import input_shapes
from attnres_fx.capture.tensor_places import tensor_places
from attnres_fx.capture.watched import flags_in, watched_values
from attnres_fx.errors import CaptureError
from attnres_fx.passes.graph.nodes import value_of


def trace_module(call: ExampleCall, mode: Mode, free: Mapping[int, Sequence[int]]) -> CapturedGraph:
    """Trace one call of a model in one mode. The model is not run, and neither it nor its tensors are changed.

    Args:
        call: The call.
        mode: `"train"` or `"eval"`.
        free: The dimensions that may be free, by the index of the argument's leaf. The trace fixes those that the
            model's code needs fixed.

    Raises:
        CaptureError: The model does something at a call that no graph can hold; it is named.
        DynamoRefusal: Dynamo cannot trace the model.
    """
    model = call.model
    recording, leaves, writes, changes = _recorded(call, mode, free)
    places = tensor_places(model)
    names = leaf_names(model, call.args, call.kwargs)
    changed = {c.module for c in changes}
    # A table goes with the number that says what it was made for: where the number is not kept, neither is the table.
    writes = [w for w in writes if w.buffer or w.module not in changed]
    clone, _ = clone_tree(model)
    bound = bind_graph(recording, clone, leaves, names, places, writes)
    values = [value_of(n) for n in bound.gm.graph.nodes if n.op == "placeholder"]
    guards, ranges = size_guards(values, names)
    shapes = input_shapes(bound.gm)
    own = {(w.module, w.name) for w in writes} | {(c.module, c.name) for c in changes}
    found = watched_values(clone, recording.watched)
    return CapturedGraph(
        bound.gm,
        bound.out_spec,
        shapes,
        ranges,
        guards,
        bound.writes,
        tuple(v for v in found if (v.module, v.name) not in own),
        tuple(changes),
        flags=flags_in(recording.module, recording.watched),
    )


def _recorded(
    call: ExampleCall, mode: Mode, free: Mapping[int, Sequence[int]]
) -> tuple[Recording, list[Any], list[TensorWrite], list[PythonChange]]:
    """The trace of a call, its flat arguments, and what a call leaves behind on the model.

    Raises:
        CaptureError: Every call changes Python state. What only the first call changes, a table that is made once or
            a length that is noted, is made in the graph at every call instead.
    """
    clone, _ = clone_tree(call.model)
    set_mode_(clone, mode)
    recording, leaves, writes, changes = _traced_call(clone, call, free)
    if changes:
        settle_(clone, writes, changes)
        *_, again = _traced_call(clone, call, free)
        if again:
            raise CaptureError(_python_state_message(call.model, again))
    return recording, leaves, writes, changes


def _traced_call(
    clone: nn.Module, call: ExampleCall, free: Mapping[int, Sequence[int]]
) -> tuple[Recording, list[Any], list[TensorWrite], list[PythonChange]]:
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    copies: dict[int, Any] = {}
    leaves = [copies.setdefault(id(x), _copied(x)) if isinstance(x, Tensor) else x for x in leaves]
    for i, dimensions in free.items():
        for d in dimensions:
            torch._dynamo.maybe_mark_dynamic(leaves[i], d)
    positional, named = pytree.tree_unflatten(leaves, spec)
    before = attributes_of(clone)
    with fast_path_off():
        recording = record(clone, positional, named)
    return recording, leaves, *changes_since(before, clone, recording.outputs)


def _copied(tensor: Tensor) -> Tensor:
    """A copy that Dynamo may mark. Strides of an example would become guards, and they change no value."""
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copied.requires_grad_(tensor.requires_grad)


def leaf_names(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """A name for each leaf of the arguments, after the parameters of the model's forward; unique identifiers."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), "args")
    names += [f"{rest}_{i}" for i in range(len(args) - len(names))]
    found: list[str] = []
    for path, _ in pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))[0]:
        keys = [str(getattr(k, "idx", getattr(k, "key", getattr(k, "name", k)))) for k in path]
        first = names[int(keys[1])] if keys[0] == "0" else keys[1]
        name = "_".join([first, *keys[2:]])
        name = "".join(c if c.isalnum() else "_" for c in name)
        name = name if name.isidentifier() else f"input_{name}"
        while name in found:
            name += "_"
        found.append(name)
    return found


def _python_state_message(model: nn.Module, changes: Sequence[PythonChange]) -> str:
    listed = "; ".join(map(str, changes[:3])) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
    return (
        f"a call of {type(model).__name__} changes Python state, which a graph cannot hold: {listed}. Keep it in a "
        f"buffer (register_buffer, and write to the tensor), leave it out of forward, or use ax.compile, which runs "
        f"the model's own Python."
    )
