"""`ax.plan`, its file, and the stages that `ax.build_stages` makes of it."""

import dataclasses
import json

import pytest
import torch

import attnres_fx as ax
from attnres_fx.cli import main
from attnres_fx.errors import PlanError
from attnres_fx.partition import DeviceSpeed
from attnres_fx.partition.costs.traffic import count_traffic, stage_values
from attnres_fx.partition.split.chained_model import chains_of
from tests.support.small_stages import ZEROS, branches, gpt, planned


@pytest.mark.slow
def test_a_plan_counts_the_rows_of_its_example():
    one, two = (planned(branches(4), kwargs={"ids": torch.zeros(n, 8, dtype=torch.long)}) for n in (1, 2))
    assert [2 * s.forward_flops for s in one.costs.sublayers] == [s.forward_flops for s in two.costs.sublayers]
    assert 2 * one.costs.streams[0].value_bytes == two.costs.streams[0].value_bytes


@pytest.fixture(scope="module")
def plan():
    return planned()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes)), {
        "input_ids": torch.zeros(2, 6, dtype=torch.long),
        "decoder_input_ids": torch.zeros(2, 5, dtype=torch.long),
    }


@pytest.mark.parametrize("variant", ["full", "block", "local"])
@pytest.mark.slow
def test_what_the_planner_counted_is_what_the_graph_sends(variant):
    found = planned(config=ax.AttnResConfig(variant=variant))
    assert found.partition.hop_forward_bytes == (*found.traffic.exact.forward, 0)
    assert found.partition.hop_backward_bytes == (*found.traffic.exact.backward, 0)
    counted = count_traffic(
        stage_values(found.costs.streams, found.block_layouts, found.starts, carried=found.costs.carried),
        num_stages=2,
        virtual_stages=2,
    )
    assert counted.naive.forward == found.traffic.naive.forward
    stages = ax.build_stages(branches(), found, check=False)
    assert stages.values == found.values


@pytest.mark.slow
def test_an_encoder_and_a_decoder_are_one_chain():
    model, kwargs = t5()
    found = planned(model, kwargs=kwargs, config=ax.AttnResConfig(num_blocks=2))
    assert [s.name for s in found.costs.streams] == ["encoder", "decoder"]
    assert found.partition.hop_forward_bytes == (*found.traffic.exact.forward, 0)
    assert {v.name for v in found.costs.carried}
    stages = ax.build_stages(model, found, check=False).eval()
    model.eval()
    assert torch.allclose(stages.run(**kwargs).logits, model(**kwargs).logits, atol=1e-4)


@pytest.mark.slow
def test_stages_compute_what_the_model_did():
    model = gpt()
    ids = {"ids": torch.randint(0, 40, (2, 8))}
    assert torch.allclose(ax.build_stages(model, planned(model)).run(**ids), model(**ids), atol=1e-5)


@pytest.mark.slow
def test_a_converted_model_keeps_its_blocks():
    converted = ax.convert(branches(), kwargs=ZEROS, config=ax.AttnResConfig(boundaries=(3, 4)), check=False)
    found = planned(converted)
    assert found.block_layouts[found.costs.streams[0].name].starts == (0, 3, 4)
    assert found.config == converted.report.config
    assert len(ax.build_stages(converted, found)) == 4
    with pytest.raises(PlanError, match="converted"):
        planned(converted, num_blocks=(2, 4))
    with pytest.raises(PlanError, match="was converted with"):
        planned(converted, config=ax.AttnResConfig(variant="full"))


@pytest.mark.slow
def test_blocks_end_where_stages_do_where_the_numbers_allow():
    quick = DeviceSpeed(flops=50e9, memory_bandwidth=1e12, link_bandwidth=1e12, link_latency=0.0)
    found = planned(config=ax.AttnResConfig(num_blocks=4), device=quick)
    assert found.partition.aligned
    assert found.partition.unaligned_cuts == 0
    spanning = planned(
        branches(12), num_stages=3, num_microbatches=6, device=quick, config=ax.AttnResConfig(num_blocks=2)
    )
    (blocks,) = (s.starts for s in spanning.block_layouts.values())
    assert set(blocks) <= set(spanning.starts)
    with pytest.raises(PlanError, match="num_blocks"):
        planned(num_stages=3, num_microbatches=6, align="require", config=ax.AttnResConfig(num_blocks=2))


