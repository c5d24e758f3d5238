"""What a converted model attends to over depth, against the softmax written out by hand."""

import pytest
import torch
from torch.nn import functional as F

import attnres_fx as ax
from attnres_fx.errors import AttnResError
from tests.support.stream_text import VARIANTS, tokens, toy


def two_layers(m, x):
    h = m.embed(x)
    h = h + m.mlp_1(m.norm_1(h))
    h = h + m.mlp_2(m.norm_2(h))
    return m.head(m.norm_f(h))


def four_layers(m, x):
    h = m.embed(x)
    for i in (1, 2, 3, 4):
        h = h + getattr(m, f"mlp_{i}")(getattr(m, f"norm_{i}")(h))
    return m.head(m.norm_f(h))


def converted_toy(program=four_layers, variant="full"):
    gm = torch.fx.symbolic_trace(toy(program))
    return ax.convert(gm, (tokens(),), config=VARIANTS[variant])


def attention(sources, read):
    """[S, ...]: the weights of one read, from its definition."""
    values = torch.stack(sources)
    keys = F.rms_norm(values, values.shape[-1:], read.key_weight, 1e-6)
    return (keys * read.query).sum(-1).softmax(0)


def test_weights_are_the_softmax_over_what_each_read_sees():
    model = converted_toy(two_layers)
    for seed, read in enumerate(model.attnres.reads):
        torch.nn.init.normal_(read.query, generator=torch.Generator().manual_seed(seed))
    middle, last = model.attnres.reads
    v = [model.embed(tokens())]
    v.append(model.mlp_1(model.norm_1(v[0])))
    seen = [attention(v, middle)]
    v.append(model.mlp_2(model.norm_2(2 * (seen[0][..., None] * torch.stack(v)).sum(0))))
    seen.append(attention(v, last))
    found = ax.depth_weights(model, (tokens(),), per_token=True)
    assert [r.sources for r in found] == [("v_0", "v_1"), ("v_0", "v_1", "v_2")]
    for read, expected in zip(found, seen, strict=True):
        torch.testing.assert_close(read.weights, expected)
    for read, expected in zip(ax.depth_weights(model, (tokens(),)), seen, strict=True):
        torch.testing.assert_close(read.weights, expected.flatten(1).mean(1))


@pytest.mark.parametrize(
    ("variant", "last"),
    [("full", ("v_0", "v_1", "v_2", "v_3", "v_4")), ("block", ("v_0", "b_1", "b_2")), ("local", ("c_2", "v_3", "v_4"))],
)
def test_every_variant_names_the_sources_its_last_read_sees_and_zero_queries_weigh_them_alike(variant, last):
    weights = ax.depth_weights(converted_toy(variant=variant), (tokens(),))
    assert [r.name for r in weights] == ["norm_2", "norm_3", "norm_4", "norm_f"]
    assert weights["norm_f"].sources == last
    for read in weights:
        torch.testing.assert_close(read.weights, torch.full((len(read.sources),), 1 / len(read.sources)))


def test_the_picture_has_a_row_a_read_and_a_column_a_source():
    weights = ax.depth_weights(converted_toy(), (tokens(),))
    header, _, *rows = str(weights).splitlines()
    assert header.split() == ["read", *weights.sources] == ["read", "v_0", "v_1", "v_2", "v_3", "v_4"]
    assert [row.split()[0] for row in rows] == [r.name for r in weights]
    assert rows[0].count("0.50") == 2 and rows[-1].count("0.20") == 5


def test_arguments_that_do_not_fit_the_call_are_refused():
    with pytest.raises(AttnResError):
        ax.depth_weights(converted_toy(), (tokens(), tokens()))
