"""The example GPT from all three spellings of its graph: the reads its configuration says, and its function."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from tests.support.stream_text import SPELLINGS, VARIANTS, assert_near, check_preserved, found_text

IDS = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))


def small_gpt(layers=3):
    """With matrices drawn wide enough that every sublayer moves the output."""
    torch.manual_seed(0)
    model = SmallGPT(GPTConfig(vocabulary=32, layers=layers, heads=2, width=16, context=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def sublayers(layers):
    return [f"blocks.{i}.{kind}" for i in range(layers) for kind in ("attention", "mlp")]


def read_names(layers):
    """The norm after every sublayer: the next sublayer's, and at last the final one."""
    return [f"{name}_norm" for name in sublayers(layers)[1:]] + ["norm"]


class OnDynamoGraph(nn.Module):
    """A converted Dynamo graph, called with the lifted parameters where they were."""

    def __init__(self, model, config):
        super().__init__()
        kept = []

        def backend(gm, inputs):
            kept.append((gm, tuple(inputs)))
            return gm.forward

        torch._dynamo.reset()
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(IDS)
        ((gm, self.inputs),) = kept
        self.inner = ax.convert(gm, self.inputs, config=config)
        self.attnres = self.inner.attnres

    def forward(self, ids):
        (logits,) = self.inner(*(ids if not i.is_floating_point() else i for i in self.inputs))
        return logits


def converted_from(spelling, model, config):
    if spelling == "symbolic":
        return ax.convert(torch.fx.symbolic_trace(model), (IDS,), config=config)
    if spelling == "export":
        return ax.convert(torch.export.export(model, (IDS,), strict=False), (IDS,), config=config)
    return OnDynamoGraph(model, config)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_streams_are_what_the_configuration_says(spelling, layers):
    lines = [f"  {i}: {name}.dropout" for i, name in enumerate(sublayers(layers), 1)]
    lines += [f"  {name} reads {i}" for i, name in enumerate(read_names(layers), 1)]
    assert found_text(small_gpt(layers), (IDS,), spelling).split("\n")[1:] == lines


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_fresh_conversion_computes_what_the_model_does(spelling, variant):
    model = small_gpt()
    converted = converted_from(spelling, model, VARIANTS[variant])
    assert [read.name for read in converted.attnres.reads] == read_names(3)
    check_preserved(model, converted, (IDS,), where=spelling)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_trained_queries_mean_the_same_in_all_spellings(variant):
    outputs = []
    for spelling in SPELLINGS:
        converted = converted_from(spelling, small_gpt(), VARIANTS[variant])
        generator = torch.Generator().manual_seed(1)
        for read in converted.attnres.reads:
            torch.nn.init.normal_(read.query, generator=generator)
        outputs.append(converted(IDS).detach())
    fresh = small_gpt()(IDS).detach()
    assert (outputs[0] - fresh).abs().max() > 1e-2 * fresh.abs().max()
    for spelling, output in zip(SPELLINGS[1:], outputs[1:], strict=True):
        assert_near(output, outputs[0], 1e-5, spelling)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow_after(1)
def test_one_conversion_runs_at_other_sizes(variant):
    model = small_gpt()
    converted = ax.convert(model, (IDS,), config=VARIANTS[variant])
    for batch, length in ((1, 9), (3, 16), (2, 2)):
        ids = torch.arange(batch * length).reshape(batch, length) % 32
        assert_near(converted(ids), model(ids), 1e-5, f"{batch} by {length}")
