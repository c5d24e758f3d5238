"""What a unit saves from its forward to its backward pass, as AOTAutograd's min-cut partitioner decides.

The unit's body is traced with its backward pass and partitioned, as `torch.compile` would: cheap values are computed
again, results of matrix products, attention and sorts are kept. Nothing is run: all tensors are without data.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from attnres_fx.partition.costs.saved_attention import KEPT_ATTENTION
from attnres_fx.partition.costs.unit_graph import Body, bytes_of, fake_mode, hint, is_returned, tensor_value
from attnres_fx.passes.graph.nodes import tensor_of
from attnres_fx.passes.graph.operations import moves_data, op_name

log = logging.getLogger(__name__)


def saved_bytes(body: Body, name: str = "") -> int:
    """Bytes that a body keeps for its backward pass. name: of the unit, for the log.

    Counted: intermediate values that are kept, each storage once and whole; the output of the depth read that opens
    the unit, where the unit keeps it and no later read has it as a source; what the model itself returns from here,
    which a loss keeps. Not counted: parameters, and what other units made (sources, carried values, masks and
    tables), which a stage holds once however many of its sublayers use it.

    Where the body cannot be traced, the log says so and the estimate is every result that something other than an
    addition, a view or a cast takes.
    """
    try:
        return _partitioned_bytes(body)
    except Exception as error:  # tracers let anything through that an operation raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        log.info("activations of %s are estimated: its graph could not be partitioned (%s)", name or "a unit", reason)
        return _bytes_by_eye(body)


def _input_bytes(body: Body) -> int:
    """Of the depth reads' outputs that the unit takes."""
    return sum(bytes_of(tensor_value(i.node)) for i in body.inputs if i.kind == "read")


def _partitioned_bytes(body: Body) -> int:
    from functorch.compile import (  # type: ignore[import-untyped]
        aot_function,
        make_boxed_func,
        min_cut_rematerialization_partition,
    )
    from torch._inductor.decomposition import select_decomp_table

    parts: list[tuple[GraphModule, int]] = []

    def partition(joint: GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        halves = min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)
        parts.append((halves[0], num_fwd_outputs))
        return halves

    def as_it_is(gm: GraphModule, _: Any) -> Any:
        return make_boxed_func(gm)

    run = _WithFlashAttention(body.gm).run
    traced = aot_function(
        lambda *inputs: run(*inputs),
        fw_compiler=as_it_is,
        bw_compiler=as_it_is,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    mode = fake_mode()
    with mode, torch.enable_grad():
        traced(*body.fake_inputs(mode))
    # Without a backward pass there is nothing to partition, and nothing to keep.
    return sum(_kept_bytes(body, forward, count) for forward, count in parts)


class _WithFlashAttention(Interpreter):
    """Runs a body with attention as one operation, and without gradients where the model has them off."""

    def run_node(self, n: Node) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not n.meta.get("frozen", False)):
            return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.scaled_dot_product_attention.default:
            query, key, value, *rest = args
            return KEPT_ATTENTION(query, key, value, rest[0] if rest else kwargs.get("attn_mask"))[0]
        return super().call_function(target, args, kwargs)


def _kept_bytes(body: Body, forward: GraphModule, num_outputs: int) -> int:
    """Of the forward half: what it returns on top of its own outputs, by storage."""
    placeholders = forward.graph.find_nodes(op="placeholder")
    given = {_storage(v): i for i, p in enumerate(placeholders) if (v := tensor_of(p)) is not None}
    returned = forward.graph.output_node().args[0]
    assert isinstance(returned, tuple | list)
    own = _own_outputs(body, returned[:num_outputs])
    held = [node for node, original in zip(own, body.outputs, strict=True) if is_returned(original)]
    kept: dict[int, int] = {}
    for node in (*returned[num_outputs:], *held):
        value = tensor_of(node) if isinstance(node, Node) else None
        if value is None:
            continue
        position = given.get(_storage(value))
        if position is None:
            kept[_storage(value)] = max(bytes_of(value), _storage_bytes(value))
        elif body.inputs[position].kind == "read":
            kept[_storage(value)] = bytes_of(tensor_value(body.inputs[position].node))
    return sum(kept.values())


def _own_outputs(body: Body, returned: Sequence[Any]) -> Sequence[Any]:
    """The body's outputs among those of its forward half, which also returns inputs written to and bases of views."""
    expected = [tensor_value(n) for n in body.outputs]
    for start in range(len(returned) - len(expected) + 1):
        outputs = returned[start : start + len(expected)]
        if all(map(_is_alike, outputs, expected)):
            return outputs
    raise ValueError("the forward half does not return the outputs")


def _is_alike(output: Any, expected: Tensor) -> bool:
    value = tensor_of(output) if isinstance(output, Node) else None
    return (
        value is not None and value.dtype == expected.dtype and tuple(value.shape) == tuple(map(hint, expected.shape))
    )


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _storage_bytes(value: Tensor) -> int:
    """A view keeps all of what it is a view of; 0 where the size is not known."""
    size = value.untyped_storage().nbytes()
    return size if isinstance(size, int) else 0


def _bytes_by_eye(body: Body) -> int:
    kept = [n for n in body.nodes if tensor_of(n) is not None and not _passes_on(n) and _is_kept_for(list(n.users))]
    held = [n for n in body.nodes if is_returned(n)]
    return sum(bytes_of(tensor_of(n)) for n in dict.fromkeys((*kept, *held))) + _input_bytes(body)


def _is_kept_for(users: Sequence[Node]) -> bool:
    return any(u.op == "call_function" and op_name(u) not in ("add", "sub") and not _passes_on(u) for u in users)


def _passes_on(node: Node) -> bool:
    return moves_data(node)
