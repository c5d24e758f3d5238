"""Floating-point operations of a graph's nodes, from the sizes they carry.

Each call runs once, forward and backward, on tensors without data under `torch.utils.flop_counter.FlopCounterMode`,
whose registry holds the formulas; `FORMULAS` adds those it lacks. What is counted follows its convention: two
operations a multiply-add, matrix products and convolutions only (no norms, softmax, activations), causal attention
like any other (all pairs of positions), attention as flash attention does it (two products forward, five backward:
the scores are computed again). A backward pass has one product for each input that a gradient is wanted for.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from attnres_fx.ops.general import DEPTH_ATTENTION_GENERAL
from attnres_fx.partition.costs.unit_graph import (
    DEVICE,
    computes,
    describe_value,
    fake_mode,
    fake_tensor,
    held_value,
    hint,
    is_higher_order,
)
from attnres_fx.passes.graph.operations import op_name

log = logging.getLogger(__name__)

Shape = Sequence[int]


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass, and of the backward pass that follows it."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)


def _grouped_product(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """Rows of the groups share one dimension, so each row is multiplied by one matrix.

    [rows, k] by [groups, k, n]; its transpose, [groups, m, k] by [k, rows]; [m, rows] by [rows, n], one sum a group;
    or a batch, [groups, m, k] by [groups, k, n].
    """
    batch = a[0] if len(a) == len(b) == 3 else 1
    return 2 * batch * a[-2] * a[-1] * b[-1]


def _fallback_product_backward(rows: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * _grouped_product(rows, weight)


def _convolution_backward(
    grad: Shape, x: Shape, weight: Shape, _bias: Any, _s: Any, _p: Any, _d: Any, transposed: bool, *rest: Any, **__: Any
) -> int:
    """Each gradient costs what the forward pass does; the registry's own formula forgets about groups."""
    gradients = sum(rest[2][:2])  # output_mask: of the input, of the weight
    return int(gradients * conv_flop_count(list(x), list(weight), list(grad), transposed=transposed))


