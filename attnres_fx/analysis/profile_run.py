"""One run of a graph that measures what is written into its streams and what its reads see."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from attnres_fx.analysis.profile_places import Places, ReadPlace
from attnres_fx.ops.general import read_from_arguments
from attnres_fx.passes.depth_source import Source
from attnres_fx.stream_reads import attribute_name

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Measured:
    """What one read sees.

    Attributes:
        magnitude: Root mean square of the state.
        mixture: [S, tokens]: how much each source brings, its weight times its norm; they add up to one.
        shares: [S]: of the state, averaged over tokens; of the last read of a stream.
    """

    magnitude: float
    mixture: Tensor
    shares: tuple[float, ...] = ()


@dataclass
class Measurements:
    """What a run found.

    Attributes:
        outputs: Of the graph.
        written: What each sublayer wrote, term by term, by stream and index; kept for gradients.
        magnitudes: Root mean square of what each wrote.
        reads: By name.
        shares: Of the state that the last read of a stream sees, what each sublayer has, where that is known.
    """

    outputs: Any = None
    written: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    magnitudes: dict[tuple[str, int], float] = field(default_factory=dict)
    reads: dict[str, Measured] = field(default_factory=dict)
    shares: dict[tuple[str, int], float] = field(default_factory=dict)


def measure(gm: GraphModule, inputs: list[Any], places: Places) -> Measurements:
    """Run a graph and measure.

    Args:
        gm: The graph.
        inputs: Flat inputs.
        places: Where to look.
    """
    probe = _Probe(gm, places)
    probe.found.outputs = probe.run(*inputs)
    return probe.found


class _Probe(Interpreter):
    def __init__(self, gm: GraphModule, places: Places) -> None:
        super().__init__(gm)
        self.found = Measurements()
        self.places = places
        last = (places.last_read(s) for s in places.streams)
        self.last = {r.plan.read for r in last if r is not None}
        order = {n.name: i for i, n in enumerate(gm.graph.nodes)}
        self.due: dict[str, list[ReadPlace]] = {}
        for read in places.reads:  # a source may be written just behind the state
            at = max((read.node, *read.sources), key=order.__getitem__)
            self.due.setdefault(at, []).append(read)
        self.waited = {n for r in places.reads for n in (r.node, r.plan.site, *r.sources)}
        self.writes = {n: w for w in places.writes for n in w.nodes}
        self.values: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            if n.name in self.writes:
                self._note_written(n.name, value)
            if n.name in self.waited:
                self.values[n.name] = value.detach()
        for read in self.due.get(n.name, ()):
            with torch.no_grad():
                self.found.reads[read.plan.read] = self._measured(read, n)
        return value

    def _note_written(self, name: str, value: Tensor) -> None:
        place = self.writes[name]
        key = place.stream, place.index
        terms = self.found.written.setdefault(key, [])
        terms.append(value)
        if len(terms) == len(place.nodes):
            self.found.magnitudes[key] = _rms(sum(_wide(t.detach()) for t in terms))  # type: ignore[arg-type]

    def _measured(self, read: ReadPlace, node: Node) -> Measured:
        vectors = [self._rows(s, read) for s in read.sources]
        norms = torch.stack([self._norms(s, v) for s, v in zip(read.sources, vectors, strict=True)])
        brought, factors = norms, [torch.ones_like(vectors[0][:, :1])] * len(vectors)
        if read.attends:
            factors = self._factors(node)
            parts = [_wide(v) * f for v, f in zip(vectors, factors, strict=True)]
            brought = torch.stack([torch.linalg.vector_norm(p, dim=-1) for p in parts])
        mixture = brought / brought.sum(0).clamp_min(_TINY)
        state = self._rows(read.node, read)
        if read.plan.read not in self.last:
            return Measured(_rms(self._state(read, state)), mixture)
        own = _Shares(factors, state)
        shares = [own.of(i, v) for i, v in enumerate(vectors)]
        for i, source in enumerate(read.plan.seen):
            self._note_parts(read, source, own, i, shares[i])
        return Measured(_rms(state), mixture, tuple(shares))

    def _factors(self, node: Node) -> list[Tensor]:
        """What a read multiplies each source by: S of [tokens, 1], or with heads [tokens, D]."""
        sources, *arguments = self.fetch_args_kwargs_from_env(node)[0]
        depth_read, gain = read_from_arguments(*arguments)
        by_head = depth_read.coefficients(sources).flatten(1, -2) * gain
        each = 1 if depth_read.form.heads == 1 else sources[0].shape[-1] // depth_read.form.heads
        return list(by_head.repeat_interleave(each, -1))

    def _note_parts(self, read: ReadPlace, source: Source, own: "_Shares", at: int, share: float) -> None:
        """The shares of the sublayers that a source is the sum of, where they add up to that of the source."""
        stream, indices = read.plan.stream, range(source.start + 1, source.stop + 1)
        if source.kind in ("root", "sublayer"):
            self.found.shares[stream, source.stop] = share
            return
        sums = [sum(t.detach() for t in self.found.written.get((stream, i), ())) for i in indices]
        rows = [v.reshape(-1, v.shape[-1]) for v in sums if isinstance(v, Tensor)]
        if source.kind == "summary" or len(rows) < len(sums) or any(len(v) != own.tokens for v in rows):
            return
        parts = [own.of(at, v) for v in rows]
        if abs(sum(parts) - share) <= 1e-2 * max(map(abs, parts)):
            self.found.shares |= {(stream, i): part for i, part in zip(indices, parts, strict=True)}

    def _state(self, read: ReadPlace, value: Tensor) -> Tensor:
        """What the read returns: behind a gate, the state moved a little towards the mixture."""
        if not (read.attends and read.plan.gated):
            return value
        site = _wide(self._rows(read.plan.site, read, moved=True))
        gate = self.fetch_attr(f"attnres.reads.{attribute_name(read.plan.read)}.gate")
        return site + _wide(gate.detach()) * (_wide(value) - site)

    def _rows(self, name: str, read: ReadPlace, *, moved: bool = False) -> Tensor:
        """[tokens, D]. Sources have their features last already, as has what attends to them."""
        value = self.values[name]
        turned = moved or (name == read.node and not read.attends)
        if turned and read.plan.dimension != -1:
            value = value.movedim(read.plan.dimension, -1)
        return value.reshape(-1, value.shape[-1])

    def _norms(self, name: str, rows: Tensor) -> Tensor:
        if name not in self.norms:
            self.norms[name] = torch.linalg.vector_norm(_wide(rows), dim=-1)
        return self.norms[name]


class _Shares:
    """How much of a state its sources have: `<c v, h> / <h, h>`, averaged over tokens."""

    def __init__(self, factors: Sequence[Tensor], state: Tensor) -> None:
        self.factors, self.state = factors, _wide(state)
        self.whole = self.state.square().sum(-1).clamp_min(_TINY)
        self.tokens = len(self.state)

    def of(self, source: int, vectors: Tensor) -> float:
        return float(((self.factors[source] * _wide(vectors) * self.state).sum(-1) / self.whole).mean())


def _wide(value: Tensor) -> Tensor:
    """In float32 at least."""
    return value if value.dtype == torch.float64 else value.float()


def _rms(value: Tensor) -> float:
    return float(_wide(value).square().mean().sqrt())
