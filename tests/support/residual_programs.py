"""Random residual programs: a list of steps (`plain_programs` executes them as the module they describe).

A program has one stream or two. Steps act on a stream's current state; every consumer of a state is a
module of its own, named after the step (`s3.norm`), so that reads can be named without looking at a graph.
Steps that share modules name each other's reads, and are numbered.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

from hypothesis import strategies as st

WIDTH = 6
#: The shape of a program's input.
SHAPE = (4, 5, WIDTH)

STARTS = ("embed", "two embeddings", "input")
#: Branches that work in any layout, and those that take the last dimension for the features.
BRANCHES = (
    *("mlp", "raw", "in-place activation", "parallel", "adapter", "scaled", "narrow", "bfloat16"),
    *("drop path", "drop path by bernoulli", "dropout"),
)
ROW_BRANCHES = ("cross", "recurrence")
ADDS = (
    *("h + v", "v + h", "torch.add", "alpha", "sub", "sum", "add_", "iadd", "add_ then zero v", "h + v then double v"),
    *("lerp", "halves"),
)
IN_PLACE = ("add_", "iadd", "add_ then zero v")
PARALLEL_ORDERS = ("(h+a)+b", "h+(a+b)", "(a+b)+h", "(b+h)+a", "a+(h+b)", "in place")
FACTORS = ("half", "negative", "scalar", "quarter on the left")
ROW_FACTORS = ("carry", "masked_fill")
#: Movements of rows. The shapes that they make are in `moved_shape`.
MOVES = (
    *("sequence first", "all but the first token", "flattened", "roll", "flip", "permute and back", "cat and split"),
    *("narrow and cat", "features in two", "unbind and stack", "float64", "float32 and back"),
)
CHANNEL_MOVES = ("roll time", "all but the first time", "cat of times", "transpose and back", "float32 and back")
#: How a branch is added to the rows after the first, to the second row, or stands in the place of the first.
TAIL_WRITES = ("cat with a sum", "cat of what the rows read", "slice_scatter", "cat of two sums")
ROW_WRITES = ("index_add", "index_copy", "index_put", "scatter_add")
REPLACEMENTS = ("cat in the place", "slice_scatter in the place")
ASSIGNMENTS = ("slice added to", "slice assigned")
SPREADS = ("mean of the tokens", "mean of all", "mean on the left")
MERGES = ("h + e", "e + h", "halves", "lerp", "difference")
DEAD = ("sum", "read", "reduction", "sublayer")


@dataclass(frozen=True)
class Step:
    """One instruction.

    kind: what it does; stream: which stream it acts on; options: how; other: another stream, or the step that
    remembered a state; modules: the step whose modules it uses, -1 for its own.
    """

    kind: str
    stream: int = 0
    options: tuple[str, ...] = ()
    other: int = -1
    modules: int = -1

    def __str__(self) -> str:
        parts = [self.kind, f"stream {self.stream}", *self.options]
        parts += [f"other {self.other}"] if self.other >= 0 else []
        return ", ".join(parts) + (f", modules of s{self.modules}" if self.modules >= 0 else "")


@dataclass
class _Sketch:
    """What the generator must know of a stream to keep a program valid.

    read: whether something but sums read the stream past its root. remembered: by the step that remembered a state,
    how many terms it had beside the root, and its shape.
    """

    start: str
    terms: int = 0
    read: bool = False
    rows_in_order: bool = True
    shape: tuple[int, ...] = SHAPE
    reaches: set[int] = field(default_factory=set)
    root_reaches: set[int] = field(default_factory=set)
    remembered: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)


@st.composite
def programs(draw: Any, assignments: bool = False) -> tuple[Step, ...]:
    """A valid program of one stream, or of two of which the second may start on the first.

    assignments: whether rows may be assigned to, which a symbolic trace cannot see.
    """
    count = draw(st.sampled_from((1, 1, 2)))
    steps = [Step("start", 0, (draw(st.sampled_from(STARTS if count == 1 else STARTS[:2])),))]
    sketches = [_Sketch(steps[0].options[0], reaches={0})]
    for _ in range(draw(st.integers(1, 7 if count == 1 else 3))):
        steps.append(_step(draw, steps, sketches, 0, assignments))
    if count == 2:
        how = draw(st.sampled_from((*STARTS[:2], "from")))
        steps.append(Step("start", 1, (how,), 0 if how == "from" else -1))
        reached = sketches[0].reaches if how == "from" else set()
        shape = sketches[0].shape if how == "from" else SHAPE
        sketches.append(_Sketch(how, shape=shape, reaches={1} | reached, root_reaches=set(reached)))
        for _ in range(draw(st.integers(1, 4))):
            steps.append(_step(draw, steps, sketches, draw(st.integers(0, 1)), assignments))
    for i, sketch in enumerate(sketches):
        if sketch.terms == 0:
            steps.append(Step("write", i, ("mlp", "h + v")))
        steps.append(Step("head", i))
    injects = any(step.kind == "inject" for step in steps)
    return (*steps[:-1], steps[-1] if injects else _skipping(draw, steps[-1], sketches))


@st.composite
def channel_programs(draw: Any) -> tuple[Step, ...]:
    """A valid program of one stream whose features are in dimension 1: [batch, WIDTH, tokens]."""
    steps = [Step("start", 0, ("embed",)), Step("write", 0, ("mlp", "h + v"))]
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(
            st.sampled_from(("write", "write", "write", "factor", "move", "head", "late head", "side", "output"))
        )
        options = {
            "write": lambda: _channel_write(draw),
            "factor": lambda: (draw(st.sampled_from(FACTORS)),),
            "move": lambda: (draw(st.sampled_from(CHANNEL_MOVES)),),
        }
        steps.append(Step(kind, 0, options[kind]() if kind in options else ()))
    return (*steps, Step("head", 0))


def _channel_write(draw: Any) -> tuple[str, ...]:
    # Dropout that is always active beside a BatchNorm that is not in training: no mode runs that.
    branch = draw(st.sampled_from([b for b in BRANCHES if b != "dropout"]))
    hows = PARALLEL_ORDERS[:-1] if branch == "parallel" else [a for a in ADDS if a not in IN_PLACE]
    return branch, draw(st.sampled_from(hows))


def _skipping(draw: Any, head: Step, sketches: list[_Sketch]) -> Step:
    """The last head, or one whose result is added to the program's input, around a stack that does more by itself."""
    sketch = sketches[0]
    may = len(sketches) == 1 and sketch.start != "input" and sketch.shape == SHAPE and sketch.terms >= 4
    return Step("global skip", 0) if may and draw(st.booleans()) else head


