"""An `nn.Module` to a graph of torch functions, through Dynamo, on a clone of its tree."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_fx.capture.assumed import Assumed, Strides, gradients_of, strides_of, trained_in
from attnres_fx.capture.bound_graph import bind_graph
from attnres_fx.capture.captured import CapturedGraph
from attnres_fx.capture.consulted import (
    CONTIGUOUS,
    GRADIENTS,
    STRIDES,
    custom_functions,
    environment_read,
    global_values,
    values_of_arguments,
    values_of_classes,
)
from attnres_fx.capture.example_call import ExampleCall
from attnres_fx.capture.first_call import same_path
from attnres_fx.capture.first_tables import without_tables
from attnres_fx.capture.guard_places import Guarded
from attnres_fx.capture.isolated_run import Mode, fast_path_off, set_mode_
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.capture.recorder import DynamoRefusal, Recording, record
from attnres_fx.capture.side_effects import (
    PythonChange,
    TensorWrite,
    attributes_of,
    changes_since,
    python_state_message,
    replace_stand_ins_,
)
from attnres_fx.capture.signature import parameters_of_call
from attnres_fx.capture.size_guards import size_guards
from attnres_fx.capture.sizes import input_shapes
from attnres_fx.capture.taken_tensors import taken_tensors
from attnres_fx.capture.tensor_places import tensor_places
from attnres_fx.capture.watched import flags_in, numpy_source, watched_values
from attnres_fx.errors import CaptureError
from attnres_fx.passes.graph.mutation_order import written_attributes
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
    recorded, assumed = _as_its_code_asks(call, mode, free)
    return _bound(call, recorded, assumed)


def _as_its_code_asks(
    call: ExampleCall, mode: Mode, free: Mapping[int, Sequence[int]]
) -> tuple["_TracedCall", Assumed]:
    """A recorded call, with gradients off and with strides where the model's code asks for them."""
    recorded = _recorded(call, mode, free)
    recording = recorded[0]
    assumed = _assumed(call, recording)
    if assumed.gradients is not None and not call.as_called and _same_without_gradients(call, mode, free, recording):
        assumed = replace(assumed, gradients=(None, *assumed.gradients[1:]))
    exactly = _AsCalled(
        gradients=assumed.gradients is None or not call.as_called or torch.is_grad_enabled(),
        strided=assumed.strides is not None,
    )
    return recorded if exactly == _AsCalled() else _recorded(call, mode, free, exactly), assumed


def _bound(call: ExampleCall, recorded: "_TracedCall", assumed: Assumed) -> CapturedGraph:
    """What was recorded as a graph on a clone of the model's tree, with all that it takes for granted."""
    recording, leaves, writes, changes = recorded
    names = leaf_names(call.model, call.args, call.kwargs)
    changed = {c.module for c in changes if not (c.outside or c.table)}
    # A table goes with the number that says what it was made for: where the number is not kept, neither is the table.
    writes = [w for w in writes if w.buffer or w.module not in changed]
    clone, _ = clone_tree(call.model)
    bound = bind_graph(recording, clone, leaves, names, tensor_places(call.model), writes, keep_all=call.python_runs)
    values = [value_of(n) for n in bound.gm.graph.nodes if n.op == "placeholder"]
    guards, ranges = size_guards(values, names)
    shapes = input_shapes(bound.gm)
    arrays = [Guarded(numpy_source(s), "CONSTANT_MATCH") for s in recording.sources if numpy_source(s)]
    own = {(w.module, w.name) for w in writes} | {(c.module, c.name) for c in changes}
    held = watched_values(clone, [*recording.watched, *arrays])
    watched = tuple(v for v in held if (v.module, v.name) not in own)
    graph = CapturedGraph(bound.gm, bound.out_spec, shapes, ranges, guards, bound.writes, watched, tuple(changes))
    written = {*(w.place for w in writes), *written_attributes(bound.gm.graph)}
    graph.assumed = replace(
        assumed,
        globals=global_values(recording.watched),
        held=(
            *values_of_classes(clone, recording.watched),
            *values_of_arguments(call.args, call.kwargs, recording.watched),
            *environment_read(recording.codes),
        ),
        tensors=taken_tensors(bound.gm, written),
    )
    graph.flags = flags_in(recording.module, recording.watched)
    return graph


@dataclass(frozen=True)
class _AsCalled:
    """How a call is traced, where the model's code asks for it.

    Attributes:
        gradients: Whether gradients are on.
        strided: Whether the arguments keep their strides.
    """

    gradients: bool = True
    strided: bool = False


