"""What an operation says of where the features of a tensor are."""

import enum
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from attnres_fx.passes.graph.nodes import argument_of, is_floating, same_shape, shape_of, sizes_agree, tensor_of
from attnres_fx.passes.graph.operation_table import Trait
from attnres_fx.passes.graph.operations import called_module, has_trait, is_light, op_name


class Evidence(enum.IntEnum):
    """What speaks for a dimension; what stands first decides before the others.

    NORM: it is normalised over, or has a mean and a gain of its own for each entry. GAIN: a learned vector multiplies
    along it. CONTRACTION: weights contract over it, or make it. WINDOW: windows move along the dimensions after it.
    """

    NORM = enum.auto()
    GAIN = enum.auto()
    CONTRACTION = enum.auto()
    WINDOW = enum.auto()


#: What speaks, for which tensor, and for which of its dimensions.
Vote = tuple[Evidence, Node, int]

_MOMENTS = {"var": 1, "std": 1, "var_mean": 1, "std_mean": 1, "norm": 2, "linalg_vector_norm": 2, "linalg_norm": 2}
#: How far from a reduction what it normalises is looked for: a sum, a root, a quotient, casts and shapes between.
_STEPS = 24


def evidence_of(node: Node, learned: Iterable[Node]) -> Iterator[Vote]:
    """The votes of one operation.

    Args:
        node: Any node of a graph with values on its nodes.
        learned: The parameters, and what is made of nothing else.
    """
    name = op_name(node)
    if has_trait(node, Trait.NORM):
        yield from _of_norm(node, name)
    elif has_trait(node, Trait.CHANNELS_FIRST):
        yield from _of_window(node, name)
    elif name in ("linear", "embedding"):
        yield from ((Evidence.CONTRACTION, n, len(shape_of(n)) - 1) for n in (*_inputs(node)[:1], node) if _shaped(n))
    elif has_trait(node, Trait.MIXES):
        yield from _of_product(node, name, learned)
    elif name in ("mul", "div"):
        yield from _of_gain(node, learned)
    elif has_trait(node, Trait.REDUCTION):
        yield from _of_moment(node, name)


def _inputs(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if is_floating(n)]


def _shaped(node: Node) -> bool:
    return len(shape_of(node)) > 0


def _of_norm(node: Node, name: str) -> Iterator[Vote]:
    source = next(iter(_inputs(node)), None)
    if source is None:
        return
    rank = len(shape_of(source))
    if has_trait(node, Trait.CHANNELS_FIRST):
        if rank > 1:
            yield Evidence.NORM, source, 1
    elif name == "normalize":
        dim = argument_of(node, 2, "dim")
        yield Evidence.NORM, source, (dim if isinstance(dim, int) else 1) % rank
    elif _normalized_dimensions(node) == 1:
        yield Evidence.NORM, source, rank - 1


def _normalized_dimensions(node: Node) -> int:
    module = called_module(node) if node.op == "call_module" else None
    shape: Any = argument_of(node, 1, "normalized_shape") if module is None else module.normalized_shape
    return len(shape) if isinstance(shape, list | tuple) else 1


def _of_window(node: Node, name: str) -> Iterator[Vote]:
    """Convolutions and pools count their channels from the spatial dimensions; one without a batch has none before."""
    spatial = _spatial(node)
    kind = Evidence.CONTRACTION if name in ("conv", "conv_transpose") else Evidence.WINDOW
    for tensor in (*_inputs(node)[:1], node):
        rank = len(shape_of(tensor))
        if spatial is not None and rank > spatial:
            yield kind, tensor, rank - spatial - 1
        elif spatial is None and rank > 2:
            yield kind, tensor, 1


def _spatial(node: Node) -> int | None:
    """Over how many dimensions a convolution goes, by its weight; None for what has none."""
    module = called_module(node) if node.op == "call_module" else None
    weight = argument_of(node, 1, "weight") if module is None else getattr(module, "weight", None)
    if isinstance(weight, Node):
        weight = tensor_of(weight)
    return weight.dim() - 2 if isinstance(weight, torch.Tensor) and weight.dim() > 2 else None


