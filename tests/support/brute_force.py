"""Attention Residuals by definition: every stream an explicit list of terms, no graph, no torch.fx.

Written from design section 3 alone. A program is run twice. The first run is plain and only notes which
states are read and after how many terms, because blocks are counted in sublayers and a sublayer is what
lies between two reads. The second run computes every read from its sources.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.brute_force_states import Handle, Map, Notes, ReadNote, State, Terms
from tests.support.brute_force_terms import merge_weights, merged_terms, rows_term, spread_term
from tests.support.plain_maps import factor, move
from tests.support.plain_programs import (
    PlainProgram,
    StepModules,
    coefficient,
    injected,
    start,
)
from tests.support.residual_programs import REPLACEMENTS, WIDTH, Step


def depth_attention(
    sources: list[Tensor], query: Tensor, key_weight: Tensor, gain: float, dimension: int = -1
) -> Tensor:
    """out = gain * sum_i softmax_i(<query, v_i / rms(v_i) * key_weight>) v_i, in float64, over one dimension."""
    values = torch.stack([s.double().movedim(dimension, -1) for s in sources])
    keys = values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * key_weight.double()
    weights = torch.einsum("s...d,d->s...", keys, query.double()).softmax(0)
    return (gain * torch.einsum("s...,s...d->...d", weights, values)).movedim(-1, dimension)


def read_parameters(name: str) -> tuple[Tensor, Tensor]:
    """A query and a key gain for a read, from nothing but its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    query = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    return query, 1.0 + 0.3 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Setting:
    """A variant, with the blocks as `num_blocks` or `block_size`, and an output mode."""

    variant: str
    output: str
    num_blocks: int | None = None
    block_size: int | None = None

    def starts(self, sublayers: int) -> list[int]:
        if self.variant == "full":
            return list(range(sublayers))
        if self.block_size is not None:
            return list(range(0, sublayers, self.block_size))
        assert self.num_blocks is not None
        sizes = [len(part) for part in torch.arange(sublayers).tensor_split(self.num_blocks)]
        return [sum(sizes[:i]) for i in range(len(sizes))]


