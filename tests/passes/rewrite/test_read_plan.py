"""The plan that is shown is the plan that is executed."""

import functools
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
from attnres_fx.passes.graph.operations import op_name

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


class TwoReadsAtOnce(PreNorm):
    """Each state is read twice: as it is, and halved."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x) + norm(x * 0.5))
        return self.norms[-1](x)


MODELS = [PreNorm, PostNorm, ReadBesideTheChain, TwoReadsAtOnce]
CASES = list(product(MODELS, ["full", "block", "local"], ["sum", "mean"]))
SINGLE_READS = [case for case in CASES if case[0] is not TwoReadsAtOnce]
#: The layers of each sublayer, and of terms outside the chain, where that is not one layer a sublayer.
LAYERS = {ReadBesideTheChain: [{"0"}, {"1", "2"}, {"3"}]}
BESIDE = {ReadBesideTheChain: {"1"}}


@functools.cache
def converted(model, variant, output):
    """Looked at by several tests, which leave it as it is."""
    blocks = {} if variant == "full" else {"block_size": 2}
    config = ax.AttnResConfig(variant=variant, output=output, **blocks)
    return ax.convert(model(), (torch.randn(2, 3, WIDTH),), config=config, check=False)


@pytest.mark.parametrize(("model", "variant", "output"), SINGLE_READS)
def test_the_graph_has_the_sources_gain_gate_and_parameters_of_the_plan(model, variant, output):
    result = converted(model, variant, output)
    shown = {r.read: r for r in result.report.reads}
    assert list(result.attnres.reads.names) == list(shown)
    for mode in result.every_program():
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


def summed(node):
    """What a node is the sum of: the input, layers by their number, and other nodes by their name."""
    if node.op == "placeholder":
        return {"x"}
    if op_name(node) == "linear":
        return {node.args[1].target.split(".")[1]}
    if op_name(node) == "add":
        left, right = map(summed, node.args)
        assert not left & right
        return left | right
    if op_name(node) == "mul":  # half a state has halves of its sources
        return summed(node.args[0])
    return {node.name}


def value_of(placed, nodes):
    """What takes the place of the state: the read, or what a gate makes of the two."""
    read, plan = nodes[placed.node], placed.plan
    if not plan.gated:
        return read
    ((difference,), state) = read.users, nodes[plan.site]
    (scaled,) = difference.users
    (value,) = scaled.users
    prefix = f"attnres.reads.{placed.read.replace('.', '__')}"
    assert (op_name(difference), difference.args) == ("sub", (read, state))
    assert (op_name(scaled), scaled.args[0]) == ("mul", difference)
    assert str(scaled.args[1].target) == f"{prefix}.gate"
    assert (op_name(value), value.args) == ("add", (state, scaled))
    return value


@pytest.mark.parametrize(("model", "variant", "output"), CASES)
def test_each_source_is_the_sum_that_its_label_says_and_consumers_take_the_read(model, variant, output):
    result = converted(model, variant, output)
    layers = LAYERS.get(model, [{str(i)} for i in range(5)])
    for mode in result.every_program():
        nodes = {n.name: n for n in result.graph_module(mode).graph.nodes}
        placed = result.replacements(mode)
        handed_on = {}
        for r in placed:
            value = value_of(r, nodes)
            for consumer in map(nodes.get, r.plan.consumers):
                assert value in consumer.all_input_nodes
            if r.plan.makes_summary:  # on a post-norm stream the norm after the read is handed on
                handed_on[str(r.plan.summary)] = r.plan.consumers[0] if model is PostNorm else r.node
        blocks = {s.stream.name: s.schedule.blocks for s in result.report.streams}
        for r in placed:
            for label, name in r.sources:
                kind, _, number = label.partition("_")
                if label == "v_0":
                    expected = {"x"}
                elif label.startswith("+"):
                    expected = BESIDE[model]
                elif kind == "c":
                    expected = {handed_on[label]}
                elif kind == "v":
                    expected = layers[int(number) - 1]
                else:
                    index, _, length = number.rstrip("]").partition("[:")
                    block = blocks[r.stream][int(index) - 1]
                    expected = set().union(*(layers[i] for i in block[: int(length or len(block))]))
                assert summed(nodes[name]) == expected, (r.read, label)


@pytest.mark.parametrize(("model", "variant", "output"), CASES)
def test_a_summary_is_made_by_one_read_and_received_by_the_next_block(model, variant, output):
    result = converted(model, variant, output)
    placed = result.replacements()
    made = [str(r.plan.summary) for r in placed if r.plan.makes_summary]
    received = {label for r in placed for label, _ in r.sources if label.startswith("c_")}
    assert len(made) == len(set(made)) and received == set(made) == {str(r.plan.summary) for r in placed} - {"None"}
    assert bool(received) == (variant == "local")
    (stream,) = result.report.streams
    for read in stream.reads:
        if read.summary is not None:  # who does not make it sees the sources of the whole block all the same
            assert read.seen == stream.schedule.sources(read.position)


def test_of_two_reads_at_the_end_of_a_block_the_first_makes_the_summary():
    result = converted(TwoReadsAtOnce, "local", "sum")
    at_end = [r for r in result.replacements() if str(r.plan.summary) == "c_2"]
    assert [r.plan.makes_summary for r in at_end] == [True, False]
    assert [label for label, _ in at_end[1].sources] == ["v_0", "v_1", "v_2"]


@pytest.mark.parametrize("model", MODELS)
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
            gm,
            streams=streams,
            plan=ReadPlan((wrong,), wrong.reads),
            config=config,
            fetch=lambda read, like, name: next(iter(gm.graph.nodes)),
        )
