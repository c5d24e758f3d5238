"""A graph as a list of operations by name, and back."""

import contextlib
import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from attnres_fx.capture.restore import RestoredFunction, function_of
from attnres_fx.conversion.stored.arguments import ArgumentReader, DeviceMap, to_data
from attnres_fx.conversion.stored.operations import ATTRIBUTES, function_named, methods, name_of
from attnres_fx.conversion.stored.tensors import TensorTable
from attnres_fx.conversion.stored.values import NoValue, ValueReader, ValueWriter
from attnres_fx.errors import SaveError
from attnres_fx.passes.graph.module_paths import module_path
from attnres_fx.passes.graph.nodes import describe, source_line, value_of
from attnres_fx.passes.normalize.normalization import set_attribute_values_

_DEEPEST = 8
_NODE_NAME = re.compile(r"[A-Za-z_]\w*")
_ATTRIBUTE = re.compile(r"[^\"'\\{}\x00-\x1f\x7f]+")
_KEPT = ("recompute", "ac_graph_id")
_ENTRIES = {"op", "name", "target", "args", "kwargs", "tensor", "module", "line", "value", *_KEPT}

Program = dict[str, Any]


# --- writing -----------------------------------------------------------------------------------------


@dataclass
class ProgramWriter:
    """Writes graphs.

    Attributes:
        tensors: Gets the tensors that the graphs name.
        root: The model.
    """

    tensors: TensorTable
    root: nn.Module

    def write(self, gm: GraphModule, *, nested: bool = False) -> Program:
        """A graph as JSON.

        Args:
            gm: A module with the graph.
            nested: Whether it is a body inside another graph, whose tensors have no place in the model's tree.

        Raises:
            SaveError: It calls, or is given, something that a file cannot hold; it names the node.
        """
        values = ValueWriter()
        bodies: dict[str, Program] = {}
        nodes = []
        for node in gm.graph.nodes:
            try:
                nodes.append(self._node(gm, node, values, bodies, nested))
            except SaveError as error:
                raise SaveError(f"{describe(node)}: {error}") from error
        return {"nodes": nodes, "sizes": values.symbols, "bodies": bodies}

    def _node(
        self, gm: GraphModule, node: Node, values: ValueWriter, bodies: dict[str, Program], nested: bool
    ) -> dict[str, Any]:
        written: dict[str, Any] = {"op": node.op, "name": node.name, "target": str(node.target)}
        if node.op == "call_function":
            written["target"] = self._function(node)
        elif node.op == "call_method":
            _check_method(node.target)
        elif node.op == "get_attr":
            self._attribute(gm, node, written, bodies, nested)
        elif node.op == "call_module":
            raise SaveError("it calls a module of the model, whose code a file does not hold")
        if node.args:
            written["args"] = [to_data(a) for a in node.args]
        if node.kwargs:
            written["kwargs"] = {k: to_data(v) for k, v in node.kwargs.items()}
        _check_getattr(node.target, node.args)
        return {**written, **_about(node, values)}

    def _function(self, node: Node) -> Any:
        restored = getattr(node.target, "attnres_restored_function", None)
        if not isinstance(restored, RestoredFunction):
            return name_of(node.target)
        forward, backward = restored.forward, restored.backward
        if not isinstance(forward, GraphModule) or not isinstance(backward, GraphModule):
            raise SaveError("it calls a custom autograd.Function that is no graph")
        return {
            "forward": self.write(forward, nested=True),
            "backward": self.write(backward, nested=True),
            "not_differentiable": list(restored.not_differentiable),
        }

    def _attribute(
        self, gm: GraphModule, node: Node, written: dict[str, Any], bodies: dict[str, Program], nested: bool
    ) -> None:
        path = str(node.target)
        value = attrgetter(path)(gm)
        if isinstance(value, GraphModule):
            if path not in bodies:
                bodies[path] = self.write(value, nested=True)
        elif not isinstance(value, Tensor):
            raise SaveError(f"{path} is a {type(value).__name__}, which a file cannot hold")
        elif nested:
            written["tensor"] = self.tensors.name_of(value)
        elif path not in self.tensors.entries:
            self.tensors.add(path, "attribute" if _attribute_at(self.root, path) is value else "constant", value)


def _attribute_at(root: nn.Module, path: str) -> Any:
    try:
        return attrgetter(path)(root)
    except AttributeError:
        return None


def _about(node: Node, values: ValueWriter) -> dict[str, Any]:
    """What passes and reports ask of a node beside what it calls."""
    about: dict[str, Any] = {}
    if path := module_path(node):
        about["module"] = path
    if line := source_line(node):
        about["line"] = line
    about |= {key: node.meta[key] for key in _KEPT if type(node.meta.get(key)) in (bool, int)}
    value = value_of(node)
    if value is not None and not (node.op == "get_attr" and isinstance(value, Tensor)):
        with contextlib.suppress(NoValue):
            about["value"] = values.write(value)
    return about


def _check_method(name: Any) -> None:
    if name not in methods():
        raise SaveError(f"it calls the method {name!r:.60}, which no file may name")


def _check_getattr(target: Any, args: Any) -> None:
    if target is getattr and not (len(args) == 2 and isinstance(args[1], str) and args[1] in ATTRIBUTES):
        raise SaveError(f"it reads an attribute by {args[1:]!r:.60}, which no file may name")


# --- reading -----------------------------------------------------------------------------------------


