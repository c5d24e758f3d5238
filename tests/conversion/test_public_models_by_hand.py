"""Public models with random queries: converted, and Attention Residuals written into their forward by hand."""

import pytest
import torch

import attnres_fx as ax
from tests.support import brute_force
from tests.support.public_models import EXAMPLES, drawn
from tests.support.public_models.diffusion import modulated
from tests.support.public_models.language import norm


class Reads:
    """What the reads of a converted model compute, by definition; in the order in which the hand calls them."""

    def __init__(self, converted):
        self.known = {read.name: read for read in converted.attnres.reads}
        self.called = []

    def __call__(self, name, sources):
        if name not in self.known:
            assert len(sources) == 1, f"{name} of {len(sources)} sources is no read"
            return sources[0]
        self.called.append(name)
        read = self.known[name]
        if read.gate is None:
            return self.attend(read, sources, len(sources))
        plain = sum(sources)
        return plain + read.gate * (self.attend(read, sources, 1) - plain)

    def post(self, name, carried, sources):
        """A norm on the stream reads its sources, and the plain sum where the gate is zero."""
        self.called.append(name)
        read = self.known[name]
        plain = carried + sources[-1]
        return plain + read.gate * (self.attend(read, sources, 1) - plain)

    @staticmethod
    def attend(read, sources, gain):
        found = brute_force.depth_attention(list(sources), read.query, read.key_weight, gain)
        return found.to(sources[0].dtype)


def dit(model, read, image, t, y):
    sources, c = [model.embed(image)], model.condition(t, y)
    for i, block in enumerate(model.blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).chunk(6, 1)
        x = modulated(block.norm1(read(f"blocks.{i}.norm1", sources)), shift1, scale1)
        sources.append(gate1[:, None] * block.attention(x))
        x = modulated(block.norm2(read(f"blocks.{i}.norm2", sources)), shift2, scale2)
        sources.append(gate2[:, None] * block.feed(x))
    x = model.last(read("last.norm", sources), c).view(-1, 2, 2, 2, 2, 2)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(-1, 2, 4, 4)


def flux_single(model, read, image, text, t, y):
    """Text and image stay joined: what is cut apart is joined again unchanged. The last norm sees the image's rows."""
    c, count = model.condition(t, y), text.shape[1]
    sources = [torch.cat([model.text_in(text), model.image_in(image)], 1)]
    for i, block in enumerate(model.singles):
        sources.append(block.branch(read(f"singles.{i}.norm", sources), c))
    return model.last(read("last.norm", [s[:, count:] for s in sources]), c)


def detr(model, read, features):
    """Post-norm: the state is the norm's output, the sources are what was written; positions are in neither."""

    def norm_of(prefix, layer, j, x, sources, written):
        sources.append(written)
        return getattr(layer, f"norm{j}")(read.post(f"{prefix}.norm{j}", x, sources))

    positions = model.positions
    queries = model.queries.unsqueeze(1).repeat(1, features.shape[0], 1)
    memory = model.project(features).flatten(2).permute(2, 0, 1)
    sources = [memory]
    for i, layer in enumerate(model.encoder):
        memory = norm_of(f"encoder.{i}", layer, 1, memory, sources, layer.attend(memory, positions))
        memory = norm_of(f"encoder.{i}", layer, 2, memory, sources, layer.feed(memory))
    x, shown = torch.zeros_like(queries), []
    sources = [x]
    for i, layer in enumerate(model.decoder):
        x = norm_of(f"decoder.{i}", layer, 1, x, sources, layer.attend(x, queries))
        x = norm_of(f"decoder.{i}", layer, 2, x, sources, layer.look(x, queries, memory, positions))
        x = norm_of(f"decoder.{i}", layer, 3, x, sources, layer.feed(x))
        shown.append(model.decoder_norm(x))
    return model.boxes(torch.stack(shown)).sigmoid()


def speedrun(model, read, tokens):
    """A factor is on every source; the root once more and a skip's terms are added to the sources they belong to."""
    x0 = model.start(tokens)
    sources, kept, first = [x0], [], None
    for i, block in enumerate(model.blocks):
        if i >= 2:
            skipped = kept.pop()
            sources = [s + model.skips[i - 2] * k for s, k in zip(sources, skipped, strict=False)] + sources[
                len(skipped) :
            ]
        sources = [block.lambdas[0] * s for s in sources]
        sources[-1] = sources[-1] + block.lambdas[1] * x0
        state = read(f"blocks.{i}" if i else "first", sources)
        y, value = block.attention(norm(state), first)
        first = value if first is None else first
        sources = [*sources, y]
        sources = [*sources, block.feed(norm(read(f"blocks.{i}#2" if i else "blocks.0", sources)))]
        if i < 2:
            kept.append(sources)
    return model.head(read("head", sources))


def two_lanes(model, read, tokens):
    left, right = model.start(tokens)
    lefts, rights = [left], [right]
    for i, layer in enumerate(model.layers):
        lefts = [*lefts, layer.attention(layer.norm1(read(f"layers.{i}.norm1", rights)))]
        state = read(f"layers.{i}.norm2", lefts)
        rights = [*rights, layer.feed(layer.norm2(state))]
    both = [model.norm_left(state), model.norm_right(read("norm_right", rights))]
    return model.head(torch.cat(both, -1))


BY_HAND = {
    "dit": dit,
    "flux single": flux_single,
    "detr": detr,
    "modded-nanogpt": speedrun,
    "two lanes of one root": two_lanes,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_converted_public_model_computes_attention_residuals_written_by_hand(name):
    model, args = EXAMPLES[name]()
    converted = ax.convert(drawn(model), args, config=ax.AttnResConfig(variant="full"))
    generator = torch.Generator().manual_seed(2)
    reads = Reads(converted)
    with torch.no_grad():
        for read in converted.attnres.reads:
            read.query.normal_(generator=generator)
            if read.gate is not None:
                read.gate.fill_(0.7)
        found, expected, plain = converted(*args), BY_HAND[name](model, reads, *args), model(*args)
    assert sorted(reads.called) == sorted(reads.known)
    scale = expected.abs().max()
    assert (expected - plain).abs().max() > 1e-2 * scale
    assert (found - expected).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("name", ["patchtst", "dinov2"])
def test_both_modes_of_a_public_model_compute_what_it_does(name):
    """The check of each conversion compares outputs, gradients and state, of the other mode when it is asked for."""
    model, args = EXAMPLES[name]()
    converted = ax.convert(drawn(model), args, config=ax.AttnResConfig(variant="full"))
    assert converted.report.difference is not None
    before = [read.name for read in converted.attnres.reads]
    converted.train()
    assert set(converted.report.modes) == {"eval", "train"}
    assert [read.name for read in converted.attnres.reads] == before
    assert all(read.query.numel() == 8 for read in converted.attnres.reads)
