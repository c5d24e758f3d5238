"""Where the width of a stream is: what normalises and contracts along a dimension says so, its place does not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attnres_fx as ax
from attnres_fx.errors import NoStreamError, StreamWidthError
from attnres_fx.passes import analyze_
from tests.support.stream_text import SPELLINGS, captured, check_preserved, stream_text

CHANNELS, TOKENS = 6, 10


class Layers(nn.Module):
    """Modules enough for a small vision model or mixer; `program(model, x)` says how they are used."""

    def __init__(self, program):
        super().__init__()
        torch.manual_seed(0)
        self.program = program
        self.stem, self.embed = nn.Conv2d(3, CHANNELS, 4, 4), nn.Linear(3, CHANNELS)
        for i in (1, 2, 3, 4):
            self.add_module(f"norm_{i}", nn.LayerNorm(CHANNELS))
            self.add_module(f"batch_{i}", nn.BatchNorm2d(CHANNELS))
            self.add_module(f"conv_{i}", nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1))
            self.add_module(f"deep_{i}", nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS))
            self.add_module(f"line_{i}", nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1))
            self.add_module(f"mix_{i}", nn.Linear(TOKENS, TOKENS))
            self.add_module(f"mlp_{i}", nn.Linear(CHANNELS, CHANNELS))
        self.head = nn.Linear(CHANNELS, 5)
        self.eval()

    def forward(self, x):
        return self.program(self, x)


def image():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def series():
    return torch.randn(2, TOKENS, 3, generator=torch.Generator().manual_seed(0))


def written(m, i, x):
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


def root_mean_square(m, i, x):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


def permuted(m, i, x):
    return m.get_submodule(f"norm_{i}")(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def batch(m, i, x):
    return m.get_submodule(f"batch_{i}")(x)


def group(m, i, x):
    return F.group_norm(x, 1)


def over_all(m, i, x):
    return F.layer_norm(x, (CHANNELS, 4, 4))


def unit_length(m, i, x):
    return F.normalize(x, dim=1)


def activation(m, i, x):
    return F.relu(x)


NORMS = (written, root_mean_square, permuted, batch, group, over_all, unit_length, activation)
BRANCHES = {
    "convolution": lambda m, i, y: m.get_submodule(f"conv_{i}")(y),
    "depthwise": lambda m, i, y: m.get_submodule(f"deep_{i}")(y),
    "linear": lambda m, i, y: m.get_submodule(f"mlp_{i}")(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "weight on the left": lambda m, i, y: (m.get_submodule(f"mlp_{i}").weight @ y.flatten(2)).unflatten(2, (4, 4)),
    "pool": lambda m, i, y: F.avg_pool2d(y, 3, 1, 1),
}


def vision(norm, branch="convolution"):
    def program(m, x):
        x = m.stem(x)
        for i in (1, 2, 3):
            x = x + BRANCHES[branch](m, i, norm(m, i, x))
        return m.head(norm(m, 4, x).mean((2, 3)))

    return Layers(program)


def found(model, args, spelling):
    """Text of the streams, and where each has its width."""
    gm = captured(model, args, spelling)
    streams = analyze_(gm).streams
    return stream_text(streams, gm), [(s.width, s.dimension) for s in streams]


def positions(text):
    return [line.split()[-1] for line in text.splitlines() if " reads " in line]


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_over_the_channels_says_where_they_are(norm):
    text, widths = found(vision(norm), (image(),), "symbolic")
    assert widths == [(CHANNELS, 1)]
    assert positions(text) == ["1", "2", "3"]


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_branch_over_the_channels_says_where_they_are(branch):
    text, widths = found(vision(activation, branch), (image(),), "export")
    assert widths == [(CHANNELS, 1)]
    assert positions(text) == ["1", "2", "3"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_finds_the_same_width(spelling):
    for norm, first in ((written, "stream.read_1"), (permuted, "stream.read_1"), (batch, "batch_2")):
        text, widths = found(vision(norm), (image(),), spelling)
        assert widths == [(CHANNELS, 1)]
        assert f"{first} reads 1" in text


def mixer(m, x, norm=True, turned=True, turn=lambda y: y.transpose(1, 2)):
    """Mixes tokens and features by weights alike; turned, the stream is [B, D, T]."""

    def to_last(y):
        return turn(y) if turned else y

    def normed(i, y):
        return to_last(m.get_submodule(f"norm_{i}")(to_last(y))) if norm else y

    x = to_last(m.embed(x))
    x = x + to_last(m.mix_1(to_last(normed(1, x)).transpose(1, 2)).transpose(1, 2))
    x = x + to_last(m.mlp_1(to_last(normed(2, x))))
    return m.head(to_last(normed(3, x)))


@pytest.mark.parametrize("spelling", ["symbolic", "export", "dynamo"])
def test_an_attribute_turns_a_stream_as_a_call_does(spelling):
    text, widths = found(Layers(lambda m, x: mixer(m, x, turn=lambda y: y.mT)), (series(),), spelling)
    assert (widths, positions(text)) == ([(CHANNELS, 1)], ["1", "2"])


@pytest.mark.parametrize("spelling", ["symbolic", "export"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("norm", [True, False])
def test_a_mixer_has_its_width_where_its_norm_is_else_where_its_embedding_made_it(norm, turned, spelling):
    model = Layers(lambda m, x: mixer(m, x, norm, turned))
    text, widths = found(model, (series(),), spelling)
    assert widths == [(CHANNELS, 1 if turned else -1)]
    assert positions(text) == ["1", "2"]


@pytest.mark.parametrize("norm", [written, root_mean_square, group, unit_length])
def test_a_norm_decides_against_weights_over_another_dimension(norm):
    def program(m, x):
        x = x + m.mix_1(norm(m, 1, x))
        x = x + m.mix_2(norm(m, 2, x))
        return norm(m, 3, x)

    model, x = Layers(program), torch.randn(2, CHANNELS, TOKENS)
    for spelling in ("symbolic", "export"):
        assert found(model, (x,), spelling)[1] == [(CHANNELS, 1)]


def hybrid(m, x):
    x = m.stem(x)
    x = x + m.conv_1(m.batch_1(x).relu())
    x = x + m.conv_2(m.batch_2(x).relu())
    x = x.flatten(2).transpose(1, 2)
    x = x + m.mlp_3(m.norm_3(x))
    return m.head(m.norm_4(x))


HYBRID = """stream stream from stem
  1: conv_1
  2: conv_2
  3: mlp_3
  batch_2 reads 1
  norm_3 reads 2
  norm_4 reads 3"""


def half_pooled(m, x):
    x = m.stem(x)
    for i in (1, 2):
        pooled, kept = x.split(CHANNELS // 2, 1)
        y = torch.cat([F.avg_pool2d(pooled, 3, 1, 1), kept], 1)
        x = x + m.get_submodule(f"conv_{i}")(written(m, i, y))
    return m.head(written(m, 4, x).mean((2, 3)))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_channels_that_a_sublayer_replaces_are_no_rows(spelling):
    text, widths = found(Layers(half_pooled), (image(),), spelling)
    assert widths == [(CHANNELS, 1)]
    assert positions(text) == ["1", "2"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_convolutions_and_then_tokens_are_one_stream(spelling):
    assert found(Layers(hybrid), (image(),), spelling) == (HYBRID, [(CHANNELS, 1)])


def tokens_then_convolutions(m, x):
    x = m.embed(x)
    x = (x + m.mlp_1(m.norm_1(x))).transpose(1, 2)
    x = x + m.line_2(F.relu(x))
    return m.line_3(x)


def test_tokens_and_then_convolutions_are_one_stream():
    text, widths = found(Layers(tokens_then_convolutions), (series(),), "export")
    assert (positions(text), widths) == (["1", "2"], [(CHANNELS, -1)])


def test_a_pooled_spread_over_time_normalises_nothing():
    def program(m, x):
        x = m.embed(x)
        x = x + m.mlp_1(x).relu()
        x = x + m.mlp_2(x).relu()
        return m.head(torch.cat([x.mean(1), x.std(1)], 1)[:, :CHANNELS])

    assert found(Layers(program), (series(),), "symbolic")[1] == [(CHANNELS, -1)]


def test_where_nothing_speaks_the_width_is_last():
    def program(m, x):
        h = x + F.softmax(x, -1)
        return h + F.softmax(h, -1)

    assert found(Layers(program), (series(),), "export")[1] == [(3, -1)]


def test_a_stream_with_as_much_for_one_dimension_as_for_another_is_refused_with_both():
    def program(m, x):
        x = x + m.mix_1(x)
        return x + m.mlp_1(x.transpose(1, 2)).transpose(1, 2)

    x = torch.randn(2, CHANNELS, TOKENS)
    with pytest.raises(StreamWidthError) as raised:
        ax.convert(Layers(program), (x,), check=False)
    text = str(raised.value)
    assert "dimension 1 for" in text and "mlp_1" in text
    assert "dimension 2 for" in text and "mix_1" in text
    assert "no addition" not in text
    assert not isinstance(raised.value, NoStreamError)


def test_norms_that_turn_rows_into_columns_link_no_post_norm_stream():
    def program(m, x):
        x = m.embed(x)[:, :CHANNELS]  # as many tokens as features
        for i in (1, 2):
            x = m.get_submodule(f"norm_{i}")(x + m.get_submodule(f"mlp_{i}")(x)).transpose(1, 2)
            x = m.get_submodule(f"line_{i}")(x).relu() + x
            x = x.transpose(1, 2)
        return x

    gm = captured(Layers(program), (series(),), "symbolic")
    assert not any(s.post_norm for s in analyze_(gm).streams)


# --- what is computed --------------------------------------------------------------------------------


def read_over_channels(sources, read):
    """Depth attention over dimension 1, from design section 3."""
    values = torch.stack(sources).double()
    keys = values / (values.square().mean(2, keepdim=True) + 1e-6).sqrt()
    weight = (read.query * read.key_weight).double()
    weights = torch.einsum("sbc...,c->sb...", keys, weight).softmax(0).unsqueeze(2)
    return (len(sources) * (weights * values).sum(0)).float()


def randomised(converted):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for read in converted.attnres.reads:
            read.query.copy_(torch.randn(CHANNELS, generator=generator))
            read.key_weight.copy_(1 + 0.3 * torch.randn(CHANNELS, generator=generator))
    return list(converted.attnres.reads)


@pytest.mark.parametrize("variant", ["full", "block", "local"])
def test_a_converted_vision_model_reads_over_its_channels(variant):
    model = vision(written)
    blocks = {} if variant == "full" else {"block_size": 2}
    converted = ax.convert(model, (image(),), config=ax.AttnResConfig(variant=variant, **blocks))
    check_preserved(model, converted, (image(),))
    first, second, third = randomised(converted)
    with torch.no_grad():
        root = model.stem(image())
        v1 = model.conv_1(written(model, 1, root))
        v2 = model.conv_2(written(model, 2, read_over_channels([root, v1], first)))
        both = read_over_channels([root, v1 + v2] if variant == "block" else [root, v1, v2], second)
        v3 = model.conv_3(written(model, 3, both))
        seen = {"full": [root, v1, v2, v3], "block": [root, v1 + v2, v3], "local": [both, v3]}[variant]
        expected = model.head(written(model, 4, read_over_channels(seen, third)).mean((2, 3)))
        assert torch.allclose(converted(image()), expected, atol=1e-5)


def viewed(m, x):
    """Views need the strides that the states had."""
    x = m.stem(x)
    for i in (1, 2):
        x = x + m.get_submodule(f"conv_{i}")(m.get_submodule(f"batch_{i}")(x))
        flat = x.view(x.shape[0], CHANNELS, 16)
        x = x + (m.get_submodule(f"mlp_{i}").weight @ flat).view(x.shape)
    return m.head(x.mean((2, 3)))


def post_norm(m, x):
    x = m.embed(x).transpose(1, 2)
    for i in (1, 2):
        x = F.group_norm(x + m.get_submodule(f"line_{i}")(x), 2)
    return m.line_3(x)


PROGRAMS = {
    "viewed": (viewed, image),
    "post-norm": (post_norm, series),
    "hybrid": (hybrid, image),
    "mixer": (mixer, series),
    "tokens then convolutions": (tokens_then_convolutions, series),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_outputs_and_gradients_are_the_originals(name):
    program, inputs = PROGRAMS[name]
    model, args = Layers(program), (inputs(),)
    for variant in ("block", "local"):
        config = ax.AttnResConfig(variant=variant, num_blocks=2)
        converted = ax.convert(model, args, config=config, check=False)
        check_preserved(model, converted, args, where=variant)
        assert {r.query.numel() for r in converted.attnres.reads} == {CHANNELS}