@dataclass
class ProgramReader:
    """Reads graphs.

    Attributes:
        tensors: The tensors of the file, by name.
        device: Where what the file has on a device is now.
    """

    tensors: Mapping[str, Tensor]
    device: DeviceMap

    def read(self, program: Any, tree: nn.Module | None, depth: int = 0) -> GraphModule:
        """A graph on the tensors of a tree; a body, which has none, on those that its nodes name.

        Raises:
            SaveError: It is no such program; it names the node.
        """
        if not isinstance(program, dict) or set(program) != {"nodes", "sizes", "bodies"} or depth > _DEEPEST:
            raise SaveError("it has no nodes, sizes and bodies")
        if not isinstance(program["nodes"], list) or not isinstance(program["bodies"], dict):
            raise SaveError("its nodes are no list, or its bodies no table")
        values = ValueReader(program["sizes"], self.device)
        bodies = {path: self.read(body, None, depth + 1) for path, body in program["bodies"].items()}
        graph, nodes, held = Graph(), dict[str, Node](), dict[str, Any](bodies)
        arguments = ArgumentReader(nodes, self.device)
        for data in program["nodes"]:
            try:
                self._node(graph, data, arguments, values, held, tree, depth)
            except Exception as error:
                name = data.get("name") if isinstance(data, dict) else data
                raise SaveError(f"node {name!r:.60}: {error}") from error
        if not nodes or next(reversed(nodes.values())).op != "output":
            raise SaveError("it has no output")
        graph.lint()
        if tree is None:
            return GraphModule(held, graph)
        for path, body in bodies.items():
            _place(tree, path, body)
        gm = GraphModule(tree, graph)
        set_attribute_values_(gm)
        return gm

    def _node(
        self,
        graph: Graph,
        data: Any,
        arguments: ArgumentReader,
        values: ValueReader,
        held: dict[str, Any],
        tree: nn.Module | None,
        depth: int,
    ) -> None:
        match data:
            case {"op": str() as op, "name": str() as name, "target": target} if _is_name(name):
                pass
            case _:
                raise SaveError("it has no operation, name or target")
        if unknown := sorted(set(data) - _ENTRIES):
            raise SaveError(f"it has the unknown entry {unknown[0]!r:.40}")
        args, kwargs = data.get("args", []), data.get("kwargs", {})
        if not isinstance(args, list) or not isinstance(kwargs, dict) or not all(map(_is_name, kwargs)):
            raise SaveError("its arguments are no list, or its keywords no table of names")
        given = tuple(arguments.read(a) for a in args)
        named = {k: arguments.read(v) for k, v in kwargs.items()}
        called = self._target(op, data, target, held, tree, depth)
        _check_getattr(called, given)
        node = graph.create_node(op, called, given, named, name)
        if node.name != name or name in arguments.nodes:
            raise SaveError("another node has its name, or no node may have it")
        arguments.nodes[name] = node  # type: ignore[index]
        _restore_about(node, data, values)

    def _target(
        self, op: str, data: dict[str, Any], target: Any, held: dict[str, Any], tree: nn.Module | None, depth: int
    ) -> Any:
        if op == "call_function":
            return self._restored(target, depth) if isinstance(target, dict) else function_named(target)
        if not isinstance(target, str):
            raise SaveError(f"{target!r:.60} is no target")
        if op == "call_method":
            _check_method(target)
        elif op == "get_attr":
            self._attribute(target, data, held, tree)
        elif op == "placeholder":
            if not _is_name(target):
                raise SaveError(f"{target!r:.60} is no name of an argument")
        elif op != "output" or target != "output":
            raise SaveError(f"{op!r:.40} is no operation")
        return target

    def _attribute(self, path: str, data: dict[str, Any], held: dict[str, Any], tree: nn.Module | None) -> None:
        if not all(_ATTRIBUTE.fullmatch(part) and not part.startswith("__") for part in path.split(".")):
            raise SaveError(f"{path!r:.60} is no path of an attribute")
        if path in held:
            return
        if tree is None:
            if data.get("tensor") not in self.tensors:
                raise SaveError(f"its tensor {data.get('tensor')!r:.60} is not in the file")
            held[path] = self.tensors[data["tensor"]]
        elif path not in self.tensors:
            raise SaveError(f"{path!r:.60} is not in the file")

    def _restored(self, target: Mapping[str, Any], depth: int) -> Callable[..., Any]:
        match target:
            case {"forward": forward, "backward": backward, "not_differentiable": list() as indices}:
                if all(type(i) is int and i >= 0 for i in indices):
                    first, second = (self.read(body, None, depth + 1) for body in (forward, backward))
                    return function_of(first, second, tuple(indices))
        raise SaveError("its custom function is no forward and backward")


def _is_name(name: Any) -> bool:
    if not isinstance(name, str) or keyword.iskeyword(name) or (name.startswith("__") and name.endswith("__")):
        return False
    return _NODE_NAME.fullmatch(name) is not None


def _restore_about(node: Node, data: Mapping[str, Any], values: ValueReader) -> None:
    path, line = data.get("module", ""), data.get("line", "")
    if not isinstance(path, str) or not isinstance(line, str):
        raise SaveError("its place in the original's code is no text")
    if path:
        node.meta["nn_module_stack"] = {path: (path, "")}
    if line:
        file, _, number = line.rpartition(":")
        node.meta["stack_trace"] = f'  File "{file}", line {number}, in forward'
    node.meta.update({key: data[key] for key in _KEPT if type(data.get(key)) in (bool, int)})
    if "value" in data:
        node.meta["val"] = values.read(data["value"])


def _place(root: nn.Module, path: str, body: GraphModule) -> None:
    """Put a body where a graph calls it, in place."""
    *parents, name = path.split(".")
    module = root
    for part in parents:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    if isinstance(module._modules.get(name), GraphModule) or name in (*module._parameters, *module._buffers):
        raise SaveError(f"{path!r:.60} is there twice")
    module._modules[name] = body
