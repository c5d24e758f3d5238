"""Forms of a read on post-norm streams, in blocks that hand on a summary, and in half precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import ConfigError, SaveError
from tests.support.read_forms import FORMS, IDS, WIDTH, by_hand, decoder, form, randomized, read_by_hand


def close(found, expected, tolerance=1e-11):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, h):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = norm(h + layer(h))
        return h


def post_norm_by_hand(model, x, reads, config):
    sources, state = [x], x
    for place, (layer, norm, read) in enumerate(zip(model.layers, model.norms, reads, strict=True)):
        sources.append(layer(state))
        plain = state + sources[-1]
        if place == 0 or config.output == "mean":  # what it reads adds up to the state: no gate
            gain = 1 if config.output == "mean" else 2 if config.weights == "sigmoid" else len(sources)
            state = norm(read_by_hand(sources, config, read, gain))
        else:
            state = norm(plain + read.gate * (read_by_hand(sources, config, read, 1) - plain))
    return state


@pytest.mark.parametrize("name", ["sigmoid", "static", "input query", "heads", "value norm"])
@pytest.mark.slow_after(2)
def test_a_post_norm_stream_reads_through_gates_in_every_form(name):
    torch.manual_seed(0)
    model, x = PostNorm().double(), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    config = form(name, variant="full")
    converted = ax.convert(model, (x,), config=config)
    if config.output == "sum":
        close(converted(x), model(x), 1e-13)
    randomized(converted)
    expected = post_norm_by_hand(model, x, converted.attnres.reads, config)
    close(converted(x), expected)
    weights = list(converted.attnres.parameters())
    found = torch.autograd.grad(converted(x).sin().sum(), weights)
    for one, other in zip(found, torch.autograd.grad(expected.sin().sum(), weights), strict=True):
        close(one, other, 1e-9)


@pytest.mark.parametrize("name", ["input query", "sigmoid", "static", "heads"])
@pytest.mark.slow_after(1)
def test_a_block_of_local_hands_on_a_read_of_the_same_form(name):
    original = decoder()
    converted = ax.convert(original, (IDS,), config=form(name, variant="local", num_blocks=2))
    close(converted(IDS), original(IDS), 1e-13)
    randomized(converted)
    config, reads = converted.report.config, list(converted.attnres.reads)
    state, sources = original.embed(IDS), [original.embed(IDS)]
    sublayers = [f for layer in original.layers for f in (layer.attention, layer.mlp)]
    for i, (sublayer, read) in enumerate(zip(sublayers, reads, strict=True)):
        sources.append(sublayer(state))
        gain = 2.0 if config.weights == "sigmoid" else len(sources)
        state = read_by_hand(sources, config, read, gain)
        sources = [state] if i == 1 else sources
    close(converted(IDS), original.head(original.norm(state)))


@pytest.mark.parametrize("name", ["all of it", "static"])
def test_a_half_precision_model_reads_as_the_exact_one_to_rounding(name):
    original = decoder().bfloat16()
    converted = randomized(ax.convert(original, (IDS,), config=form(name)))
    exact = copy.deepcopy(original).double()
    expected = by_hand(exact, copy.deepcopy(converted.attnres.reads).double(), form(name))
    assert converted(IDS).dtype == torch.bfloat16
    close(converted(IDS).double(), expected, 3e-2)
    converted(IDS).float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in converted.attnres.parameters())


def test_heads_that_do_not_divide_the_width_are_refused_by_the_name_of_the_stream():
    with pytest.raises(ConfigError, match="heads=3 does not divide the width 8 of the stream 'stream'"):
        ax.convert(decoder(), (IDS,), config=ax.AttnResConfig(heads=3))


def test_a_checkpoint_of_another_library_has_no_such_form(tmp_path):
    options = {**FORMS["sigmoid"], "output": "mean"}
    converted = ax.convert(decoder(), (IDS,), config=ax.AttnResConfig(block_size=2, **options), check=False)
    with pytest.raises(SaveError, match=r"reads of style 'kimi' are plain ones.*weights='sigmoid'.*without weights"):
        ax.export_adapter(converted, tmp_path, style="kimi")
    plain = ax.convert(decoder(), (IDS,), config=ax.AttnResConfig(block_size=2, output="mean"), check=False)
    ax.export_adapter(plain, tmp_path, style="kimi")
    with pytest.raises(SaveError, match=r"plain ones.*weights='sigmoid'"):
        ax.load_adapter(converted, tmp_path)


def test_the_projection_of_a_query_counts_in_the_costs_of_a_plan():
    plain, projected = (
        ax.plan(decoder(), (IDS,), num_stages=2, config=ax.AttnResConfig(query=q)).costs for q in ("static", "input")
    )
    rows = IDS.numel()
    more = [b.forward_flops - a.forward_flops for a, b in zip(plain.sublayers, projected.sublayers, strict=True)]
    assert more == [0, *[2 * rows * WIDTH**2] * 3]  # the last read stands behind the chain
    assert projected.after.forward_flops - plain.after.forward_flops == 2 * rows * WIDTH**2
    back = [b.backward_flops - a.backward_flops for a, b in zip(plain.sublayers, projected.sublayers, strict=True)]
    assert back == [2 * m for m in more]


def test_a_projection_starts_with_a_gradient_and_the_model_learns():
    original = decoder()
    converted = ax.convert(original, (IDS,), config=ax.AttnResConfig(query="input", block_size=1))
    optimizer = torch.optim.SGD(converted.attnres.parameters(), lr=0.5)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(converted(IDS).flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
