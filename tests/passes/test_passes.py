"""Each pass alone: the graph before and after, nothing done twice or for nothing, metadata and function kept."""

import pytest
import torch
from torch import nn
from torch.fx import Interpreter
from torch.utils import checkpoint

import attnres_fx as ax
from attnres_fx.errors import AlreadyConvertedError
from attnres_fx.passes import (
    ReadParameters,
    analyze_,
    find_streams,
    functionalize_mutations_pass,
    inline_regions_pass,
    insert_depth_attention_pass,
    plan_schedule,
    propagate_values_,
    unfuse_additions_pass,
)
from attnres_fx.passes.graph.nodes import insert_attribute, tensor_of
from tests.support.stream_text import assert_near, captured, dedented, dynamo_graph, rows, toy

# --- graphs as text ----------------------------------------------------------------------------------


def graph_text(gm):
    """One line a call, attributes by their path; unused attributes are left out."""
    return "\n".join(_line(n) for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))


def _line(node):
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    name = target if isinstance(target, str) else str(getattr(target, "__name__", target))
    args = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    return f"{node.name} = {name}({', '.join(args)})"


def _text(argument):
    if isinstance(argument, torch.fx.Node):
        return str(argument.target) if argument.op == "get_attr" else argument.name
    if isinstance(argument, list | tuple):
        return f"[{', '.join(map(_text, argument))}]"
    return str(argument)


# --- checks ------------------------------------------------------------------------------------------


class TrueValues(Interpreter):
    """Runs a graph; every value noted on a node has the dtype and the shape that the node computes."""

    def run_node(self, n):
        result = super().run_node(n)
        value = tensor_of(n)
        if isinstance(result, torch.Tensor) and n.op not in ("placeholder", "get_attr", "output"):
            assert value is not None, f"{n} has no value"
            assert (value.dtype, value.shape) == (result.dtype, result.shape), n.format_node()
        return result


def check_pass(run, gm, args, tolerance=1e-6):
    """A pass that changes the graph: linted, same function, same effect on inputs, true values, metadata kept."""
    old = set(gm.graph.nodes)
    mine, theirs, watched = ([a.clone() for a in args] for _ in range(3))
    expected = torch.utils._pytree.tree_leaves(gm(*theirs))
    result = run(gm)
    assert result.modified and result.graph_module is gm
    assert result.removed or result.replaced
    assert not set(result.removed) & {n.name for n in gm.graph.nodes if n in old}
    gm.graph.lint()
    gm.recompile()
    for x, y in zip(torch.utils._pytree.tree_leaves(gm(*mine)), expected, strict=True):
        assert_near(x, y, tolerance)
    for x, y in zip(mine, theirs, strict=True):
        assert_near(x, y, tolerance)
    TrueValues(gm).run(*watched)
    new = [n for n in gm.graph.nodes if n not in old]
    assert new
    return new


def check_idle(run, gm):
    """A pass with nothing to do says so and leaves the graph as it is."""
    before = str(gm.graph), [dict(n.meta) for n in gm.graph.nodes]
    result = run(gm)
    assert not result.modified and not result.removed and not result.replaced
    assert str(gm.graph) == before[0]
    for node, meta in zip(gm.graph.nodes, before[1], strict=True):
        assert node.meta.keys() == meta.keys()


def check_metadata(new, path):
    """New nodes say where in the user's code they come from."""
    for node in new:
        assert __file__ in node.meta["stack_trace"], node
        assert path in str(node.meta["nn_module_stack"]), node


def symbolic(program, *args):
    gm = torch.fx.symbolic_trace(program)
    propagate_values_(gm, args)
    return gm


def exported(program, *args):
    return captured(Inside(program), args, "export")


class Inside(nn.Module):
    """A program one module down, so that its nodes have a module path."""

    def __init__(self, program):
        super().__init__()
        self.inner = toy(program)

    def forward(self, x):
        return self.inner(x)


def plain(m, x):
    return x + m.attn_1(m.norm_1(x))


IDLE = pytest.mark.parametrize(
    "run", [inline_regions_pass, functionalize_mutations_pass, unfuse_additions_pass], ids=lambda run: run.__name__
)


@IDLE
@pytest.mark.parametrize("spelling", ["symbolic", "export", "dynamo"])
def test_a_plain_residual_layer_needs_no_normalisation(run, spelling):
    check_idle(run, captured(toy(plain), (rows(),), spelling))


# --- inline_regions_pass -----------------------------------------------------------------------------


def frozen(m, x):
    with torch.no_grad():
        x = x + m.attn_1(x)
    return m.head(x)


