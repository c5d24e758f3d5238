"""The plan that is shown is the plan that is executed."""

import io
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import RewriteError
from attnres_fx.ops.operator import DEPTH_ATTENTION
from attnres_fx.passes import ReadPlan, analyze_, insert_depth_attention_pass, plan_depth_reads, propagate_values_

WIDTH = 8


class PreNorm(nn.Module):
    def __init__(self, sublayers: int = 5) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(sublayers + 1))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(sublayers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        return self.norms[-1](x)


class PostNorm(PreNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = norm(x + layer(x))
        return x


class ReadBesideTheChain(PreNorm):
    """A norm reads a sum that the chain does not go on with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.layers[0](self.norms[0](x))
        a = self.layers[1](self.norms[1](x))
        b = self.layers[2](self.norms[2](x + a))
        x = (x + a) + b
        return self.norms[4](x + self.layers[3](self.norms[3](x)))


CASES = list(product([PreNorm, PostNorm, ReadBesideTheChain], ["full", "block", "local"], ["sum", "mean"]))


def converted(model, variant, output):
    blocks = {} if variant == "full" else {"block_size": 2}
    config = ax.AttnResConfig(variant=variant, output=output, **blocks)
    return ax.convert(model(), (torch.randn(2, 3, WIDTH),), config=config)


@pytest.mark.parametrize(("model", "variant", "output"), CASES)
def test_the_graph_has_the_sources_gain_gate_and_parameters_of_the_plan(model, variant, output):
    result = converted(model, variant, output)
    shown = {r.read: r for r in result.report.reads}
    assert list(result.attnres.reads.names) == list(shown)
    for mode in result.programs:
        nodes = {n.name: n for n in result.graph_module(mode).graph.nodes}
        placed = result.replacements(mode)
        assert [n for n, node in nodes.items() if node.target is DEPTH_ATTENTION] == [r.node for r in placed]
        made_by = {}
        for r in placed:
            plan, node = shown[r.read], nodes[r.node]
            sources, query, key_weight, eps, gain = node.args
            assert [s.name for s in sources] == [name for _, name in r.sources]
            assert tuple(label for label, _ in r.sources) == plan.sources == r.plan.sources
            assert (gain, eps) == (plan.gain, result.attnres.config.eps)
            # One node a label through the whole graph, except for sums that grow and summaries.
            for source, label in zip(sources, plan.sources, strict=True):
                assert made_by.setdefault(label, source.name) == source.name
            assert len({s.name for s in sources}) == len(plan.sources)
            prefix = f"attnres.reads.{r.read.replace('.', '__')}"
            assert [str(q.target) for q in (query, key_weight)] == [f"{prefix}.query", f"{prefix}.key_weight"]
            gates = [n for n in nodes.values() if n.op == "get_attr" and n.target == f"{prefix}.gate" and n.users]
            assert bool(gates) == plan.gated == (result.attnres.reads[r.read].gate is not None)
            assert plan.num_parameters == sum(p.numel() for p in result.attnres.reads[r.read].parameters())


@pytest.mark.parametrize(("model", "variant", "output"), CASES)
def test_a_summary_is_made_by_the_read_that_was_planned_for_it(model, variant, output):
    result = converted(model, variant, output)
    placed = result.replacements()
    summaries = {str(r.plan.summary): r.node for r in placed if r.plan.summary is not None}
    received = {label: name for r in placed for label, name in r.sources if label.startswith("c_")}
    if model is PostNorm:  # there the norm after the read is handed on
        assert set(received) <= set(summaries)
    else:
        assert received == {label: summaries[label] for label in received}
    assert bool(received) == (variant == "local")


@pytest.mark.parametrize("model", [PreNorm, PostNorm, ReadBesideTheChain])
def test_a_saved_model_has_its_plan(model):
    result = converted(model, "local", "sum")
    file = io.BytesIO()
    result.save(file)
    file.seek(0)
    loaded = ax.load(file)
    assert loaded.report.streams == result.report.streams
    assert [r.plan for r in loaded.replacements()] == [r.plan for r in result.replacements()]
    assert [r.sources and [label for label, _ in r.sources] for r in loaded.replacements()] == [
        list(r.plan.sources) for r in result.replacements()
    ]


def test_a_plan_of_other_sources_than_the_graph_has_is_refused():
    gm = torch.fx.symbolic_trace(PreNorm())
    propagate_values_(gm, [torch.randn(2, WIDTH)])
    streams = analyze_(gm)
    config = ax.AttnResConfig(variant="full")
    plan = plan_depth_reads(streams, streams.streams, config)
    (stream,) = plan.streams
    first = replace(stream.reads[0], seen=stream.reads[1].seen)
    wrong = replace(stream, reads=(first, *stream.reads[1:]))
    with pytest.raises(RewriteError, match="was planned with the sources"):
        insert_depth_attention_pass(
            gm, streams=streams, plan=ReadPlan((wrong,), wrong.reads), eps=1e-6, fetch=lambda read, like: None
        )