def _step(draw: Any, steps: list[Step], sketches: list[_Sketch], stream: int, assignments: bool) -> Step:
    sketch = sketches[stream]
    kinds = ["write"] * 8 + ["flat write", "factor", "move", "move", "head", "late head", "side", "spread", "rows"]
    kinds += ["remember", "dead", "positions"]
    if sketch.terms >= 1:
        kinds.append("inject")
    if stream == 0:
        kinds.append("output")
    recalled = [i for i, (terms, shape) in sketch.remembered.items() if _may_merge(sketch, terms, shape)]
    kinds += ["recall"] * 3 if recalled else []
    kind = draw(st.sampled_from(kinds))
    if kind in ("write", "flat write"):
        return _write(draw, steps, sketches, stream, kind)
    if kind == "recall":
        which = draw(st.sampled_from(recalled))
        sketch.terms += sketch.remembered[which][0] == 0
        return Step(kind, stream, (draw(st.sampled_from(MERGES)),), which)
    if kind == "remember":
        sketch.remembered[len(steps)] = (sketch.terms, sketch.shape)
    elif kind in ("inject", "side", "spread", "rows", "positions"):
        sketch.read |= sketch.terms > 0 and kind != "inject"
        sketch.terms += 1
    return Step(kind, stream, _options(draw, kind, sketch, assignments))


def _may_merge(sketch: _Sketch, terms: int, shape: tuple[int, ...]) -> bool:
    """Whether a stream can be merged with an earlier state: the root alone is one more term where terms were read."""
    return shape == sketch.shape and (terms > 0 or sketch.read)


def _options(draw: Any, kind: str, sketch: _Sketch, assignments: bool) -> tuple[str, ...]:
    if kind == "factor":
        return (draw(st.sampled_from((*FACTORS, *ROW_FACTORS))),)
    if kind == "dead":
        return (draw(st.sampled_from(DEAD)),)
    if kind == "move":
        name = draw(st.sampled_from([m for m in MOVES if m != "all but the first token" or sketch.shape[0] > 3]))
        sketch.rows_in_order = False
        sketch.shape = moved_shape(name, sketch.shape)
        return (name,)
    if kind == "spread":
        return draw(st.sampled_from(("mlp", "raw"))), draw(st.sampled_from(SPREADS))
    if kind == "rows":
        ways = (*TAIL_WRITES, *ROW_WRITES, *REPLACEMENTS, *(ASSIGNMENTS if assignments else ()))
        return draw(st.sampled_from(("mlp", "raw", "adapter", "drop path"))), draw(st.sampled_from(ways))
    return ()


def moved_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a movement of rows makes."""
    if name == "sequence first":
        return (shape[1], shape[0], *shape[2:]) if len(shape) > 2 else shape
    if name == "flattened":
        return (prod(shape[:-1]), WIDTH)
    return (shape[0] - 1, *shape[1:]) if name == "all but the first token" else shape


def _write(draw: Any, steps: list[Step], sketches: list[_Sketch], stream: int, kind: str) -> Step:
    sketch = sketches[stream]
    # A recurrence in the first of few sublayers does more than the stack around it, and is taken for the main stream.
    deep = len(sketches) == 1 and sketch.terms >= 2
    branch = draw(st.sampled_from((*BRANCHES, *(ROW_BRANCHES if deep else ROW_BRANCHES[:1]))))
    other = -1
    if branch == "cross":
        other = _readable(sketches, stream)
        branch = "mlp" if other < 0 else branch
        if other >= 0:
            sketch.reaches |= sketches[other].reaches
    in_place = sketch.rows_in_order and sketch.start != "input"
    adds = [a for a in ADDS if in_place or a not in IN_PLACE]
    orders = [o for o in PARALLEL_ORDERS if in_place or o != "in place"]
    sketch.read |= sketch.terms > 0
    sketch.terms += 1
    how = draw(st.sampled_from(orders if branch == "parallel" else adds))
    earlier = [i for i, s in enumerate(steps) if s.kind == "write" and s.stream == stream and s.modules < 0]
    shared = draw(st.sampled_from((-1, -1, -1, *earlier[-2:])))
    return Step(kind, stream, (branch, how), other, shared)


def _readable(sketches: list[_Sketch], stream: int) -> int:
    """A stream whose root does not hang on this one: reading it makes neither part of the other's sublayer."""
    for i, other in enumerate(sketches):
        started_here = any(stream in s.root_reaches and j in other.reaches for j, s in enumerate(sketches))
        if i != stream and not started_here:
            return i
    return -1
