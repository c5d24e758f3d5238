"""The three spellings of one graph, and the table that hides them.

`torch.fx.symbolic_trace` writes `operator.add` and `call_module`, Dynamo writes torch functions and
methods, `torch.export` writes aten overloads. Everything else asks the predicates here, which speak of
one canonical name per operation: aten's, with the trailing underscore for in-place forms.
"""

import operator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

from attnres_fx.passes.graph.nodes import numel_of_row_is_kept, same_shape, shape_of, tensor_of

_OPERATORS = {
    operator.iadd: "add_",
    operator.isub: "sub_",
    operator.imul: "mul_",
    operator.itruediv: "div_",
    operator.truediv: "div",
    operator.ifloordiv: "floor_divide_",
    operator.imod: "remainder_",
    operator.ipow: "pow_",
    operator.imatmul: "matmul_",
    operator.ior: "bitwise_or_",
    operator.iand: "bitwise_and_",
    operator.ixor: "bitwise_xor_",
    operator.and_: "bitwise_and",
    operator.or_: "bitwise_or",
    operator.not_: "logical_not",
    operator.is_: "is",
}

_MODULES: dict[type, str] = {
    torch.nn.Identity: "identity",
    torch.nn.Dropout: "dropout",
    torch.nn.Dropout1d: "dropout",
    torch.nn.Dropout2d: "dropout",
    torch.nn.Dropout3d: "dropout",
    torch.nn.AlphaDropout: "dropout",
    torch.nn.LayerNorm: "layer_norm",
    torch.nn.RMSNorm: "rms_norm",
    torch.nn.GroupNorm: "group_norm",
    torch.nn.BatchNorm1d: "batch_norm",
    torch.nn.BatchNorm2d: "batch_norm",
    torch.nn.BatchNorm3d: "batch_norm",
    torch.nn.InstanceNorm1d: "instance_norm",
    torch.nn.Flatten: "flatten",
    torch.nn.Unflatten: "unflatten",
}

_ALIASES = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "_unsafe_view": "reshape",
    "native_layer_norm": "layer_norm",
    "_fused_rms_norm": "rms_norm",
    "convolution": "conv",
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "scaled_dot_product_attention": "sdpa",
}

CASTS = frozenset(
    "to _to_copy float double half bfloat16 type type_as _autocast_to_full_precision "
    "_autocast_to_reduced_precision".split()
)
IDENTITIES = frozenset("contiguous clone alias detach identity lift_fresh lift_fresh_copy wait_tensor".split())
RESHAPES = frozenset("view reshape flatten unflatten unsqueeze squeeze view_as reshape_as".split())
TOKEN_MOVES = frozenset(
    "permute transpose movedim slice select narrow expand expand_as broadcast_to index_select roll flip "
    "getitem t".split()
)
_DATA_MOVEMENT = (
    CASTS
    | IDENTITIES
    | RESHAPES
    | TOKEN_MOVES
    | frozenset("cat concat stack split chunk unbind repeat repeat_interleave pad tile hstack vstack".split())
)
_LIGHT = _DATA_MOVEMENT | frozenset(
    "dropout feature_dropout alpha_dropout native_dropout masked_fill where gelu silu relu tanh sigmoid glu "
    "softplus leaky_relu elu mish hardswish hardtanh hardsigmoid full_like zeros_like ones_like empty_like "
    "new_zeros new_ones new_empty new_full to_copy pos _assert_tensor_metadata".split()
)
_SHAPED_AS = frozenset("view_as reshape_as expand_as type_as".split())
NORMS = frozenset("layer_norm rms_norm group_norm batch_norm instance_norm _native_batch_norm_legit".split())
_REDUCTIONS = frozenset("mean var std sum var_mean std_mean norm linalg_vector_norm amax pow".split())
CHANNELS_FIRST = frozenset("conv batch_norm group_norm instance_norm max_pool2d avg_pool2d".split())
_METADATA = frozenset(
    "_assert_tensor_metadata sym_size sym_numel sym_stride sym_storage_offset size dim numel stride ndim "
    "is_floating_point getattr storage_offset _assert_scalar".split()
)


def op_name(node: Node) -> str:
    """Canonical name of what a node calls; `""` for placeholders, attributes and the output."""
    if node.op == "call_method":
        return _ALIASES.get(str(node.target), str(node.target))
    if node.op == "call_module":
        return _module_name(node)
    if node.op != "call_function":
        return ""
    return _function_name(node.target)


def _module_name(node: Node) -> str:
    module = called_module(node)
    if module is None:
        return "module"
    known = _MODULES.get(type(module))
    if known is not None:
        return known
    if type(module).__module__ == "torch.nn.modules.activation" and not list(module.parameters()):
        return "softmax" if "Softmax" in type(module).__name__ else "relu"
    return "module"


