"""Models that read their depth already are refused by name; mixtures of experts, heads, scales and layers are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnres_fx as ax
from attnres_fx.passes import analyze_
from tests.support.stream_text import SPELLINGS, captured

WIDTH, LAYERS = 8, 3


class Net(nn.Module):
    def __init__(self, program, read):
        super().__init__()
        torch.manual_seed(0)
        self.program, self.read = program, read
        self.queries = nn.ParameterList(nn.Parameter(torch.randn(WIDTH)) for _ in range(LAYERS + 1))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS + 1))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x):
        return self.program(self, x)


def stacked(values, query):
    values = torch.stack(values)
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6)
    return ((keys * query).sum(-1).softmax(0).unsqueeze(-1) * values).sum(0)


def contracted(values, query):
    values = torch.stack(values, -2)
    weights = torch.einsum("...nd,d->...n", F.rms_norm(values, (WIDTH,)), query).softmax(-1)
    return torch.einsum("...n,...nd->...d", weights, values)


def attended(values, query):
    values = torch.cat([v.unsqueeze(-2) for v in values], -2)
    query = query.expand(*values.shape[:-2], 1, WIDTH)
    return F.scaled_dot_product_attention(query, F.rms_norm(values, (WIDTH,)), values).squeeze(-2)


def listed(values, query):
    weights = torch.stack([(F.rms_norm(v, (WIDTH,)) * query).sum(-1) for v in values], -1).softmax(-1)
    return sum(weights[..., i : i + 1] * v for i, v in enumerate(values))


def learned(values, query):
    return torch.einsum("n,n...->...", query[: len(values)], torch.stack(values))


def learned_and_listed(values, query):
    return sum(query[i] * v for i, v in enumerate(values))


READS = [stacked, contracted, attended, listed]


def every_layer(m, x):
    values = [x]
    for i in range(LAYERS):
        taken = m.read(values, m.queries[i]) if i else x
        values.append(m.layers[i](m.norms[i](taken)).tanh())
    return m.norms[-1](m.read(values, m.queries[-1]))


def sums_of_blocks(m, x):
    blocks, partial = [], x
    for i in range(LAYERS):
        taken = m.read([*blocks, partial], m.queries[i]) if blocks else partial
        if i % 2 == 0:
            blocks, partial = [*blocks, partial], None
        written = m.layers[i](m.norms[i](taken)).tanh()
        partial = written if partial is None else partial + written
    return m.norms[-1](m.read([*blocks, partial], m.queries[-1]))


def found(model):
    return analyze_(captured(model.eval(), (torch.randn(2, 5, WIDTH),), "export"))


@pytest.mark.parametrize("read", READS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("program", [every_layer, sums_of_blocks], ids=lambda f: f.__name__)
def test_a_model_that_reads_its_depth_is_refused_by_name(program, read):
    assert "depth" in {r.kind for r in found(Net(program, read)).refusals if r.stops_conversion}


def averaged_over_depth(m, x):
    """Layers with residuals, and after each a weighted sum of the outputs of all of them."""
    values = [x]
    for i in range(LAYERS):
        values.append(x + m.layers[i](m.norms[i](x)))
        x = m.read(values, m.queries[i])
    return m.norms[-1](x)


@pytest.mark.parametrize("read", [stacked, contracted, learned, learned_and_listed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_learned_weights_over_all_earlier_outputs_are_a_read_of_the_depth(read, spelling):
    model = Net(averaged_over_depth, read).eval()
    captured_once = captured(model, (torch.randn(2, 5, WIDTH),), spelling)
    assert "depth" in {r.kind for r in analyze_(captured_once).refusals if r.stops_conversion}


@pytest.mark.parametrize("read", [learned, learned_and_listed], ids=lambda f: f.__name__)
def test_a_root_that_each_layer_mixes_in_again_is_no_read_of_the_depth(read):
    def program(m, x):
        h = x
        for norm, layer, weights in zip(m.norms, m.layers, m.queries, strict=False):
            h = m.read([h, x], weights) if h is not x else x
            h = h + layer(norm(h))
        return m.norms[-1](h)

    streams = found(Net(program, read))
    assert streams.refusals == ()
    assert [len(s.depth_reads) for s in streams.select("main")] == [LAYERS]


@pytest.mark.slow
def test_the_error_says_so_and_a_stream_that_is_named_is_converted():
    class Beside(Net):
        def forward(self, x):
            y = x.flip(1)
            for norm, layer in zip(self.norms, self.layers, strict=False):
                y = y + layer(norm(y))
            return every_layer(self, x), self.norms[-1](y)

    model, x = Beside(None, stacked).eval(), torch.randn(2, 5, WIDTH)
    with pytest.raises(ax.errors.AlreadyConvertedError, match="reads its depth already"):
        ax.convert(model, (x,))
    (stream,) = (s for s in ax.inspect(model, (x,)).streams if len(s.depth_reads) == LAYERS)
    converted = ax.convert(model, (x,), config=ax.AttnResConfig(streams=[stream.name]))
    assert len(converted.attnres.reads) == LAYERS


def mixture_at_the_end(m, x):
    values = [x]
    for norm, layer in zip(m.norms, m.layers, strict=False):
        values.append(values[-1] + layer(norm(values[-1])))
    return m.norms[-1](m.read(values, m.queries[0]))


def experts(m, x):
    for norm, query in zip(m.norms[:-1], m.queries, strict=False):
        h = norm(x)
        x = x + m.read([layer(h) for layer in m.layers], query)
    return m.norms[-1](x)


def scales(m, x):
    for norm, query in zip(m.norms[:-1], m.queries, strict=False):
        h, values = norm(x), []
        for layer in m.layers:
            h = layer(h).tanh()
            values.append(h)
        x = x + m.read(values, query)
    return m.norms[-1](x)


@pytest.mark.parametrize("program", [mixture_at_the_end, experts, scales], ids=lambda f: f.__name__)
def test_other_mixtures_are_no_reads_over_depth(program):
    streams = found(Net(program, stacked))
    assert "depth" not in {r.kind for r in streams.refusals}
    assert [len(s.depth_reads) for s in streams.select("main")] == [LAYERS]
