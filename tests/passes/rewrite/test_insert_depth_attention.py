"""Reads go into the graph: what it is before and after, and what is left alone."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import AlreadyConvertedError
from attnres_fx.passes import (
    analyze_,
    find_streams,
    insert_depth_attention_pass,
    plan_depth_reads,
)
from attnres_fx.passes.graph.nodes import insert_attribute
from tests.support.pass_checks import (
    check_idle,
    check_metadata,
    check_pass,
    exported,
    graph_text,
)
from tests.support.stream_text import captured, dedented, rows, toy


def two_layers(m, x):
    h = x + m.attn_1(m.norm_1(x))
    h = h + m.mlp_1(m.norm_2(h))
    return m.norm_f(h)


def post_norm(m, x):
    h = m.norm_1(x + m.attn_1(x))
    return m.norm_2(h + m.mlp_1(h))


def inserting(variant="full", streams=None, selected=None):
    """The pass with fresh parameters: queries and gates of zero."""

    def run(gm):
        found = analyze_(gm) if streams is None else streams
        config = ax.AttnResConfig(variant=variant, **({} if variant == "full" else {"num_blocks": 2}))
        plan = plan_depth_reads(found, found.streams if selected is None else selected, config)

        def fetch(read, like, tensor):
            value = {"query": torch.zeros(8), "key_weight": torch.ones(8), "gate": torch.zeros(())}[tensor]
            if tensor == "gate" and not read.gated:
                return None
            name = f"{tensor.removesuffix('_weight')}_{read.position}"
            gm.register_parameter(name, nn.Parameter(value))
            return insert_attribute(gm.graph, name, like=like, value=value)

        return insert_depth_attention_pass(
            gm,
            streams=found,
            plan=plan,
            config=config,
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


def test_a_local_block_ends_in_a_summary_and_a_post_norm_read_is_gated_where_its_sources_are_not_the_state():
    gm = captured(toy(two_layers), (rows(),), "symbolic")
    inserting("local")(gm)
    assert "depth_attention_default_1 = depth_attention([depth_attention_default, mlp_1], query_2" in graph_text(gm)
    gm = captured(toy(post_norm), (rows(),), "symbolic")
    inserting()(gm)
    text = graph_text(gm)
    assert "depth_attention([x, attn_1], query_1, key_1, 1e-06, 2.0)" in text
    assert "sub = sub(depth_attention_default_1, add_1)\nmul = mul(sub, gate_2)\nadd_2 = add(add_1, mul)" in text
    assert "gate_1" not in text


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
    check_idle(inserting(streams=analyze_(gm), selected=()), gm)
    check_idle(inserting(), captured(toy(lambda m, x: m.head(m.norm_1(x))), (rows(),), "export"))