def _assumed(call: ExampleCall, recording: Recording) -> Assumed:
    """What the graph takes for granted of gradients and strides, where the model's code asks for them."""
    asked, leaves = GRADIENTS in recording.asked, call.leaves
    trained = trained_in(call.model)
    floating = [x.requires_grad for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    asked |= custom_functions(recording.codes) and not all((*trained.values(), *floating))
    on = torch.is_grad_enabled() or not call.as_called
    return Assumed(
        gradients=(on, *gradients_of(leaves)[1:]) if asked else None,
        trained=trained if asked else None,
        strides=_strides_asked(leaves, recording),
        dtype=str(torch.get_default_dtype()),
    )


_TracedCall = tuple[Recording, list[Any], list[TensorWrite], list[PythonChange]]


def _same_without_gradients(
    call: ExampleCall, mode: Mode, free: Mapping[int, Sequence[int]], recording: Recording
) -> bool:
    """Whether the graph of a call is the same where gradients are off: then it is right for both."""
    if GRADIENTS not in recording.asked:
        return True  # a custom function computes the same
    try:
        other, *_ = _recorded(call, mode, free, _AsCalled(gradients=False))
    except (DynamoRefusal, CaptureError):
        return False
    return str(other.gm.graph) == str(recording.gm.graph)


def _strides_asked(leaves: Sequence[Any], recording: Recording) -> Strides | None:
    """The strides of the arguments as far as the model's code asks for them."""
    if STRIDES in recording.asked:
        return strides_of(leaves)
    return tuple(s and () for s in strides_of(leaves)) if CONTIGUOUS in recording.asked else None


def _recorded(
    call: ExampleCall, mode: Mode, free: Mapping[int, Sequence[int]], exactly: _AsCalled = _AsCalled()
) -> _TracedCall:
    """The trace of a call, its flat arguments, and what a call leaves behind on the model.

    Raises:
        CaptureError: Every call changes Python state, and no Python runs beside the graph. What only the first call
            changes, a table that is made once or a length that is noted, is made in the graph at every call instead.
    """
    clone, _ = clone_tree(call.model)
    set_mode_(clone, mode)
    recording, leaves, writes, changes = _traced_call(clone, call, free, exactly)
    outside = recording.outside.beyond(clone)
    try:
        changes += outside.changes()
        if not call.python_runs and (changes or any(w.first for w in writes)):
            device = next((t.device for t in clone.parameters()), torch.device("cpu"))
            replace_stand_ins_(clone, writes, changes, device)
            outside.settle_(device)
            again = _require_same_later(clone, call, free, exactly, (recording, leaves, writes, changes))
            if again is not None:
                writes, tables = without_tables(recording, writes, {w.place for w in again}, call.name)
                changes += tables
    finally:
        outside.restore_()
    return recording, leaves, writes, changes


def _require_same_later(
    clone: nn.Module,
    call: ExampleCall,
    free: Mapping[int, Sequence[int]],
    exactly: _AsCalled,
    first: _TracedCall,
) -> list[TensorWrite] | None:
    """What a later call stores; None where it cannot be traced.

    Raises:
        CaptureError: Later calls change Python state too, or do not what the first does.
    """
    recording, leaves, writes, changes = first
    name = type(call.model).__name__
    try:
        later, later_leaves, stored, again = _traced_call(clone, call, free, exactly)
    except DynamoRefusal:
        if not all(c.logged for c in changes):
            raise CaptureError(python_state_message(name, changes)) from None
        return None  # a table of another size
    outside = later.outside.beyond(clone)
    again += outside.changes()
    outside.restore_()
    if again := [c for c in again if not c.logged]:
        raise CaptureError(python_state_message(name, again))
    if not same_path(recording, later, {id(x) for x in leaves}, {id(x) for x in later_leaves}):
        listed = ", ".join([*(w.place for w in writes if w.first), *(str(c).split(":")[0] for c in changes)][:3])
        raise CaptureError(
            f"a first call of {name} sets {listed} and computes another thing than the calls after it: call the model "
            f"once before, so that it is set, or use ax.compile, which runs the model's own Python."
        )
    return stored


def _traced_call(
    clone: nn.Module, call: ExampleCall, free: Mapping[int, Sequence[int]], exactly: _AsCalled
) -> _TracedCall:
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    copies: dict[int, Any] = {}
    leaves = [copies.setdefault(id(x), _copied(x, exactly.strided)) if isinstance(x, Tensor) else x for x in leaves]
    for i, dimensions in free.items():
        for d in dimensions:
            torch._dynamo.maybe_mark_dynamic(leaves[i], d)
    positional, named = pytree.tree_unflatten(leaves, spec)
    before = attributes_of(clone)
    with fast_path_off():
        recording = record(clone, positional, named, exactly.gradients)
    return recording, leaves, *changes_since(before, clone, recording.outputs)


def _copied(tensor: Tensor, strided: bool) -> Tensor:
    """A copy that Dynamo may mark. Strides of an example would become guards; most models do not ask for them."""
    if strided and not tensor.is_contiguous():
        copied = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    else:
        copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copied.requires_grad_(tensor.requires_grad)


def leaf_names(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """A name for each leaf of the arguments, after the parameters of the model's forward; unique identifiers."""
    parameters = parameters_of_call(model).parameters.values()
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