def called_module(node: Node) -> torch.nn.Module | None:
    root = node.graph.owning_module
    try:
        return root.get_submodule(str(node.target)) if isinstance(root, GraphModule) else None
    except AttributeError:
        return None


@cache
def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        namespace, _, name = str(target._schema.name if hasattr(target, "_schema") else target).partition("::")
        if namespace not in ("aten", "prims"):
            return f"{namespace}::{name}"
        return {"sym_size": "sym_size"}.get(name, _ALIASES.get(name, name))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{target._name}"
    if target in _OPERATORS:
        return _OPERATORS[target]
    name = getattr(target, "__name__", str(target))
    return _ALIASES.get(name, name)


@cache
def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or "::" in name:
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def is_light(node: Node) -> bool:
    """Whether a node is no more than elementwise: pointwise arithmetic, or rows moved about.

    Contractions, reductions, convolutions, gathers, scatters and everything unknown are not.
    """
    name = op_name(node)
    if name == "getitem":
        return not indexes_by_tensor(node.args[1])
    return name in _LIGHT or name in _METADATA or _is_pointwise(name.removesuffix("_"))


def may_be_in_norm(node: Node) -> bool:
    """Whether a node could be part of a written-out normalisation."""
    return is_norm_step(node) or is_light(node)


def is_norm_step(node: Node) -> bool:
    """Whether a node is what makes a normalisation one: a norm, or a reduction."""
    name = op_name(node)
    return name in NORMS or (name in _REDUCTIONS and name != "pow")


def asks_only_metadata(node: Node, of: Node | None = None) -> bool:
    """Whether a node looks at shape, dtype or device (of one argument, or of all) and at no value."""
    name = op_name(node)
    if name in _METADATA:
        return True
    if name.endswith("_like") or name.startswith("new_"):
        return True
    return of is not None and name in _SHAPED_AS and node.args[0] is not of


def is_dropout(node: Node) -> bool:
    return op_name(node) in ("dropout", "native_dropout", "feature_dropout", "alpha_dropout")


