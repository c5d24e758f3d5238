"""Random residual programs as plain modules: the models that the generated steps describe."""

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.plain_maps import factor, merged, move
from tests.support.residual_programs import SHAPE, WIDTH, Step

#: The row that `index_add` and its like write to.
ROW = torch.tensor([1])


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
        if name == "bfloat16":
            return self.up(n).to(torch.bfloat16)
        if name == "cross":
            return self.up(n) + self.other(self.cross(other)).reshape(-1, WIDTH).mean(0)
        if name == "recurrence":
            return self.over_time(self.up(n))
        y = self.down(torch.tanh(self.up(n)))
        if name == "drop path":
            return y * (torch.rand_like(y[..., :1]) > 0.3) / 0.7
        if name == "drop path by bernoulli":
            return y.div(0.8) * torch.empty_like(y[:, :1]).bernoulli_(0.8)
        return F.dropout(y, 0.3, True) if name == "dropout" else y

    def over_time(self, u: Any) -> Any:
        """A recurrence over the first rows: each step takes its own slice, and all the same weights."""
        s = u[0] * 0.5
        for i in (1, 2):
            s = 0.5 * s + self.other(torch.tanh(u[i] * s))
        return u * torch.sigmoid(s.mean(-1, keepdim=True))


class TransposedNorm(nn.LayerNorm):
    """A LayerNorm over dimension 1, between two transposes."""

    def forward(self, h: Any) -> Any:
        return super().forward(h.transpose(1, 2)).transpose(1, 2).contiguous()


class WrittenNorm(nn.Module):
    """A norm over dimension 1, written out."""

    def forward(self, h: Any) -> Any:
        h = h - h.mean(1, keepdim=True)
        return h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-5)


class ChannelModules(StepModules):
    """The modules of one step on [batch, WIDTH, tokens]."""

    def __init__(self, number: int) -> None:
        super().__init__()
        for name in ("up", "down", "embed"):
            self.add_module(name, nn.Conv1d(WIDTH, WIDTH, 3 if name == "up" else 1, padding="same"))
        norms = (lambda: TransposedNorm(WIDTH), lambda: nn.BatchNorm1d(WIDTH), WrittenNorm)
        self.norm = norms[number % 3]()
        self.norm_2 = norms[(number + 1) % 3]()


class PlainProgram(nn.Module):
    """A program executed straightforwardly, as the residual model it describes. x: [batch, tokens, WIDTH].

    A move may flatten a state or take its first rows away, so branches work on rows alone.
    """

    def __init__(self, steps: tuple[Step, ...], seed: int, channels_first: bool = False) -> None:
        super().__init__()
        self.dimension = 1 if channels_first else -1
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.steps = steps
            for i in range(len(steps)):
                self.add_module(f"s{i}", ChannelModules(i) if channels_first else StepModules())
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.6)
            self.double().eval()

    def owner(self, i: int) -> str:
        """Name of the step whose modules a step uses."""
        return f"s{i if self.steps[i].modules < 0 else self.steps[i].modules}"

    def forward(self, x: Any) -> Any:
        states: list[Any] = []
        outputs: list[Any] = []
        late: list[tuple[StepModules, Any]] = []
        remembered: dict[int, Any] = {}
        if self.dimension == 1:
            x = x.transpose(1, 2).contiguous()  # what a dropout draws follows the layout in memory
        for i, step in enumerate(self.steps):
            m = getattr(self, self.owner(i))
            if step.kind == "start":
                states.append(start(m, step, x, states[step.other] if step.other >= 0 else None))
                continue
            h = states[step.stream]
            if step.kind in ("head", "global skip"):
                y = m.up(m.norm(h))
                outputs.append(x + y if step.kind == "global skip" else y)
            elif step.kind == "late head":
                late.append((m, h))
            elif step.kind == "output":
                outputs.append(h)
            elif step.kind == "remember":
                remembered[i] = h
            elif step.kind == "dead":
                dead(m, step.options[0], h)
            elif step.kind == "recall":
                states[step.stream] = merged(step.options[0], h, remembered[step.other])
            else:
                other = states[step.other] if step.other >= 0 else None
                states[step.stream] = _changed(m, step, x, h, other)
        return (*outputs, *(m.up(m.norm(h)) for m, h in late))