def _of_product(node: Node, name: str, learned: Iterable[Node]) -> Iterator[Vote]:
    """A product with a weight contracts the features, on whichever side the weight stands."""
    if name == "einsum":
        yield from _of_einsum(node, learned)
        return
    operands = [n for n in node.args[:2] if isinstance(n, Node)]
    if len(operands) < 2 or name == "tensordot" or (operands[0] in learned) is (operands[1] in learned):
        return
    data, from_end = (operands[1], 2) if operands[0] in learned else (operands[0], 1)
    for tensor in (data, node):
        rank = len(shape_of(tensor))
        if rank >= max(from_end, 2):
            yield Evidence.CONTRACTION, tensor, rank - from_end


def _of_einsum(node: Node, learned: Iterable[Node]) -> Iterator[Vote]:
    equation = node.args[0]
    if not isinstance(equation, str) or "..." in equation or "->" not in equation:
        return
    left, right = equation.replace(" ", "").split("->")
    operands = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
    named = [(n, letters) for n, letters in zip(operands, left.split(","), strict=False) if isinstance(n, Node)]
    named.sort(key=lambda pair: pair[0] not in learned)
    if [n in learned for n, _ in named] != [True, False]:
        return
    (_, weight), (data, letters) = named
    contracted, made = set(weight) - set(right), set(weight) - set(letters)
    yield from ((Evidence.CONTRACTION, data, i) for i, c in enumerate(letters) if c in contracted)
    yield from ((Evidence.CONTRACTION, node, i) for i, c in enumerate(right) if c in made)


def _of_gain(node: Node, learned: Iterable[Node]) -> Iterator[Vote]:
    gains = [n for n in node.all_input_nodes if n in learned]
    data = [n for n in node.all_input_nodes if n not in learned and is_floating(n) and same_shape(n, node)]
    if len(gains) != 1 or len(data) != 1:
        return
    gain, shape = shape_of(gains[0]), shape_of(node)
    along = [i for i in range(1, len(gain) + 1) if not (isinstance(gain[-i], int) and gain[-i] == 1)]
    if len(along) == 1 and len(shape) > 1 and sizes_agree(gain[-along[0]], shape[-along[0]]):
        yield Evidence.GAIN, data[0], len(shape) - along[0]


def _of_moment(node: Node, name: str) -> Iterator[Vote]:
    """A norm that is written out: a second moment over one dimension that meets what it was taken of again."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, Node) or not is_floating(source):
        return
    if name in ("mean", "sum"):
        dims = argument_of(node, 1, "dim") if _is_square(source) else None
    else:
        dims = argument_of(node, _MOMENTS[name], "dim") if name in _MOMENTS else None
    listed = list(dims) if isinstance(dims, list | tuple) else [dims]
    one = listed[0] if len(listed) == 1 else None
    if isinstance(one, int) and not isinstance(one, bool) and _meets_again(node, source):
        yield Evidence.NORM, source, one % len(shape_of(source))


def _is_square(node: Node) -> bool:
    while has_trait(node, Trait.CAST) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    name = op_name(node)
    if name == "mul":
        return len(node.args) == 2 and node.args[0] is node.args[1]
    return name == "square" or (name == "pow" and argument_of(node, 1, "exponent") == 2)


def _meets_again(moment: Node, source: Node) -> bool:
    """Whether a moment is spread over what it was taken of; one that is only pooled normalises nothing."""
    waiting, seen = [moment], 0
    for node in waiting:
        for user in node.users:
            seen += 1
            if seen > _STEPS:
                return False
            if not is_light(user):
                continue
            if is_floating(user) and same_shape(user, source):
                return True
            waiting.append(user)
    return False


def is_parameter(node: Node) -> bool:
    """Whether a node is a parameter of the model."""
    if node.op not in ("get_attr", "placeholder"):
        return False
    if isinstance(tensor_of(node), nn.Parameter):
        return True
    held: Any = node.graph.owning_module if node.op == "get_attr" else None
    for part in str(node.target).split("."):
        held = getattr(held, part, None)
    return isinstance(held, nn.Parameter)