@pytest.mark.slow
def test_a_model_on_meta_is_planned_and_cut_like_a_real_one(plan):
    with torch.device("meta"):
        model = branches()
        kwargs = {"ids": torch.zeros(2, 8, dtype=torch.long)}
    found = planned(model, kwargs=kwargs)
    assert dataclasses.replace(found, notes=plan.notes) == plan
    stages = ax.build_stages(model, found)
    assert all(p.is_meta for s in stages for p in s.parameters())


def test_given_costs_are_taken_as_they_are(plan):
    heavy = dataclasses.replace(plan.costs.sublayers[0], forward_flops=1e12, backward_flops=2e12)
    costs = dataclasses.replace(plan.costs, sublayers=(heavy, *plan.costs.sublayers[1:]))
    assert planned(costs=costs).starts[1] == 1
    fewer = dataclasses.replace(plan.costs.streams[0], count=2)
    with pytest.raises(PlanError, match="2 sublayers and the model has 8"):
        planned(costs=dataclasses.replace(plan.costs, sublayers=plan.costs.sublayers[:2], streams=(fewer,)))


def test_a_plan_is_read_as_it_was_written(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    read = ax.load_plan(tmp_path / "plan.json")
    assert read == plan
    assert str(read) == str(plan)
    assert json.loads((tmp_path / "plan.json").read_text())["plan"]["options"]["num_stages"] == 2


def test_zero_bubble_says_that_stages_run_uncompiled():
    found = planned(schedule="InterleavedZeroBubble")
    assert "uncompiled" in str(found)


def test_the_table_names_stages_blocks_and_totals(plan):
    text = str(plan)
    for wanted in ("layers.0", "memory per rank", "bubble", "paper's cache", "plain residual"):
        assert wanted in text
    assert all(len(line) <= 140 for line in text.splitlines())


def test_sublayers_are_named_and_chained_in_order():
    converted = ax.convert(gpt(layers=2), kwargs=ZEROS, check=False)
    chain = chains_of(converted, ("train",))["train"].chain
    assert chain.names == tuple(s.name for s in planned(gpt(layers=2)).costs.sublayers)
    assert chain.names[:2] == ("blocks.0.attention_norm", "blocks.0.mlp_norm")


@pytest.mark.slow
def test_the_command_plans_saves_and_draws(tmp_path, capsys):
    saved, drawn = tmp_path / "plan.json", tmp_path / "plan.png"
    command = [
        "plan",
        "tests.support.small_stages:model_for_the_command",
        "--stages",
        "2",
        "--microbatches",
        "4",
        "--flops",
        "50e9",
    ]
    assert main([*command, "--save", str(saved), "--plot", str(drawn), "--memory-limit", "1GB"]) == 0
    assert "memory per rank" in capsys.readouterr().out
    assert ax.load_plan(saved).num_stages == 2
    assert drawn.read_bytes()[:4] == b"\x89PNG"
    assert main([*command, "--memory-limit", "100"]) == 2
    assert "memory_limit" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_symbolic_trace_is_exported_once_though_its_blocks_are_chosen_afterwards(monkeypatch):
    exported = []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: exported.append(1) or export(*a, **k))
    found = planned(torch.fx.symbolic_trace(branches()), num_blocks=3)
    assert [len(layout.blocks) for layout in found.block_layouts.values()] == [3]
    assert len(exported) == 1


def test_a_symbolic_trace_is_planned_as_its_module_is(plan):
    traced = planned(torch.fx.symbolic_trace(branches()))
    assert traced.starts == plan.starts
    assert [s.forward_flops for s in traced.costs.sublayers] == [s.forward_flops for s in plan.costs.sublayers]
    assert len(ax.build_stages(torch.fx.symbolic_trace(branches()), traced)) == 4
