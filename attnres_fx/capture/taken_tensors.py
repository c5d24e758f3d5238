"""What a graph takes for granted of the tensors that it takes from its model: that they are there, and their sizes."""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn
from torch.fx import GraphModule

from attnres_fx.passes.graph.module_paths import module_at

#: By the path of a module, the tensors taken from it by name: the sizes of buffers and attributes. A parameter only has
#: to be there.
TakenTensors = Mapping[str, Mapping[str, tuple[int, ...] | None]]


def taken_tensors(gm: GraphModule, own: Collection[str]) -> TakenTensors:
    """The tensors that a graph takes from the modules of its model.

    Args:
        gm: The graph, on a model's tensors.
        own: The paths of those that the graph writes to itself.
    """
    found: dict[str, dict[str, tuple[int, ...] | None]] = {}
    for node in gm.graph.nodes:
        path, _, name = str(node.target).rpartition(".")
        module = module_at(gm, path) if node.op == "get_attr" else None
        held = _held(module, name) if module is not None else None
        if isinstance(held, Tensor) and str(node.target) not in own:
            found.setdefault(path, {})[name] = None if isinstance(held, nn.Parameter) else tuple(held.shape)
    return found


def first_other_tensor(taken: TakenTensors, root: nn.Module, submodule: Callable[[str], nn.Module]) -> str:
    """The first tensor of a model that is gone, or has other sizes, in words; empty where none is.

    Args:
        taken: What was taken for granted.
        root: The model.
        submodule: The module of the model at a path.
    """
    for path, tensors in taken.items():
        module = submodule(path) if path else root
        parameters = module._parameters
        for name, sizes in tensors.items():
            if sizes is None:
                if parameters.get(name, module) is None:
                    return f"{_place(path, name)} is None now and was a parameter"
                continue
            now = module._buffers[name] if name in module._buffers else module.__dict__.get(name, module)
            if now is None:
                return f"{_place(path, name)} is None now and was a tensor"
            if isinstance(now, Tensor) and now.shape != sizes:
                return f"{_place(path, name)} has the sizes {tuple(now.shape)} now and had {sizes}"
    return ""


def _held(module: nn.Module, name: str) -> Tensor | None:
    stores: tuple[Mapping[str, Tensor | None], ...] = (module._parameters, module._buffers, module.__dict__)
    return next((store[name] for store in stores if name in store), None)


def _place(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")
