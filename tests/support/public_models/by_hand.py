"""Attention Residuals written into the forwards of some public models by hand, from design section 3 alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import brute_force
from tests.support.public_models.language import norm


class Reads:
    """What reads compute, by definition, from their parameters; how many sources each was given is kept.

    Args:
        reads: The reads of a converted model.
    """

    def __init__(self, reads: Sequence[Any]) -> None:
        self.known = {read.name: read for read in reads}
        self.given: dict[str, int] = {}

    def __call__(self, name: str, sources: Sequence[Tensor]) -> Tensor:
        if len(sources) == 1:
            return sources[0]
        self.given[name] = len(sources)
        return self.attend(self.known[name], sources, len(sources))

    def post(self, name: str, carried: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """A norm on the stream reads its sources, and the plain sum where the gate is zero."""
        self.given[name] = len(sources)
        read, plain = self.known[name], carried + sources[-1]
        mixed = self.attend(read, sources, 1)
        # Where the sources are the terms of this very sum there is no gate: their mixture begins as the sum.
        return len(sources) * mixed if read.gate is None else plain + read.gate * (mixed - plain)

    @staticmethod
    def attend(read: Any, sources: Sequence[Tensor], gain: float) -> Tensor:
        found = brute_force.depth_attention(list(sources), read.query, read.key_weight, gain)
        return found.to(sources[0].dtype)


def flux_single(model: nn.Module, read: Reads, image: Tensor, text: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Text and image stay joined: what is cut apart is joined again unchanged. The last norm sees the image's rows."""
    c, count = model.condition(t, y), text.shape[1]
    sources = [torch.cat([model.text_in(text), model.image_in(image)], 1)]
    for i, block in enumerate(model.singles):
        sources.append(block.branch(read(f"singles.{i}.norm", sources), c))
    return model.last(read("last.norm", [s[:, count:] for s in sources]), c)


def detr(model: nn.Module, read: Reads, features: Tensor) -> Tensor:
    """Post-norm: the state is the norm's output, the sources are what was written; positions are in neither."""

    def norm_of(prefix: str, layer: nn.Module, j: int, x: Tensor, sources: list[Tensor], written: Tensor) -> Tensor:
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


def speedrun(model: nn.Module, read: Reads, tokens: Tensor) -> Tensor:
    """A factor is on every source; the root once more and a skip's terms are added to the sources they belong to."""
    x0 = model.start(tokens)
    sources, kept, first = [x0], [], None
    for i, block in enumerate(model.blocks):
        if i >= 2:
            skipped, weight = kept.pop(), model.skips[i - 2]
            again = [s + weight * k for s, k in zip(sources, skipped, strict=False)]
            sources = [*again, *sources[len(skipped) :]]
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


def two_lanes(model: nn.Module, read: Reads, tokens: Tensor) -> Tensor:
    """Each lane is a list of its own; both begin with the one root."""
    left, right = model.start(tokens)
    lefts, rights = [left], [right]
    for i, layer in enumerate(model.layers):
        lefts = [*lefts, layer.attention(layer.norm1(read(f"layers.{i}.norm1", rights)))]
        state = read(f"layers.{i}.norm2", lefts)
        rights = [*rights, layer.feed(layer.norm2(state))]
    both = [model.norm_left(state), model.norm_right(read("norm_right", rights))]
    return model.head(torch.cat(both, -1))


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "flux single": flux_single,
    "detr": detr,
    "modded-nanogpt": speedrun,
    "two lanes of one root": two_lanes,
}
