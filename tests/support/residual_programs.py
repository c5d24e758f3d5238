"""Random residual programs: a list of steps, and a plain module that executes it.

A program has one stream or two. Steps act on a stream's current state; every consumer of a state is a
module of its own, named after the step (`s3.norm`), so that reads can be named without looking at a graph.
"""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 6

STARTS = ("embed", "two embeddings", "input")
BRANCHES = ("mlp", "raw", "in-place activation", "parallel", "adapter", "scaled", "narrow", "cross")
ADDS = ("h + v", "v + h", "torch.add", "alpha", "sub", "sum", "add_", "iadd", "add_ then zero v", "h + v then double v")
IN_PLACE = ("add_", "iadd", "add_ then zero v")
PARALLEL_ORDERS = ("(h+a)+b", "h+(a+b)", "(a+b)+h", "(b+h)+a", "a+(h+b)", "in place")
FACTORS = ("half", "negative", "carry", "scalar", "masked_fill", "quarter on the left")
MOVES = ("sequence first", "all but the first token", "flattened")


@dataclass(frozen=True)
class Step:
    """One instruction. kind: what it does; stream: which stream it acts on; options: how."""

    kind: str
    stream: int = 0
    options: tuple[str, ...] = ()
    other: int = -1

    def __str__(self) -> str:
        parts = [self.kind, f"stream {self.stream}", *self.options]
        return ", ".join(parts) + (f", other {self.other}" if self.other >= 0 else "")


@dataclass
class _Sketch:
    """What the generator must know of a stream to keep a program valid."""

    start: str
    terms: int = 0
    rows_in_order: bool = True
    reaches: set[int] = field(default_factory=set)
    root_reaches: set[int] = field(default_factory=set)


@st.composite
def programs(draw: Any) -> tuple[Step, ...]:
    """A valid program of one stream, or of two of which the second may start on the first."""
    count = draw(st.integers(1, 2))
    steps = [Step("start", 0, (draw(st.sampled_from(STARTS if count == 1 else STARTS[:2])),))]
    sketches = [_Sketch(steps[0].options[0], reaches={0})]
    for _ in range(draw(st.integers(1, 6 if count == 1 else 3))):
        steps.append(_step(draw, sketches, 0))
    if count == 2:
        how = draw(st.sampled_from((*STARTS[:2], "from")))
        steps.append(Step("start", 1, (how,), 0 if how == "from" else -1))
        reached = sketches[0].reaches if how == "from" else set()
        sketches.append(_Sketch(how, reaches={1} | reached, root_reaches=set(reached)))
        for _ in range(draw(st.integers(1, 4))):
            steps.append(_step(draw, sketches, draw(st.integers(0, 1))))
    for i, sketch in enumerate(sketches):
        if sketch.terms == 0:
            steps.append(Step("write", i, ("mlp", "h + v")))
        steps.append(Step("head", i))
    return tuple(steps)


def _step(draw: Any, sketches: list[_Sketch], stream: int) -> Step:
    sketch = sketches[stream]
    kinds = ["write"] * 6 + ["flat write", "factor", "move", "head", "late head", "side"]
    if sketch.terms >= 1:
        kinds.append("inject")
    if stream == 0:
        kinds.append("output")
    kind = draw(st.sampled_from(kinds))
    if kind in ("write", "flat write"):
        return _write(draw, sketches, stream, kind)
    if kind == "factor":
        return Step(kind, stream, (draw(st.sampled_from(FACTORS)),))
    if kind == "move":
        sketch.rows_in_order = False
        return Step(kind, stream, (draw(st.sampled_from(MOVES)),))
    if kind in ("inject", "side"):
        sketch.terms += 1
    return Step(kind, stream)


def _write(draw: Any, sketches: list[_Sketch], stream: int, kind: str) -> Step:
    sketch = sketches[stream]
    branch = draw(st.sampled_from(BRANCHES))
    other = -1
    if branch == "cross":
        other = _readable(sketches, stream)
        branch = "mlp" if other < 0 else branch
        if other >= 0:
            sketch.reaches |= sketches[other].reaches
    in_place = sketch.rows_in_order and sketch.start != "input"
    adds = [a for a in ADDS if in_place or a not in IN_PLACE]
    orders = [o for o in PARALLEL_ORDERS if in_place or o != "in place"]
    sketch.terms += 1
    how = draw(st.sampled_from(orders if branch == "parallel" else adds))
    return Step(kind, stream, (branch, how), other)


def _readable(sketches: list[_Sketch], stream: int) -> int:
    """A stream whose root does not hang on this one: reading it makes neither part of the other's sublayer."""
    for i, other in enumerate(sketches):
        started_here = any(stream in s.root_reaches and j in other.reaches for j, s in enumerate(sketches))
        if i != stream and not started_here:
            return i
    return -1


# --- the plain program -------------------------------------------------------------------------------