def is_aten(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


@dataclass(frozen=True)
class Addition:
    """`left_scale * left + right_scale * right`."""

    left: Node
    left_scale: float
    right: Node
    right_scale: float


def read_addition(node: Node) -> Addition | None:
    """A node as an addition of two floating tensors, or None."""
    name = op_name(node)
    if name not in ("add", "sub", "rsub"):
        return None
    args = list(node.args)
    left = args[0] if args else node.kwargs.get("input")
    right = args[1] if len(args) > 1 else node.kwargs.get("other")
    alpha = args[2] if len(args) > 2 else node.kwargs.get("alpha", 1)
    if not isinstance(left, Node) or not isinstance(right, Node) or not isinstance(alpha, int | float):
        return None
    if not (is_floating(left) and is_floating(right) and is_floating(node)):
        return None
    if name == "rsub":
        return Addition(right, 1, left, -alpha)
    return Addition(left, 1, right, alpha if name == "add" else -alpha)


def is_floating(node: Node) -> bool:
    value = tensor_of(node)
    return value is not None and value.is_floating_point() and value.dim() >= 1


@dataclass(frozen=True)
class RowMap:
    """A node that maps over every source of the state it is given.

    kind: `"identity"`, `"cast"`, `"reshape"` (rows in the same order), `"token"` (rows moved or picked)
        or `"factor"` (rows multiplied). `others` are the nodes the factor itself comes from.
    """

    state: Node
    kind: str
    others: tuple[Node, ...] = ()


def read_maps(node: Node) -> tuple[RowMap, ...]:
    """The ways in which a node can be a row map; a product of two tensors is one in either argument."""
    if not is_floating(node):
        return ()
    name = op_name(node)
    if name in ("mul", "div"):
        return _products(node, name)
    first = added_zero_operand(node) or (node.args[0] if node.args else node.kwargs.get("input"))
    if name == "where" and len(node.args) == 3:
        first = node.args[1]
        if not _is_zero(node.args[2]):
            return ()
    if not isinstance(first, Node) or not is_floating(first):
        return ()
    kind = _kind_of_map(node, name, first)
    others = tuple(n for n in node.all_input_nodes if n is not first) if kind == "factor" else ()
    return (RowMap(first, kind, others),) if kind else ()


def _kind_of_map(node: Node, name: str, first: Node) -> str | None:
    if name in IDENTITIES or (name in ("add", "sub") and _adds_zero(node)):
        return "identity"
    if is_dropout(node):
        return "identity" if dropout_probability(node) == 0 else None
    if name in CASTS:
        return "cast"
    if name in ("neg", "where") or (name == "masked_fill" and _is_zero(_argument(node, 2, "value"))):
        return "factor" if same_shape(node, first) else None
    if name in RESHAPES:
        return "reshape" if numel_of_row_is_kept(first, node) else None
    if name in TOKEN_MOVES and _moves_whole_rows(node, name, first):
        return "token"
    return None


def _products(node: Node, name: str) -> tuple[RowMap, ...]:
    left = node.args[0] if node.args else node.kwargs.get("input")
    right = _argument(node, 1, "other")
    if name == "div" and node.kwargs.get("rounding_mode") is not None:
        return ()
    pairs = [(left, right)] if name == "div" else [(left, right), (right, left)]
    return tuple(
        RowMap(state, "factor", (other,) if isinstance(other, Node) else ())
        for state, other in pairs
        if isinstance(state, Node) and is_floating(state) and same_shape(state, node) and state is not other
    )


def _moves_whole_rows(node: Node, name: str, first: Node) -> bool:
    before, after = shape_of(first), shape_of(node)
    if not after or not numel_of_row_is_kept(first, node):
        return False
    rank = len(before)
    if name == "getitem":
        return not indexes_by_tensor(node.args[1]) and _leaves_last_alone(node.args[1], rank)
    if name in ("expand", "expand_as", "broadcast_to"):
        return True
    if name == "t":
        return False
    return not any(d % rank == rank - 1 for d in _dimensions(node, name, rank))


def _dimensions(node: Node, name: str, rank: int) -> list[int]:
    """Dimensions a token move touches; the last one among them means that rows are not kept whole."""
    if name == "permute":
        dims = _argument(node, 1, "dims")
        dims = list(dims) if isinstance(dims, list | tuple) else [d for d in node.args[1:] if isinstance(d, int)]
        return [i for i, d in enumerate(dims) if isinstance(d, int) and d % rank != i]
    if name in ("transpose", "movedim"):
        flat: list[int] = []
        for value in (_argument(node, 1, "dim0"), _argument(node, 2, "dim1")):
            flat += list(value) if isinstance(value, list | tuple) else [value]
        return [d if isinstance(d, int) else rank - 1 for d in flat]
    if name == "roll":
        dims = _argument(node, 2, "dims")
    else:
        default = 0 if name in ("slice", "select", "narrow") else rank - 1
        dims = _argument(node, 1, "dims" if name == "flip" else "dim")
        dims = default if dims is None else dims
    dims = list(dims) if isinstance(dims, list | tuple) else [dims]
    return [d if isinstance(d, int) else rank - 1 for d in dims] or [rank - 1]


def _argument(node: Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def indexes_by_tensor(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, list | torch.Tensor) or (isinstance(p, Node) and tensor_of(p) is not None) for p in parts)


def _leaves_last_alone(index: Any, rank: int) -> bool:
    parts = index if isinstance(index, tuple | list) else (index,)
    taken = sum(p is not None and p is not Ellipsis for p in parts)
    if Ellipsis not in parts and taken < rank:
        return True
    return bool(parts) and (parts[-1] is Ellipsis or parts[-1] == slice(None))


def _adds_zero(node: Node) -> bool:
    operands = [*node.args[:2], *(node.kwargs[k] for k in ("input", "other") if k in node.kwargs)]
    numbers = [o for o in operands if not isinstance(o, Node)]
    return len(operands) == 2 and len(numbers) == 1 and _is_zero(numbers[0]) and op_name(node) == "add"


def added_zero_operand(node: Node) -> Node | None:
    """The tensor of `0 + x`, which Python's `sum` writes first."""
    if op_name(node) != "add" or not _adds_zero(node):
        return None
    return next((o for o in node.all_input_nodes), None)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def dropout_probability(node: Node) -> float:
    """p of a dropout node, whether it is active or not; 1 where it cannot be read."""
    if node.op == "call_module":
        return float(getattr(called_module(node), "p", 1.0))
    p = _argument(node, 1, "p")
    return float(p) if isinstance(p, int | float) else 0.5 if p is None else 1.0


def trains(node: Node) -> bool | None:
    """True or False where a node bakes train or eval behaviour in; None where it says nothing."""
    name = op_name(node)
    if node.op == "call_module":
        return None
    if is_dropout(node):
        value = _argument(node, 2, "train" if is_aten(node) else "training")
        return bool(value) if value is not None else True
    if name == "batch_norm":
        value = _argument(node, 5, "training")
        return bool(value) if value is not None else False
    if name == "sdpa" and (_argument(node, 4, "dropout_p") or 0):
        return True
    return None
