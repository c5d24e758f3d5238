"""A recorded graph bound to its model: every input, output and write by identity."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from attnres_fx.capture.recorder import Recording
from attnres_fx.capture.side_effects import TensorWrite
from attnres_fx.capture.tensor_places import tensors_within
from attnres_fx.capture.transform_regions import outline_transforms_pass
from attnres_fx.capture.watched import is_numpy_argument, numpy_source
from attnres_fx.errors import CaptureError
from attnres_fx.passes.graph.copying import copy_graph
from attnres_fx.passes.graph.module_paths import ModulePaths, name_modules_, paths_by_id
from attnres_fx.passes.graph.mutation_order import written_attributes
from attnres_fx.passes.graph.nodes import describe, nodes_with_bodies, value_of

#: Where a bound graph keeps tensors that are neither parameters nor buffers.
CONSTANT = "_constant_"


@dataclass(frozen=True)
class BoundGraph:
    """A graph with flat inputs and outputs, on the tensors of a module tree.

    Attributes:
        gm: The graph. Its inputs are the leaves of the arguments, its outputs those of the result, then what is to be
            written.
        out_spec: Pytree of the result.
        writes: Where the outputs after the result's are to be stored.
    """

    gm: GraphModule
    out_spec: Any
    writes: tuple[TensorWrite, ...]


def bind_graph(
    recording: Recording,
    model: nn.Module,
    leaves: Sequence[Any],
    names: Sequence[str],
    places: Mapping[int, str],
    writes: Sequence[TensorWrite] = (),
    *,
    keep_all: bool = False,
) -> BoundGraph:
    """Bind what Dynamo recorded.

    Args:
        recording: Of a clone of the model.
        model: A clone as it was before the call, whose tensors are the model's own.
        leaves: The flat arguments of the recorded call.
        names: A name for each of them.
        places: Where the model's tensors were before the call, by their ids.
        writes: What the call stored in attributes of the model, by the recorded output.
        keep_all: Whether what the call left in other places is among the outputs, at the end.

    Raises:
        CaptureError: An input or an output of the graph comes from nowhere in the model or the arguments.
    """
    return _Binder(recording, model, leaves, names, places).bound(writes, keep_all)


class _Binder:
    def __init__(
        self,
        recording: Recording,
        model: nn.Module,
        leaves: Sequence[Any],
        names: Sequence[str],
        places: Mapping[int, str],
    ) -> None:
        self.recording, self.model, self.leaves = recording, model, leaves
        self.root = nn.Module()
        for store in ("_parameters", "_buffers", "_modules"):
            getattr(self.root, store).update(getattr(model, store))
        self.graph = copy_graph(recording.gm.graph)
        self.places = places
        self.argument: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            for _, tensor in tensors_within(leaf):
                self.argument.setdefault(id(tensor), i)
        self.recorded = [n for n in self.graph.nodes if n.op == "placeholder"]
        pairs = list(zip(self.recorded, recording.sources, strict=False))
        self.numpy = {n: held for n, source in pairs if (held := numpy_source(source))}
        self.numpy_arguments = {n for n, source in pairs if is_numpy_argument(source)}
        self.start = next(n for n in self.graph.nodes if n.op != "placeholder")
        self.constants: dict[int, str] = {}
        self.foreign: dict[str, str] = {}
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            self.inputs = [self.graph.placeholder(f"{name}_input") for name in names]
        for node, name in zip(self.inputs, names, strict=True):
            node.target = name

    def bound(self, writes: Sequence[TensorWrite], keep_all: bool) -> BoundGraph:
        sizes: list[tuple[Node, Any]] = []
        for node, value in zip(self.recorded, self.recording.inputs, strict=True):
            if isinstance(value_of(node), torch.SymInt | torch.SymFloat):
                sizes.append((node, value))
            else:
                self._bind(node, value)
        for node, value in sizes:
            self._bind_size(node, value)
        for node in self.inputs:  # named after the arguments, now that the recorded names are free
            node._rename(str(node.target))
        out_spec, stored = self._bind_outputs(writes, keep_all)
        self._take_attributes()
        self.graph.lint()
        self._refuse_foreign_writes()
        self._refuse_numpy_draws()
        gm = GraphModule(self.root, self.graph)
        name_modules_(nodes_with_bodies(gm), ModulePaths(paths_by_id(self.recording.module), ((("L", "module"), ""),)))
        outline_transforms_pass(gm)
        return BoundGraph(gm, out_spec, stored)

    def _bind(self, node: Node, value: Any) -> None:
        place = self.argument.get(id(value))
        if place is not None:
            bound = self.inputs[place]
            if value is not self.leaves[place]:
                raise CaptureError(
                    f"argument {bound.target!r} is a {type(self.leaves[place]).__name__} that holds tensors and that "
                    f"torch.utils._pytree does not know: register it there, or pass its tensors."
                )
            bound.meta = {**node.meta, **bound.meta}
        elif not node.users:
            self.graph.erase_node(node)
            return
        else:
            with self.graph.inserting_before(self.start):
                bound = self.graph.get_attr(self._attribute(node, value))
            bound.meta = dict(node.meta)
        node.replace_all_uses_with(bound)
        self.graph.erase_node(node)

    def _attribute(self, node: Node, value: Any) -> str:
        """The path of what the model holds; of a constant where no attribute path leads to it."""
        path = self.places.get(id(value))
        if path is None and id(value) in self.recording.lasting:
            name = self._constant(value, self.recording.lasting[id(value)])  # in a closure, or global
            self.foreign[name] = "a tensor that a function encloses or a module's globals hold"
            return name
        if path is None and node in self.numpy:
            return self._constant(value, self.numpy[node])
        if path is None and node in self.numpy_arguments:
            raise CaptureError(
                f"an argument holds a numpy value of shape {tuple(value.shape)} ({describe(node)}), which is no "
                f"tensor: pass torch.as_tensor(value), or a Python number (value.item())."
            )
        if path is None:
            raise CaptureError(_of_unknown_origin(node, value))
        if not _is_attribute_path(self.model, path) or _through_object(self.model, path):
            name = self._constant(value, path)
            if _through_object(self.model, path):
                self.foreign[name] = f"{path} (a tensor that an object holds which is no module)"
            return name
        if "." not in path and path not in self.root._parameters and path not in self.root._buffers:
            self.root.__dict__[path] = value  # a plain attribute of the model itself
        return path

    def _constant(self, value: Tensor, path: str) -> str:
        if id(value) not in self.constants:
            name = CONSTANT + re.sub(r"\W", "_", path)
            setattr(self.root, name, value)
            self.constants[id(value)] = name
        return self.constants[id(value)]

    def _refuse_numpy_draws(self) -> None:
        for node in self.graph.nodes:  # Dynamo would draw them from torch's generator
            if "_numpy.random" in str(getattr(getattr(node.target, "f", None), "__module__", "")):
                raise CaptureError(
                    f"{describe(node)} is drawn by numpy's random, which a graph cannot do: draw it with torch "
                    f"(torch.rand), or pass it as an argument."
                )

    def _refuse_foreign_writes(self) -> None:
        for name in written_attributes(self.graph):
            if name in self.foreign:
                raise CaptureError(
                    f"the model writes in place into {self.foreign[name]}: keep it in a buffer (register_buffer), or "
                    f"use ax.compile, which runs the model's own Python."
                )

    def _bind_size(self, node: Node, value: Any) -> None:
        """A size that Dynamo passes beside the tensors is read from the tensor it is a size of."""
        if not node.users:
            self.graph.erase_node(node)
            return
        symbol = str(value_of(node))
        for source in self.inputs:
            held = value_of(source)
            if not isinstance(held, Tensor):
                continue
            for d, size in enumerate(held.shape):
                if isinstance(size, torch.SymInt) and str(size.node._expr) == symbol:
                    with self.graph.inserting_before(self.start):
                        read = self.graph.call_method("size", (source, d))
                    read.meta = dict(node.meta)
                    node.replace_all_uses_with(read)
                    self.graph.erase_node(node)
                    return
        raise CaptureError(
            f"{describe(node)}: the number {value!r} changes from call to call and is no size of an argument: pass it "
            f"as a tensor, or draw it with torch."
        )

    def _bind_outputs(self, writes: Sequence[TensorWrite], keep_all: bool) -> tuple[Any, tuple[TensorWrite, ...]]:
        output = next(n for n in self.graph.nodes if n.op == "output")
        returned: Sequence[Any] = output.args[0]  # type: ignore[assignment]
        position = {id(o): i for i, o in enumerate(self.recording.outputs)}
        leaves, spec = pytree.tree_flatten(self.recording.result)
        nodes = []
        for leaf in leaves:
            at = None if _is_plain(leaf) else position.get(id(leaf))
            nodes.append(self._known(leaf) if at is None else returned[at])
        stored = tuple(replace(w, output=len(nodes) + i) for i, w in enumerate(writes))
        kept = [*nodes, *(returned[w.output] for w in writes)]
        output.args = ((*kept, *(n for n in returned if keep_all and isinstance(n, Node) and n not in kept)),)
        return spec, stored

    def _known(self, leaf: Any) -> Any:
        """An output that the graph did not make: an argument, a tensor of the model, or a plain value."""
        if not isinstance(leaf, Tensor):
            if _is_plain(leaf):
                return leaf
            raise CaptureError(
                f"the model returns a {type(leaf).__name__}, which torch.utils._pytree does not know: register it, or "
                f"return tensors."
            )
        place = self.argument.get(id(leaf))
        if place is not None:
            return self.inputs[place]
        path = self.places.get(id(leaf))
        if path is None:
            raise CaptureError(f"an output of shape {tuple(leaf.shape)} comes from nowhere in the graph.")
        output = next(n for n in self.graph.nodes if n.op == "output")
        with self.graph.inserting_before(output):
            node = self.graph.get_attr(path)
        node.meta["val"] = leaf
        return node

    def _take_attributes(self) -> None:
        """Bodies of regions, and tensors that Dynamo made while tracing, become attributes of the bound graph."""
        for node in self.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                name = str(node.target).split(".")[0]
                if name not in self.root.__dict__ and not hasattr(self.root, name):
                    setattr(self.root, name, getattr(self.recording.gm, name))


def _is_attribute_path(root: nn.Module, path: str) -> bool:
    """Whether a path leads from attribute to attribute to a tensor; a path into a container does not."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part, None)
    return isinstance(value, Tensor)


def _through_object(root: nn.Module, path: str) -> bool:
    """Whether a path leads through an object that is neither a module nor a container."""
    value: Any = root
    for part in path.split(".")[:-1]:
        if isinstance(value, list | tuple):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = next((v for k, v in value.items() if str(k) == part), None)
        else:
            value = getattr(value, part, None)
        if not isinstance(value, nn.Module | list | tuple | dict | None):
            return True
    return False


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (int, float, bool, str, complex) or isinstance(value, torch.dtype)


def _of_unknown_origin(node: Node, value: Any) -> str:
    if type(value).__name__ == "DeviceMesh":
        return (
            f"the model takes a DeviceMesh ({describe(node)}): it is parallelized already (parallelize_module), by "
            f"hooks that no graph holds. Attach the model first (attnres_fx.compile, or attnres_fx.attach and "
            f"model.compile), and parallelize it afterwards; a converted model is not parallelized."
        )
    kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    return (
        f"the model takes {kind} ({describe(node)}) that is neither an argument nor held by a module: a value drawn by "
        f"Python's random or numpy, or kept outside the model. Draw it with torch (torch.rand), or pass it as an "
        f"argument."
    )