def _changed(m: StepModules, step: Step, x: Any, h: Any, other: Any) -> Any:
    """What a step makes of the state of its stream."""
    if step.kind == "write":
        return _plain_write(m, step, h, other)
    if step.kind == "flat write":
        return _plain_write(m, step, h.reshape(-1, WIDTH), other).reshape(h.shape)
    if step.kind == "factor":
        return factor(m, step.options[0], h)
    if step.kind == "move":
        return move(step.options[0], h)
    if step.kind == "inject":
        return h + injected(m, x, h)
    if step.kind == "side":
        t = m.up(m.norm(h))
        return h + m.down(m.norm_2(h + t))
    if step.kind == "positions":
        return h + m.down(torch.tanh(m.up(m.norm(h + m.carry))))
    if step.kind == "spread":
        return _plain_spread(m, step, h)
    assert step.kind == "rows", step.kind
    return _plain_rows(m, step, h)


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
        "lerp": lambda: torch.lerp(h, h + 2 * v, 0.5),
        "halves": lambda: 0.5 * h + 0.5 * (h + 2 * v),
    }[how]()


def _plain_spread(m: StepModules, step: Step, h: Any) -> Any:
    branch, how = step.options
    v = m.branch(branch, h)
    if how == "mean of all":
        return h + v.reshape(-1, WIDTH).mean(0)
    v = v.mean(-2, keepdim=True)
    return v + h if how == "mean on the left" else h + v


def _plain_rows(m: StepModules, step: Step, h: Any) -> Any:
    branch, how = step.options
    if how == "cat of what the rows read":
        return torch.cat([h[:1], h[1:] + m.branch(branch, h[1:])], 0)
    v = m.branch(branch, h)
    if how in ("slice added to", "slice assigned"):
        h = h.clone()
        if how == "slice added to":
            h[1:] += v[1:]
        else:
            h[1:] = h[1:] + v[1:]
        return h
    return {
        "cat with a sum": lambda: torch.cat([h[:1], h[1:] + v[1:]], 0),
        "cat of two sums": lambda: torch.cat([h[:1] - v[:1], h[1:] + v[1:]], 0),
        "slice_scatter": lambda: torch.slice_scatter(h, h[1:] + v[1:], 0, 1),
        "index_add": lambda: torch.index_add(h, 0, ROW, v[1:2]),
        "index_copy": lambda: torch.index_copy(h, 0, ROW, h.index_select(0, ROW) + v[1:2]),
        "index_put": lambda: torch.index_put(h, (ROW,), v[1:2], accumulate=True),
        "scatter_add": lambda: torch.scatter_add(h, 0, torch.ones_like(v[:1], dtype=torch.int64), v[1:2]),
        "cat in the place": lambda: torch.cat([v[:1], h[1:]], 0),
        "slice_scatter in the place": lambda: torch.slice_scatter(h, v[:1], 0, 0, 1),
    }[how]()


def dead(m: StepModules, how: str, h: Any) -> None:
    """What nothing uses."""
    if how == "sum":
        h + m.up(m.norm(h))
    elif how == "read":
        m.norm(h)
    elif how == "reduction":
        h.square().mean().sqrt()
    else:
        m.down(m.norm_2(h + torch.tanh(m.up(m.norm(h)))))


def injected(m: StepModules, x: Any, like: Any) -> Any:
    return m.embed(x).reshape(-1, WIDTH).mean(0) * torch.ones_like(like)


def coefficient(how: str) -> float:
    """What a way of adding multiplies the branch by."""
    return {"alpha": 0.5, "sub": -1.0}.get(how, 1.0)


def example() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).double()