def in_half(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return x + m.attn_1(x)


def nested(m, x):
    with torch.no_grad():
        x = x + m.attn_1(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = x + m.attn_2(x)
    return m.head(x)


def checkpointed(m, x):
    return checkpoint.checkpoint(lambda t: t + m.attn_1(t), x, use_reentrant=False)


def test_regions_come_out_with_their_effect():
    gm = captured(toy(frozen), (rows(),), "export")
    assert graph_text(gm) == dedented("""
        add = wrap_with_set_grad_enabled(False, submod_1, x, attn_1.weight, attn_1.bias)
        getitem = getitem(add, 0)
        linear_1 = linear(getitem, head.weight, head.bias)
        return [linear_1]
    """)
    inline_regions_pass(gm)
    assert graph_text(gm) == dedented("""
        is_grad_enabled = is_grad_enabled()
        _set_grad_enabled = _set_grad_enabled(False)
        linear = linear(x, attn_1.weight, attn_1.bias)
        add_1 = add(x, linear)
        _set_grad_enabled_1 = _set_grad_enabled(is_grad_enabled)
        linear_1 = linear(add_1, head.weight, head.bias)
        return [linear_1]
    """)


def test_a_region_inside_a_region_comes_out_too():
    gm = captured(toy(nested), (rows(),), "export")
    inline_regions_pass(gm)
    assert graph_text(gm) == dedented("""
        is_grad_enabled = is_grad_enabled()
        _set_grad_enabled = _set_grad_enabled(False)
        linear = linear(x, attn_1.weight, attn_1.bias)
        add = add(x, linear)
        _enter_autocast = _enter_autocast(cpu, torch.bfloat16, True, False)
        linear_1 = linear(add, attn_2.weight, attn_2.bias)
        add_3 = add(add, linear_1)
        _exit_autocast = _exit_autocast(_enter_autocast)
        _set_grad_enabled_1 = _set_grad_enabled(is_grad_enabled)
        linear_2 = linear(add_3, head.weight, head.bias)
        return [linear_2]
    """)


@pytest.mark.parametrize("program", [frozen, in_half, nested])
def test_inlining_keeps_function_and_metadata_and_is_done_once(program):
    gm = exported(program, rows())
    new = check_pass(inline_regions_pass, gm, [rows()], tolerance=0.0)
    check_metadata([n for n in new if tensor_of(n) is not None], "inner")
    assert all("nn_module_stack" in n.meta for n in new)
    check_idle(inline_regions_pass, gm)


def test_a_frozen_region_stays_frozen_and_what_follows_does_not():
    gm = captured(toy(frozen), (rows(),), "export")
    inline_regions_pass(gm)
    gm.recompile()
    gm(rows()).sum().backward()
    weights = dict(gm.named_parameters())
    assert weights["attn_1.weight"].grad is None and weights["head.weight"].grad is not None
    with torch.no_grad():
        gm(rows())
        assert not torch.is_grad_enabled()


def test_a_checkpointed_body_is_inlined_with_recompute_tags():
    gm = dynamo_graph(toy(checkpointed), (rows(),))
    old = set(gm.graph.nodes)
    assert inline_regions_pass(gm).modified
    new = [n for n in gm.graph.nodes if n not in old]
    assert len(new) == 2
    for node in new:
        assert node.meta["recompute"] is checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
        assert __file__ in node.meta["stack_trace"] and tensor_of(node) is not None
    check_idle(inline_regions_pass, gm)


def test_a_checkpointed_body_without_an_addition_of_tensors_stays():
    def program(m, x):
        return m.head(x + checkpoint.checkpoint(m.attn_1, x, use_reentrant=False))

    gm = dynamo_graph(toy(program), (rows(),))
    assert "tag_activation_checkpoint" in graph_text(gm)
    check_idle(inline_regions_pass, gm)


def test_a_region_that_only_sets_a_mode_is_inlined_whatever_it_holds():
    def program(m, x):
        with torch.no_grad():
            y = m.attn_1(x) * 2.0
        return m.head(x + y)

    gm = captured(toy(program), (rows(),), "export")
    assert inline_regions_pass(gm).modified
    assert "wrap_with_set_grad_enabled" not in graph_text(gm) and "set_grad_enabled" in graph_text(gm)


# --- functionalize_mutations_pass --------------------------------------------------------------------


def test_writes_become_values_and_views_are_made_again():
    def program(x):
        h = x * 2.0
        flat = h.view(-1)
        h.add_(1.0)
        return flat + 1.0, h

    gm = symbolic(program, rows())
    functionalize_mutations_pass(gm)
    assert graph_text(gm) == dedented("""
        mul = mul(x, 2.0)
        view = view(mul, -1)
        add_1 = add(mul, 1.0)
        view_1 = view(add_1, -1)
        add = add(view_1, 1.0)
        return [add, add_1]
    """)


def test_a_write_to_picked_rows_goes_to_a_copy_and_an_input_gets_its_value_last():
    def program(x):
        x[1].zero_()
        return x + 1.0

    gm = symbolic(program, rows())
    functionalize_mutations_pass(gm)
    assert graph_text(gm) == dedented("""
        getitem = getitem(x, 1)
        clone = clone(x)
        getitem_1 = getitem(clone, 1)
        zero__1 = zero_(getitem_1)
        add = add(clone, 1.0)
        copy_ = copy_(x, clone)
        return add
    """)


def inner_writes(m, x):
    h = m.attn_1(x)
    first = h[:, 0]
    h.add_(m.mlp_1(x))
    h[:, 1].mul_(2.0)
    return h * 1.0, first


def writes_to_the_input(m, x):
    x.add_(m.attn_1(x))
    return m.head(x)


@pytest.mark.parametrize("program", [inner_writes, writes_to_the_input])
def test_functionalizing_keeps_function_and_metadata(program):
    new = check_pass(functionalize_mutations_pass, exported(program, rows()), [rows()])
    check_metadata([n for n in new if "copy_" not in n.name], "inner")


def test_functionalizing_is_done_once():
    def program(x):
        h = x * 2.0
        h.add_(1.0).relu_()
        return h, h.view(-1)

    gm = symbolic(program, rows())
    assert functionalize_mutations_pass(gm).removed == ("add_", "relu_")
    check_idle(functionalize_mutations_pass, gm)


def test_functionalizing_twice_still_computes_the_same():
    gm = exported(inner_writes, rows())
    expected = gm(rows())
    functionalize_mutations_pass(gm)
    functionalize_mutations_pass(gm)
    gm.graph.lint()
    gm.recompile()
    for x, y in zip(gm(rows()), expected, strict=True):
        assert_near(x, y, 1e-6)


# --- unfuse_additions_pass ---------------------------------------------------------------------------

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
FUSED = {
    "addmm": lambda h: torch.addmm(h[0], h[0].relu() @ WEIGHT, WEIGHT),
    "addmm, scaled": lambda h: torch.addmm(h[0], h[0].relu() @ WEIGHT, WEIGHT, beta=0.5, alpha=2.0),
    "addmm, method": lambda h: h[0].addmm(h[0].relu() @ WEIGHT, WEIGHT),
    "addmm, keywords": lambda h: torch.addmm(h[0], mat1=h[0].relu() @ WEIGHT, mat2=WEIGHT),
    "baddbmm": lambda h: torch.baddbmm(h, h.relu(), WEIGHT.expand(2, 8, 8), alpha=3.0),
    "addcmul": lambda h: torch.addcmul(h, h @ WEIGHT, h.relu(), value=0.5),
    "addcmul, a row": lambda h: torch.addcmul(h, h @ WEIGHT, WEIGHT[0]),
    "addcmul, spread over the tokens": lambda h: torch.addcmul(h, h.mean(1, keepdim=True) @ WEIGHT, WEIGHT[0]),
    "addcdiv": lambda h: torch.addcdiv(h, h @ WEIGHT, h.exp(), value=-1.0),
    "sum of a list": lambda h: sum([h, h @ WEIGHT, h.relu() @ WEIGHT]),
    "sum of masks": lambda h: sum([h > 0, h > 0.5, h > 1.0]) * (h @ WEIGHT),
    "a float zero and an integer": lambda h: 0.0 + (h > 0).long(),
}


def test_a_fused_addition_is_split_and_a_bias_is_not():
    def program(h):
        f = torch.addmm(WEIGHT[0], h, WEIGHT)
        return torch.addmm(h, f, WEIGHT, beta=0.5, alpha=2.0)

    gm = symbolic(program, rows()[0])
    unfuse_additions_pass(gm)
    assert graph_text(gm) == dedented("""
        addmm = addmm(_tensor_constant0, h, _tensor_constant1)
        mm = mm(addmm, _tensor_constant1)
        mul = mul(h, 0.5)
        add = add(mul, mm, alpha=2.0)
        return add
    """)


def test_the_zero_of_a_sum_goes():
    gm = symbolic(lambda h: sum([h, h.relu()]), rows())
    unfuse_additions_pass(gm)
    assert graph_text(gm) == dedented("""
        relu = relu(h)
        add_1 = add(h, relu)
        return add_1
    """)


class Alone(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, h):
        return self.program(h)


@pytest.mark.parametrize("spelling", ["symbolic", "export"])
@pytest.mark.parametrize("name", FUSED)
def test_unfusing_keeps_the_function_and_true_values(name, spelling):
    gm = captured(Alone(FUSED[name]), (rows(),), spelling)
    expected = gm(rows())
    unfuse_additions_pass(gm)
    gm.graph.lint()
    gm.recompile()
    assert_near(gm(rows()), expected, 1e-6)
    TrueValues(gm).run(rows())
    check_idle(unfuse_additions_pass, gm)


def test_unfusing_keeps_metadata():
    def program(m, x):
        return torch.addcmul(x, m.attn_1(x), m.carry, value=0.5)

    check_metadata(check_pass(unfuse_additions_pass, exported(program, rows()), [rows()]), "inner")


def test_an_addend_that_the_product_does_not_hang_on_stays():
    def program(h, other):
        return torch.baddbmm(h, other, other) + torch.addcmul(h, other, other)

    check_idle(unfuse_additions_pass, symbolic(program, torch.randn(2, 5, 5), torch.randn(2, 5, 5)))


# --- insert_depth_attention_pass ---------------------------------------------------------------------


def two_layers(m, x):
    h = x + m.attn_1(m.norm_1(x))
    h = h + m.mlp_1(m.norm_2(h))
    return m.norm_f(h)


def post_norm(m, x):
    h = m.norm_1(x + m.attn_1(x))
    return m.norm_2(h + m.mlp_1(h))


def inserting(variant="full", streams=None, schedules=None):
    """The pass with fresh parameters: queries and gates of zero."""

    def run(gm):
        found = analyze_(gm) if streams is None else streams
        config = ax.AttnResConfig(variant=variant, **({} if variant == "full" else {"num_blocks": 2}))
        plans = {s.name: plan_schedule(s.num_sublayers, config) for s in found.streams}

        def fetch(stream, read, like):
            made = []
            for kind, value in (("query", torch.zeros(8)), ("key", torch.ones(8)), ("gate", torch.zeros(()))):
                if kind == "gate" and not stream.post_norm:
                    continue
                name = f"{kind}_{read.position}"
                gm.register_parameter(name, nn.Parameter(value))
                made.append(insert_attribute(gm.graph, name, like=like, value=value))
            return ReadParameters(*made)

        return insert_depth_attention_pass(
            gm,
            streams=found,
            schedules=plans if schedules is None else schedules,
            output="sum",
            eps=1e-6,
            fetch=fetch,
        )

    return run


def test_reads_go_in_and_orphaned_additions_go_out():
    gm = captured(toy(two_layers), (rows(),), "symbolic")
    inserting()(gm)
    assert graph_text(gm) == dedented("""
        norm_1 = norm_1(x)
        attn_1 = attn_1(norm_1)
        depth_attention_default = depth_attention([x, attn_1], query_1, key_1, 1e-06, 2.0)
        norm_2 = norm_2(depth_attention_default)
        mlp_1 = mlp_1(norm_2)
        depth_attention_default_1 = depth_attention([x, attn_1, mlp_1], query_2, key_2, 1e-06, 3.0)
        norm_f = norm_f(depth_attention_default_1)
        return norm_f
    """)


def test_a_local_block_ends_in_a_summary_and_a_post_norm_read_is_gated():
    gm = captured(toy(two_layers), (rows(),), "symbolic")
    inserting("local")(gm)
    assert "depth_attention_default_1 = depth_attention([depth_attention_default, mlp_1], query_2" in graph_text(gm)
    gm = captured(toy(post_norm), (rows(),), "symbolic")
    inserting()(gm)
    text = graph_text(gm)
    assert "depth_attention([x, attn_1], query_1, key_1, 1e-06, 1.0)" in text
    assert "sub = sub(depth_attention_default, add)\nmul = mul(sub, gate_1)\nadd_2 = add(add, mul)" in text


@pytest.mark.parametrize("variant", ["full", "block", "local"])
@pytest.mark.parametrize("program", [two_layers, post_norm])
def test_inserting_keeps_function_and_metadata_at_zero_queries(program, variant):
    new = check_pass(inserting(variant), exported(program, rows()), [rows()])
    check_metadata([n for n in new if n.op != "get_attr"], "inner")


def test_a_second_run_finds_nothing_left_to_do():
    gm = captured(toy(two_layers), (rows(),), "export")
    assert inserting()(gm).modified
    check_idle(inserting(streams=find_streams(gm.graph)), gm)
    with pytest.raises(AlreadyConvertedError):
        analyze_(gm)


def test_streams_without_a_schedule_and_graphs_without_streams_stay_as_they_are():
    gm = captured(toy(two_layers), (rows(),), "export")
    check_idle(inserting(streams=analyze_(gm), schedules={}), gm)
    check_idle(inserting(), captured(toy(lambda m, x: m.head(m.norm_1(x))), (rows(),), "export"))