class StepModules(nn.Module):
    """The modules one step may use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.cross = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.embed_2 = nn.Linear(WIDTH, WIDTH)
        self.carry = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def branch(self, name: str, h: Any, other: Any = None) -> Any:
        """What a sublayer writes, from the state it reads."""
        if name == "raw":
            return torch.tanh(self.up(h))
        n = self.norm(h)
        if name == "in-place activation":
            return self.down(torch.relu_(self.up(n)))
        if name == "adapter":
            y = self.up(n)
            return y + self.down(torch.tanh(y))
        if name == "scaled":
            return 0.25 * self.up(n)
        if name == "narrow":
            return self.up(n).to(torch.float32)
        if name == "cross":
            return self.up(n) + self.other(self.cross(other)).reshape(-1, WIDTH).mean(0)
        return self.down(torch.tanh(self.up(n)))


class PlainProgram(nn.Module):
    """A program executed straightforwardly, as the residual model it describes. x: [batch, tokens, WIDTH].

    A move may flatten a state or take its first rows away, so branches work on rows alone.
    """

    def __init__(self, steps: tuple[Step, ...], seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.steps = steps
            for i in range(len(steps)):
                self.add_module(f"s{i}", StepModules())
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.6)
            self.double().eval()

    def forward(self, x: Any) -> Any:
        states: list[Any] = []
        outputs: list[Any] = []
        late: list[tuple[StepModules, Any]] = []
        for i, step in enumerate(self.steps):
            m = getattr(self, f"s{i}")
            if step.kind == "start":
                states.append(start(m, step, x, states[step.other] if step.other >= 0 else None))
                continue
            h = states[step.stream]
            if step.kind == "write":
                other = states[step.other] if step.other >= 0 else None
                states[step.stream] = _plain_write(m, step, h, other)
            elif step.kind == "flat write":
                other = states[step.other] if step.other >= 0 else None
                flat = _plain_write(m, step, h.reshape(-1, WIDTH), other)
                states[step.stream] = flat.reshape(h.shape)
            elif step.kind == "factor":
                states[step.stream] = factor(m, step.options[0], h)
            elif step.kind == "move":
                states[step.stream] = move(step.options[0], h)
            elif step.kind == "inject":
                states[step.stream] = h + injected(m, x, h)
            elif step.kind == "side":
                t = m.up(m.norm(h))
                states[step.stream] = h + m.down(m.norm_2(h + t))
            elif step.kind == "head":
                outputs.append(m.up(m.norm(h)))
            elif step.kind == "late head":
                late.append((m, h))
            elif step.kind == "output":
                outputs.append(h)
        return (*outputs, *(m.up(m.norm(h)) for m, h in late))


def start(m: StepModules, step: Step, x: Any, other: Any) -> Any:
    how = step.options[0]
    if how == "input":
        return x
    if how == "from":
        return m.embed(m.norm(other))
    return m.embed(x) + m.embed_2(x) if how == "two embeddings" else m.embed(x)


def _plain_write(m: StepModules, step: Step, h: Any, other: Any) -> Any:
    branch, how = step.options
    if branch == "parallel":
        n = m.norm(h)
        a, b = m.up(n), torch.tanh(m.down(n))
        if how == "in place":
            h.add_(a)
            return h.add_(b)
        return {
            "(h+a)+b": lambda: (h + a) + b,
            "h+(a+b)": lambda: h + (a + b),
            "(a+b)+h": lambda: (a + b) + h,
            "(b+h)+a": lambda: (b + h) + a,
            "a+(h+b)": lambda: a + (h + b),
        }[how]()
    v = m.branch(branch, h, other)
    if how == "add_":
        return h.add_(v)
    if how == "iadd":
        return operator.iadd(h, v)
    if how == "add_ then zero v":
        h.add_(v)
        v.zero_()
        return h
    if how == "h + v then double v":
        h = h + v
        v.mul_(2.0)
        return h
    return {
        "h + v": lambda: h + v,
        "v + h": lambda: v + h,
        "torch.add": lambda: torch.add(h, v),
        "alpha": lambda: torch.add(h, v, alpha=0.5),
        "sub": lambda: h - v,
        "sum": lambda: sum([h, v]),
    }[how]()


def injected(m: StepModules, x: Any, like: Any) -> Any:
    return m.embed(x).reshape(-1, WIDTH).mean(0) * torch.ones_like(like)


def coefficient(how: str) -> float:
    """What a way of adding multiplies the branch by."""
    return {"alpha": 0.5, "sub": -1.0}.get(how, 1.0)


def factor(m: StepModules, name: str, h: Any) -> Any:
    if name == "half":
        return h / 2
    if name == "quarter on the left":
        return 0.25 * h
    if name == "negative":
        return -h
    if name == "carry":
        return h * m.carry
    if name == "masked_fill":
        return h.masked_fill(m.carry < 0.8, 0.0)
    return h * torch.sigmoid(m.embed.weight[0, 0])


def move(name: str, h: Any) -> Any:
    if name == "sequence first":
        return h.transpose(0, -2)
    if name == "flattened":
        return h.reshape(-1, WIDTH)
    return h[1:]


def example() -> Tensor:
    return torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1)).double()