def _batched_sum(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def _matrix_vector(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a)


def _added_matrix_vector(_: Shape, a: Shape, *__: Any, **___: Any) -> int:
    return 2 * math.prod(a)


def _matrices(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _added_matrices(_: Shape, a: Shape, b: Shape, *__: Any, **___: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


#: What the registry lacks or gets wrong: operation to a formula of its arguments, tensors given as their shapes.
FORMULAS: dict[str, Callable[..., int]] = {
    "aten::_grouped_mm": _grouped_product,
    "aten::_scaled_grouped_mm": _grouped_product,
    "aten::_scaled_grouped_mm_v2": _grouped_product,
    "transformers::grouped_mm_fallback": _grouped_product,
    "transformers::grouped_mm_fallback_backward": _fallback_product_backward,
    "aten::convolution_backward": _convolution_backward,
    "aten::addbmm": _batched_sum,
    "aten::mv": _matrix_vector,
    "aten::addmv": _added_matrix_vector,
    "aten::dot": _matrix_vector,
    "aten::vdot": _matrix_vector,
    "aten::_int_mm": _matrices,
    "aten::_addmm_activation": _added_matrices,
}

#: Called with query, key and value first: counted by the formulas of attention, whatever runs it on some device.
ATTENTION = frozenset(
    (
        "aten::scaled_dot_product_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_scaled_dot_product_attention_math",
        "higher_order::flex_attention",
    )
)


def count_flops(
    nodes: Sequence[Node], *, differentiable: frozenset[Node], memo: dict[Any, Flops] | None = None
) -> Flops:
    """Operations of some nodes of a graph whose values have sizes; symbolic ones count as in the example.

    differentiable: nodes that gradients are computed for. memo: calls counted before, to be shared among units.
    Depth reads count nothing. A call that cannot run without data counts nothing and is named in the log.
    """
    memo = {} if memo is None else memo
    total = Flops()
    for node in nodes:
        if computes(node):
            total += _count(node, differentiable, memo)
    return total


def projection_flops(node: Node, *, differentiable: frozenset[Node]) -> Flops:
    """Operations of the query's projection in a depth read; none where the query is one vector for all tokens."""
    query = held_value(node.args[1]) if isinstance(node.args[1], Node) else None
    if node.target is not DEPTH_ATTENTION_GENERAL or query is None or query.dim() != 2:
        return Flops()
    newest: Any = node.args[0][-1]  # type: ignore[index]
    product = 2 * math.prod(hint(s) for s in held_value(newest).shape) * hint(query.shape[0])
    return Flops(product, product * len(differentiable.intersection((newest, node.args[1]))))


def _count(node: Node, differentiable: frozenset[Node], memo: dict[Any, Flops]) -> Flops:
    if _name(node) in ATTENTION:
        return _attention(node, differentiable)
    if is_higher_order(node):
        return _regions(node, differentiable, memo)
    if not isinstance(node.target, OpOverload):
        return Flops()
    key = _key(node, differentiable)
    if key not in memo:
        memo[key] = _measured(node, differentiable)
    return memo[key]


def _name(node: Node) -> str:
    return node.target._schema.name if isinstance(node.target, OpOverload) else op_name(node)


def _key(node: Node, differentiable: frozenset[Node]) -> Any:
    trained = _trained_inputs(node, differentiable)

    def described(argument: Any) -> Any:
        if isinstance(argument, Node):
            return argument in trained, pytree.tree_map(describe_value, held_value(argument))
        return repr(argument)

    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    return str(node.target), str([described(leaf) for leaf in leaves]), str(spec)


def _trained_inputs(node: Node, differentiable: frozenset[Node]) -> frozenset[Node]:
    """Inputs that a call hands a gradient back to: none where gradients are off."""
    return differentiable.intersection(node.all_input_nodes) if node in differentiable else frozenset()


def _attention(node: Node, differentiable: frozenset[Node]) -> Flops:
    q, k, v = (_as_heads(held_value(n)) for n in node.args[:3] if isinstance(n, Node))
    # Every head of the query meets keys, its own or shared ones; batches of one are broadcast.
    batch = max(q[0], k[0], v[0])
    q, k, v = ((batch, q[1], *shape[2:]) for shape in (q, k, v))
    trained = _trained_inputs(node, differentiable)
    backward = sdpa_backward_flop_count((*q[:3], v[3]), q, k, v) if trained else 0
    return Flops(sdpa_flop_count(q, k, v), backward)


def _as_heads(value: Tensor) -> tuple[int, int, int, int]:
    """[..., heads, length, width] with the leading dimensions made one, where there are more or fewer."""
    shape = [hint(s) for s in value.shape]
    *leading, heads, length, width = (1, 1, *shape)[-max(4, len(shape)) :]
    return math.prod(leading), heads, length, width


def _regions(node: Node, differentiable: frozenset[Node], memo: dict[Any, Flops]) -> Flops:
    """The bodies that a region runs, each once; of the two branches of a condition, the one that costs more."""
    bodies = [v for n in node.all_input_nodes if isinstance(v := held_value(n), GraphModule)]
    trained = bool(_trained_inputs(node, differentiable))
    counts = []
    for body in bodies:
        inner = frozenset(body.graph.nodes) if trained else frozenset[Node]()
        counts.append(count_flops(list(body.graph.nodes), differentiable=inner, memo=memo))
    if op_name(node) == "higher_order::cond":
        return max(counts, key=lambda c: c.forward, default=Flops())
    return sum(counts, Flops())


def _measured(node: Node, differentiable: frozenset[Node]) -> Flops:
    error: Exception | None = None
    for dtype in (None, torch.float32):
        try:
            found = _run(node, differentiable, dtype)
        except Exception as raised:  # whatever an operation raises on tensors without data
            # Once more in one dtype: under autocast the graph's own ones do not match.
            error = raised
            continue
        if found == Flops() and not _is_known(node):
            log.info("%s is not counted: register its formula with torch.utils.flop_counter", node.target)
        return found
    log.info("%s is not counted: it cannot be run without data (%s)", node.target, error)
    return Flops()


def _is_known(node: Node) -> bool:
    """Whether a call that counts nothing is one of PyTorch's own, which would have a formula if it were a product."""
    return isinstance(node.target, OpOverload) and node.target.namespace in ("aten", "prims", "prim", "inductor")


def _run(node: Node, differentiable: frozenset[Node], dtype: torch.dtype | None) -> Flops:
    mode, leaves = fake_mode(), list[Tensor]()
    trained = _trained_inputs(node, differentiable)

    def given(argument: Node) -> Any:
        return pytree.tree_map(lambda v: fake(v, argument in trained), held_value(argument))

    def fake(value: Any, is_trained: bool) -> Any:
        if not isinstance(value, Tensor):
            return hint(value)
        made = fake_tensor(value, mode)
        if dtype is not None and made.is_floating_point():
            made = made.to(dtype)
        if not (is_trained and made.is_floating_point()):
            return made
        leaves.append(made.requires_grad_())
        return made.clone()  # in-place operations refuse leaves

    with mode, torch.enable_grad():
        args, kwargs = map_arg((node.args, node.kwargs), given)  # type: ignore[arg-type,misc]
        args, kwargs = pytree.tree_map_only(torch.device, lambda _: DEVICE, (args, kwargs))
        forward = counter()
        with forward:
            outputs = node.target(*args, **kwargs)  # type: ignore[operator]
        backward = counter()
        with backward:
            _differentiate(outputs, leaves)
    return Flops(forward.get_total_flops(), backward.get_total_flops())


def counter() -> FlopCounterMode:
    """A counter that knows this table as well as PyTorch's registry."""
    return FlopCounterMode(display=False, custom_mapping={**_registered()})


def _registered() -> Mapping[Any, Callable[..., int]]:
    found = {}
    for name, formula in FORMULAS.items():
        namespace, _, operation = name.partition("::")
        # Asking for an operation that nobody has registered raises: a library that is not loaded, an older PyTorch.
        packet = getattr(getattr(torch.ops, namespace), operation, None)
        if packet is not None:
            found[packet] = formula
    return found


def _differentiate(outputs: Any, leaves: Sequence[Tensor]) -> None:
    trained = [v for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor) and v.requires_grad]
    if trained and leaves:
        torch.autograd.grad(trained, list(leaves), [torch.empty_like(v) for v in trained], allow_unused=True)
