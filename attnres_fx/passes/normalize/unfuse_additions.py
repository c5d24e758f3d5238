"""Take residual additions out of the operations they are fused into.

Before:
    h1 = torch.addmm(h0, a, w)        # a was computed from h0
After:
    h1 = h0 + torch.mm(a, w)

Only where the addend has the result's shape and the product depends on it: a bias stays where it is.
So are sums over a stack (`stack_sums`), `h.index_add(...)`, `h.scatter_add(...)`, `where(m, h + f, h)` and
`lerp(h, f, w)` with a constant weight. The `0 + x` that Python's `sum` begins with becomes `x`.
"""

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from attnres_fx.passes.graph.additions import added_zero_operand, match_addition
from attnres_fx.passes.graph.emit import emit
from attnres_fx.passes.graph.nodes import copy_call, is_floating, same_shape, tensor_of
from attnres_fx.passes.graph.operations import op_name, operation_of
from attnres_fx.passes.graph.result import PassResult
from attnres_fx.passes.normalize.dependences import depends_on_inputs
from attnres_fx.passes.normalize.stack_sums import split_sum_of_stack


def unfuse_additions_pass(gm: GraphModule) -> PassResult:
    """Split, in place, fused additions whose addend may be a state.

    Args:
        gm: A module with values on the nodes of its graph.

    Returns:
        The module, and the names of the fused calls that are no longer there.
    """
    split = []
    for node in list(gm.graph.nodes):
        if (operand := added_zero_operand(node)) is not None and _is_same_kind(operand, node):
            node.replace_all_uses_with(operand)
        elif not any(splits(gm.graph, node) for splits in _SPLITS):
            continue
        split.append(node.name)
        gm.graph.erase_node(node)
    if split:
        gm.graph.lint()
    return PassResult(gm, bool(split), (), tuple(split))


def _is_same_kind(operand: Node, node: Node) -> bool:
    before, after = tensor_of(operand), tensor_of(node)
    return before is not None and after is not None and before.dtype == after.dtype and same_shape(operand, node)


@dataclass(frozen=True)
class _Parts:
    """A call that is `beta * addend + alpha * product(left, right)`.

    Attributes:
        product: Canonical name of the operation.
        right: A number in what tracers write for compilers.
        always: Whether the call is split whatever the product is computed from.
    """

    product: str
    addend: Node
    left: Node
    right: Any
    beta: float
    alpha: float
    always: bool


def _match_fused(node: Node) -> _Parts | None:
    operation = operation_of(node)
    if operation is None or operation.fused is None or not is_floating(node):
        return None
    fused, keywords = operation.fused, node.kwargs
    names: list[tuple[str, ...]] = [(fused.left,), (fused.right,)]
    names.insert(fused.addend, ("input", "self", "c"))
    given = [*node.args, *(next((keywords[k] for k in ks if k in keywords), None) for ks in names[len(node.args) :])]
    if len(given) != 3:
        return None
    addend = given.pop(fused.addend)
    left, right = given
    beta, alpha = keywords.get(fused.beta, 1), keywords.get(fused.alpha, 1)
    factor = isinstance(right, Node) or (fused.only_compiled and isinstance(right, int | float))
    if not (isinstance(addend, Node) and isinstance(left, Node) and factor):
        return None
    if not isinstance(beta, int | float) or not isinstance(alpha, int | float):
        return None
    return _Parts(fused.product, addend, left, right, beta, alpha, fused.only_compiled)


def _may_be_residual(parts: _Parts, node: Node) -> bool:
    """Whether a factor was computed from the addend, or the addend, as a branch, from one that carries copies on."""
    factors = [f for f in (parts.left, parts.right) if isinstance(f, Node)]
    carried = any(depends_on_inputs((parts.addend,), f) for f in factors)
    return same_shape(parts.addend, node) and (carried or depends_on_inputs((parts.left, parts.right), parts.addend))


def _split_product(graph: Graph, node: Node) -> bool:
    parts = _match_fused(node)
    if parts is None or not (parts.always or _may_be_residual(parts, node)):
        return False
    addend = parts.addend
    with graph.inserting_before(node):
        product = emit(graph, parts.product, (parts.left, parts.right), like=node)
        if not same_shape(product, node) and same_shape(addend, node):
            product = emit(graph, "expand_as", (product, addend), like=node)
        if parts.beta != 1:
            addend = emit(graph, "mul", (addend, parts.beta), like=node)
        total = emit(graph, "add", (addend, product), like=node)
        if parts.alpha != 1:
            total.kwargs = {"alpha": parts.alpha}
    node.replace_all_uses_with(total)
    return True


