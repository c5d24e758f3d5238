"""Random post-norm programs (`x = norm(x + f(x))`), as plain modules and by definition (design section 4)."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.brute_force import Setting, depth_attention, read_parameters
from tests.support.plain_programs import StepModules

BRANCHES = ("mlp", "mixed", "adapter", "drop path", "bfloat16")
ADDS = ("x + f", "f + x", "x - f", "lerp")
POSITIONS = ("", "learned", "computed")
BESIDE = ("", "head", "late head", "dead sum", "dead read")


@dataclass(frozen=True)
class Layer:
    """One layer: what it writes, how that is added, whether positions are added for its queries, what stands beside."""

    branch: str
    add: str
    positions: str = ""
    beside: str = ""


@st.composite
def post_norm_programs(draw: Any) -> tuple[Layer, ...]:
    """Layers of a post-norm program."""
    ways = (BRANCHES, ADDS, POSITIONS, BESIDE)
    return tuple(Layer(*(draw(st.sampled_from(w)) for w in ways)) for _ in range(draw(st.integers(2, 5))))


class PostNormProgram(nn.Module):
    """A post-norm program executed straightforwardly. x: [batch, tokens, WIDTH]."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        super().__init__()
        self.layers = layers
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.ends = StepModules()
            for i in range(len(layers)):
                self.add_module(f"s{i}", StepModules())
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.6)
            self.double().eval()

    def forward(self, x: Any) -> Any:
        outputs, late = [], []
        h, positions = self.ends.embed(x), self.ends.embed_2(x)
        for i, layer in enumerate(self.layers):
            m = getattr(self, f"s{i}")
            if layer.beside == "late head":
                late.append((m, h))
            elif layer.beside == "head":
                outputs.append(m.embed(h))
            elif layer.beside == "dead sum":
                h + m.embed(h)
            elif layer.beside == "dead read":
                m.norm_2(h)
            f = written(m, layer, h, positions)
            h = m.norm(
                {
                    "x + f": lambda h=h, f=f: h + f,
                    "f + x": lambda h=h, f=f: f + h,
                    "x - f": lambda h=h, f=f: h - f,
                    "lerp": lambda h=h, f=f: torch.lerp(h, h + 2 * f, 0.5),
                }[layer.add]()
            )
        return (*outputs, self.ends.up(h), *(m.embed(h) for m, h in late))


def written(m: StepModules, layer: Layer, h: Any, positions: Any) -> Any:
    """What a layer writes, from the normed state before it."""
    q = h + {"": 0.0, "learned": m.carry, "computed": positions}[layer.positions] if layer.positions else h
    y = m.down(torch.tanh(m.up(q)))
    if layer.branch == "mixed":
        return y * torch.sigmoid(m.other(h))
    if layer.branch == "adapter":
        return y + m.other(torch.tanh(y))
    if layer.branch == "drop path":
        return y * (torch.rand_like(y[..., :1]) > 0.3) / 0.7
    return y.to(torch.bfloat16) if layer.branch == "bfloat16" else y


def gate_of(i: int) -> float:
    """The gate of the read of layer i, where it has one."""
    return 0.3 + 0.1 * i


def post_norm_definition(program: PostNormProgram, setting: Setting, x: Tensor) -> tuple[Tensor, ...]:
    """The program with every norm reading over depth: `v_0, f_1 … f_l`, their blocks, or those of a local block.

    In mode `"sum"` it reads `r + g (read - r)`; where the sources add up to r there is no gate, but a gain.
    """
    outputs, late = [], []
    h, positions = program.ends.embed(x), program.ends.embed_2(x)
    starts = setting.starts(len(program.layers))
    groups: dict[int, Tensor] = {-1: h}
    for i, layer in enumerate(program.layers):
        m = getattr(program, f"s{i}")
        if layer.beside == "late head":
            late.append((m, h))
        elif layer.beside == "head":
            outputs.append(m.embed(h))
        if setting.variant == "local" and i in starts:
            groups = {-1: h}
        f = written(m, layer, h, positions) * (-1 if layer.add == "x - f" else 1)
        if layer.add == "lerp":
            f = 0.5 * (2 * f)
        block = sum(start <= i for start in starts) if setting.variant == "block" else i
        groups[block] = groups[block].double() + f if block in groups else f
        h = m.norm(_read(f"s{i}.norm", i, list(groups.values()), h + f, setting, first=i == _begin(setting, starts, i)))
    return (*outputs, program.ends.up(h), *(m.embed(h) for m, h in late))


def _begin(setting: Setting, starts: list[int], i: int) -> int:
    """The layer that begins what a read of layer i sees."""
    return max(s for s in starts if s <= i) if setting.variant == "local" else 0


def _read(name: str, i: int, sources: list[Tensor], r: Tensor, setting: Setting, first: bool) -> Tensor:
    query, key_weight = read_parameters(name)
    if setting.output == "mean" or first:
        return depth_attention(sources, query, key_weight, 1.0 if setting.output == "mean" else len(sources))
    return r + gate_of(i) * (depth_attention(sources, query, key_weight, 1.0) - r)