class Interpreter:
    """Executes a program. Without notes it is the plain residual program, and writes them."""

    def __init__(self, program: PlainProgram, setting: Setting | None = None, notes: Notes | None = None) -> None:
        self.program = program
        self.setting = setting
        self.known = notes
        self.notes = Notes()
        self.numbers = 0
        self.values: dict[int, Tensor] = {}
        self.names = notes.named() if notes else {}
        self.parameters: Mapping[str, tuple[Tensor, Tensor]] = {n: read_parameters(n) for n in self.names.values()}

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        states: list[Handle] = []
        outputs: list[Tensor | Handle] = []
        late: list[tuple[str, StepModules, Handle]] = []
        remembered: dict[int, Handle] = {}
        if self.program.dimension == 1:
            x = x.transpose(1, 2).contiguous()
        for i, step in enumerate(self.program.steps):
            name = self.program.owner(i)
            m = getattr(self.program, name)
            if step.kind == "start":
                other = self.read(states[step.other], f"{name}.norm") if step.other >= 0 else None
                states.append(self.new(len(states), [(0, start(m, step, x, other))], 1))
                continue
            h = states[step.stream]
            if step.kind in ("head", "global skip"):
                y = m.up(m.norm(self.read(h, f"{name}.norm")))
                outputs.append(x + y if step.kind == "global skip" else y)
            elif step.kind == "late head":
                late.append((name, m, h))
            elif step.kind == "output":
                outputs.append(h)
            elif step.kind == "remember":
                remembered[i] = h
            elif step.kind == "recall":
                states[step.stream] = self.merged(step, h, remembered[step.other])
            elif step.kind != "dead":
                states[step.stream] = self.changed(m, name, step, x, h, states)
        ends = [m.up(m.norm(self.read(h, f"{name}.norm"))) for name, m, h in late]
        shown = [self.read(o, "output") if isinstance(o, Handle) else o for o in outputs]
        return (*shown, *ends)

    def changed(self, m: StepModules, name: str, step: Step, x: Tensor, h: Handle, states: list[Handle]) -> Handle:
        """What a step makes of the state of its stream."""
        if step.kind in ("write", "flat write"):
            return self.write(m, name, step, h, states)
        if step.kind == "factor":
            return self.mapped(h, lambda t: factor(m, step.options[0], t))
        if step.kind == "move":
            return Handle(h.storage, (*h.maps, lambda t: move(step.options[0], t)))
        if step.kind == "inject":
            return self.extended(h, injected(m, x, h.viewed(h.state.total)))
        if step.kind == "side":
            return self.side(m, name, h)
        if step.kind == "positions":
            return self.positions(m, name, h)
        return self.write_some(m, name, step, h)

    # --- writing ---

    def new(self, stream: int, terms: Terms, count: int, extra: bool = False, seen: Terms | None = None) -> Handle:
        return Handle([self.numbered(stream, terms, count, extra, seen)])

    def numbered(self, stream: int, terms: Terms, count: int, extra: bool, seen: Terms | None = None) -> State:
        self.numbers += 1
        if not extra:
            self.notes.lengths[stream] = max(self.notes.lengths.get(stream, 0), count)
        return State(self.numbers, stream, terms, count, terms if seen is None else seen, extra)

    def extended(self, h: Handle, term: Tensor) -> Handle:
        return self.new(h.state.stream, [*self.carried(h), (h.state.count, term)], h.state.count + 1)

    def mapped(self, h: Handle, what: Map) -> Handle:
        """A state times something: a state of its own. A narrower term is multiplied in the dtype of the state."""
        dtype = h.viewed(h.state.total).dtype
        terms = [(n, what(t.to(dtype))) for n, t in self.carried(h)]
        seen = [(n, what(t.to(dtype))) for n, t in h.mapped_seen()]
        return self.new(h.state.stream, terms, h.state.count, h.state.extra, seen)

    def merged(self, step: Step, h: Handle, earlier: Handle) -> Handle:
        """Two states of one stream: coefficients of common terms add up. The root alone is one more term."""
        a, b = merge_weights(step.options[0])
        if earlier.state.count == 1 < h.state.count:
            return self.extended(self.mapped(h, lambda t: a * t), b * earlier.viewed(earlier.state.total))
        terms = merged_terms(h.mapped_terms(), a, earlier.mapped_terms(), b)
        return self.new(h.state.stream, terms, max(h.state.count, earlier.state.count))

    def write_some(self, m: StepModules, name: str, step: Step, h: Handle) -> Handle:
        """A branch that is spread over rows, or added to some of them, or stands in their place."""
        branch, how = step.options
        shown = self.read(h, f"{name}.up" if branch == "raw" else f"{name}.norm")
        shape = shown.shape
        reads_rows = how == "cat of what the rows read"
        v = m.branch(branch, (shown[1:] if reads_rows else shown).clone())
        if step.kind == "spread":
            return self.extended(h, spread_term(how, v, shape))
        term, kept = rows_term(how, v, shape)
        before = self.mapped(h, lambda t: t * kept) if how in REPLACEMENTS else h
        return self.extended(before, term)

    def write(self, m: StepModules, name: str, step: Step, h: Handle, states: list[Handle]) -> Handle:
        branch, how = step.options
        consumer = f"{name}.up" if branch == "raw" else f"{name}.norm"
        shown = self.read(h, consumer)
        shape = shown.shape
        if step.kind == "flat write":
            shown = shown.reshape(-1, WIDTH)
        if branch == "parallel":
            n = m.norm(shown)
            term = m.up(n) + torch.tanh(m.down(n))
        else:
            other = self.read(states[step.other], f"{name}.cross") if step.other >= 0 else None
            term = coefficient(how) * m.branch(branch, shown.clone(), other)
        term = term.reshape(shape)
        if how not in ("add_", "iadd", "add_ then zero v", "in place"):
            return self.extended(h, term)
        # Every alias of the storage sees the sum; a program writes in place only where rows are in order.
        assert not h.maps
        terms = [*self.carried(h), (h.state.count, term.to(h.state.terms[0][1].dtype))]
        h.storage[0] = self.numbered(h.state.stream, terms, h.state.count + 1, False)
        return h

    def side(self, m: StepModules, name: str, h: Handle) -> Handle:
        t = m.up(m.norm(self.read(h, f"{name}.norm")))
        aside = self.new(h.state.stream, [*h.mapped_seen(), (-1, t)], h.state.count, extra=True)
        return self.extended(h, m.down(m.norm_2(self.read(aside, f"{name}.norm_2"))))

    def positions(self, m: StepModules, name: str, h: Handle) -> Handle:
        """A value added for one consumer: it sees one more term, once there are others; the stream has none of it."""
        if h.state.count == 1:
            shown = self.read(h, name) + m.carry
        else:
            position = m.carry.expand(h.viewed(h.state.total).shape)
            aside = self.new(h.state.stream, [*h.mapped_seen(), (-1, position)], h.state.count, extra=True)
            shown = self.read(aside, f"{name}.norm")
        return self.extended(h, m.down(torch.tanh(m.up(m.norm(shown)))))

    # --- reading ---

    def read(self, h: Handle, consumer: str) -> Tensor:
        """What a consumer of a state gets: one read per distinct state, seen through the consumer's views."""
        state = h.state
        prefix = state.count
        self.notes.reads.setdefault(state.number, ReadNote(consumer, state.stream, prefix, state.extra))
        if state.number not in self.names:
            return h.viewed(state.total)
        if state.number not in self.values:
            self.values[state.number] = self.attend(state)
        return h.viewed(self.values[state.number])

    def attend(self, state: State) -> Tensor:
        assert self.setting is not None
        sources = self.sources(state)
        query, key_weight = self.parameters[self.names[state.number]]
        gain = len(sources) if self.setting.output == "sum" else 1.0
        return depth_attention(sources, query, key_weight, gain, self.program.dimension)

    def sources(self, state: State) -> list[Tensor]:
        """The terms grouped as the variant wants them: sublayers or blocks; extra terms by themselves."""
        assert self.setting is not None and self.known is not None
        by_block = self.setting.variant == "block"
        groups: dict[Any, Tensor] = {}
        for position, term in state.seen:
            if position <= 0:
                key: Any = ("alone", position)
            else:
                sublayer = self.sublayer(state.stream, position)
                key = ("block", self.block(state.stream, sublayer)) if by_block else ("sublayer", sublayer)
            # A block's outputs are summed in the dtype in which the program adds them to the stream.
            groups[key] = groups[key].to(state.total.dtype) + term if key in groups else term
        return list(groups.values())

    def sublayer(self, stream: int, position: int) -> int:
        assert self.known is not None
        return sum(cut <= position for cut in self.known.cuts(stream)) - 1

    def block(self, stream: int, sublayer: int) -> int:
        return sum(start <= sublayer for start in self.starts(stream)) - 1

    def starts(self, stream: int) -> list[int]:
        assert self.setting is not None and self.known is not None
        return self.setting.starts(self.known.sublayers(stream))

    # --- local blocks ---

    def carried(self, h: Handle) -> Terms:
        """The terms a stream goes on from: all of them, or the summary where a local block has ended.

        The summary is the first read at the end of the block; where nothing reads there, the plain sum.
        """
        state = h.state
        if self.known is None or self.setting is None or self.setting.variant != "local" or state.extra:
            return h.mapped_terms()
        cuts = self.known.cuts(state.stream)
        if state.count not in cuts or cuts.index(state.count) not in self.starts(state.stream)[1:]:
            return h.mapped_terms()
        ends = [n for n, r in self.known.reads.items() if self.is_at(r, state)]
        if not ends:
            return [(0, h.viewed(state.total))]
        return [(0, h.viewed(self.read_again(state)))] if state.number == min(ends) else h.mapped_terms()

    def is_at(self, read: ReadNote, state: State) -> bool:
        return (read.stream, read.prefix, read.extra) == (state.stream, state.count, False)

    def read_again(self, state: State) -> Tensor:
        if state.number not in self.values:
            self.values[state.number] = self.attend(state)
        return self.values[state.number]


def notes_of(program: PlainProgram, x: Tensor) -> Notes:
    """Which states of a program are read, under which names, and how long its streams are."""
    plain = Interpreter(program)
    plain.run(x)
    return plain.notes


def run_brute_force(program: PlainProgram, x: Tensor, setting: Setting, notes: Notes) -> tuple[Tensor, ...]:
    return Interpreter(program, setting, notes).run(x)