def _split_scatter(graph: Graph, node: Node) -> bool:
    """`h.index_add(d, i, f)` is `h + zeros_like(h).index_add(d, i, f)`, and so with `scatter_add`."""
    if op_name(node) not in ("index_add", "scatter_add") or len(node.args) < 4:
        return False
    state, *rest = node.args
    if not isinstance(state, Node) or not isinstance(rest[2], Node) or not depends_on_inputs((rest[2],), state):
        return False
    with graph.inserting_before(node):
        zeros = emit(graph, "zeros_like", (state,), like=node)
        written = copy_call(node, {state: zeros})
        total = emit(graph, "add", (state, written), like=node)
    node.replace_all_uses_with(total)
    return True


def _split_lerp(graph: Graph, node: Node) -> bool:
    """`lerp(h, f, w)` with a weight that does not depend on the stream is `h * (1 - w) + f * w`."""
    if op_name(node) != "lerp" or len(node.args) != 3:
        return False
    start, end, weight = node.args
    if not (isinstance(start, Node) and isinstance(end, Node)):
        return False
    state = start if depends_on_inputs((end,), start) else end
    if state is end and not depends_on_inputs((start,), end):
        return False
    if isinstance(weight, Node) and (tensor_of(weight) is None or depends_on_inputs((weight,), state)):
        return False
    with graph.inserting_before(node):
        if isinstance(weight, Node):
            rest: Any = emit(graph, "rsub", (weight, 1), like=node)
        else:
            rest = 1 - weight  # type: ignore[operator]
        kept = emit(graph, "mul", (start, rest), like=node)
        written = emit(graph, "mul", (end, weight), like=node)
        total = emit(graph, "add", (kept, written), like=node)
    node.replace_all_uses_with(total)
    return True


def _split_list(graph: Graph, node: Node) -> bool:
    """`torch._foreach_add([h, ...], [f, ...])[0]` is `h + f`."""
    listed = node.args[0] if op_name(node) == "getitem" else None
    if not isinstance(listed, Node) or op_name(listed) != "_foreach_add" or len(listed.args) != 2:
        return False
    index, alpha = node.args[1], listed.kwargs.get("alpha", 1)
    if not isinstance(index, int) or not all(isinstance(a, list | tuple) for a in listed.args):
        return False
    left, right = (a[index] for a in listed.args)  # type: ignore[index]
    if not isinstance(left, Node) or not isinstance(right, Node) or not isinstance(alpha, int | float):
        return False
    with graph.inserting_before(node):
        total = emit(graph, "add", (left, right), like=node, dialect=listed)
        if alpha != 1:
            total.kwargs = {"alpha": alpha}
    node.replace_all_uses_with(total)
    return True


def _split_choice(graph: Graph, node: Node) -> bool:
    """`where(m, h + f, h)` is `h + where(m, f, 0)`."""
    if op_name(node) != "where" or len(node.args) != 3 or not is_floating(node):
        return False
    for taken, kept in (node.args[1:], node.args[:0:-1]):
        if not isinstance(taken, Node) or not isinstance(kept, Node) or list(taken.users) != [node]:
            continue
        addition = match_addition(taken)
        sums = [a for a in (addition, addition.swapped) if a.left is kept] if addition is not None else []
        if not sums or sums[0].left_scale != 1 or not all(same_shape(n, node) for n in (sums[0].left, sums[0].right)):
            continue
        state, addend = sums[0].left, sums[0].right
        if not depends_on_inputs((addend,), state):
            continue
        with graph.inserting_before(node):
            zeros = emit(graph, "zeros_like", (addend,), like=node)
            written = copy_call(node, {taken: addend, kept: zeros})
            total = emit(graph, "add", (state, written), like=node)
            if sums[0].right_scale != 1:
                total.kwargs = {"alpha": sums[0].right_scale}
        node.replace_all_uses_with(total)
        return True
    return False


_SPLITS = (_split_product, split_sum_of_stack, _split_scatter, _split_lerp, _split_list, _split_choice)
