"""Small residual models, their streams as a few lines of text, and the checks every trap must pass."""

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

import attnres_fx as ax
from attnres_fx.passes import analyze_
from attnres_fx.passes.normalize.normalization import propagate_values_

WIDTH = 8
VARIANTS = {
    "full": ax.AttnResConfig(variant="full"),
    "block": ax.AttnResConfig(variant="block", num_blocks=2),
    "local": ax.AttnResConfig(variant="local", num_blocks=2),
}
SPELLINGS = ("symbolic", "export", "dynamo")
#: The streams of a pre-norm model of one attention and one MLP.
TWO_LAYERS = """
    stream stream from embed
      1: attn_1
      2: mlp_1
      norm_2 reads 1
      norm_f reads 2
"""


class Toy(nn.Module):
    """Modules enough for any small residual model; `program(model, *inputs)` says how they are used."""

    def __init__(self, program: Callable[..., Any], width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.program = program
        self.embed = nn.Embedding(11, width)
        self.positions = nn.Embedding(16, width)
        for i in (1, 2, 3, 4):
            self.add_module(f"norm_{i}", nn.LayerNorm(width))
            self.add_module(f"attn_{i}", nn.Linear(width, width))
            self.add_module(f"mlp_{i}", nn.Linear(width, width))
        self.norm_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)
        self.carry = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.eval()

    def forward(self, *inputs: Any) -> Any:
        return self.program(self, *inputs)


class ToyOfOne(Toy):
    """A toy whose forward has one named argument, as `symbolic_trace` wants it."""

    def forward(self, x: Any) -> Any:
        return self.program(self, x)


class ToyOfTwo(Toy):
    def forward(self, x: Any, y: Any) -> Any:
        return self.program(self, x, y)


def toy(program: Callable[..., Any], count: int = 1, width: int = WIDTH) -> Toy:
    return (ToyOfOne if count == 1 else ToyOfTwo)(program, width)


def tokens() -> Tensor:
    return torch.arange(10).reshape(2, 5) % 11


def rows(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- streams as text ---------------------------------------------------------------------------------


def stream_text(streams: Sequence[Any], gm: GraphModule) -> str:
    nodes = {n.name: n for n in gm.graph.nodes}
    return "\n".join(_one_stream(s, nodes) for s in streams) or "no stream"


def _one_stream(stream: Any, nodes: dict[str, Node]) -> str:
    kind = ", post-norm" if stream.post_norm else ""
    nested = f", nested in {stream.nested_in}" if stream.nested_in else ""
    lines = [f"stream {stream.name} from {_label(stream.root, nodes)}{kind}{nested}"]
    for i in range(stream.num_sublayers):
        written = [_label(t, nodes) for t in stream.terms if t.sublayer == i]
        lines.append(f"  {i + 1}: {' + '.join(written)}")
    labels = {t.written_by: _label(t, nodes) for t in stream.terms}
    for read in stream.depth_reads:
        extras = "".join(f" and {labels[e]}" for e in read.extras)
        lines.append(f"  {read.name} reads {read.position}{extras}")
    return "\n".join(lines)


def _label(term: Any, nodes: dict[str, Node]) -> str:
    """The module that made a term, or the operation that did where no module of its own did."""
    node = nodes[term.node]
    if node.op == "placeholder":
        return "input"
    if term.module:
        return str(term.module)
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return str(getattr(target, "__name__", target)).removeprefix("i" if target in _IN_PLACE else "").rstrip("_")


_IN_PLACE = (operator.iadd, operator.isub, operator.imul)


def captured(model: nn.Module, args: Sequence[Any], spelling: str) -> GraphModule:
    """A graph of a model in one of the three spellings, with values on its nodes."""
    if spelling == "symbolic":
        gm = torch.fx.symbolic_trace(model)
        propagate_values_(gm, tuple(args))
        return gm
    if spelling == "export":
        gm = torch.export.export(model, tuple(args), strict=False).module(check_guards=False)
        assert isinstance(gm, GraphModule)
        return gm
    return dynamo_graph(model, args)


def dynamo_graph(model: nn.Module, args: Sequence[Any]) -> GraphModule:
    kept: list[GraphModule] = []

    def backend(gm: GraphModule, _: list[Any]) -> Any:
        kept.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*_cloned(args))
    assert len(kept) == 1
    return kept[0]


def found_text(model: nn.Module, args: Sequence[Any], spelling: str) -> str:
    gm = copy.deepcopy(captured(model, args, spelling))
    return stream_text(analyze_(gm).streams, gm)


# --- checks ------------------------------------------------------------------------------------------


def check_trap(
    program: Callable[..., Any],
    args: Sequence[Any],
    expected: str,
    *,
    spellings: Sequence[str] = SPELLINGS,
    tolerance: float = 1e-5,
    gradients: bool = True,
    model: nn.Module | None = None,
    streams: str | Sequence[str] = "main",
) -> None:
    """Streams as expected in every spelling, and the function preserved at zero queries in every variant."""
    model = model if model is not None else toy(program, len(args))
    wanted = dedented(expected)
    for spelling in spellings:
        assert found_text(model, args, spelling) == wanted, spelling
    if wanted == "no stream":
        return
    for name, config in VARIANTS.items():
        config = _with_streams(config, streams)
        if "symbolic" in spellings:
            gm = torch.fx.symbolic_trace(model)
            converted = ax.convert(gm, args, config=config, check=False)
        else:
            converted = ax.convert(model, args, config=config, check=False)
        check_preserved(model, converted, args, tolerance=tolerance, gradients=gradients, where=name)
    if "export" in spellings and "symbolic" in spellings:
        converted = ax.convert(model, args, config=_with_streams(VARIANTS["block"], streams), check=False)
        check_preserved(model, converted, args, tolerance=tolerance, gradients=gradients, where="export")


def _with_streams(config: ax.AttnResConfig, streams: str | Sequence[str]) -> ax.AttnResConfig:
    import dataclasses

    return dataclasses.replace(config, streams=streams)


def check_preserved(
    model: nn.Module,
    converted: nn.Module,
    args: Sequence[Any],
    *,
    tolerance: float = 1e-5,
    gradients: bool = True,
    where: str = "",
) -> None:
    """Same outputs, same gradients of the model's own parameters, and every new parameter alive.

    Where the model itself cannot run backward (it writes over what autograd kept), only outputs compare.
    """
    try:
        expected, expected_gradients = _outputs_and_gradients(model, model, args, gradients)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        expected, expected_gradients = _outputs_and_gradients(model, model, args, False)
    actual, actual_gradients = _outputs_and_gradients(converted, model, args, gradients)
    assert len(expected) == len(actual), where
    for left, right in zip(expected, actual, strict=True):
        assert_near(right, left, tolerance, where)
    scale = max((g.abs().max().item() for g in expected_gradients.values()), default=0.0)
    for name, gradient in expected_gradients.items():
        difference = (actual_gradients[name] - gradient).abs().max().item()
        assert difference <= 10 * tolerance * scale, f"{where}: gradient of {name} differs by {difference:.3g}"
    if not gradients:
        return
    for read in converted.attnres.reads:  # type: ignore[union-attr]
        learned = read.query if read.gate is None else read.gate
        assert learned.grad is not None and learned.grad.abs().max() > 0, f"{where}: {read.name} reaches no output"


def _outputs_and_gradients(
    run: nn.Module, owner: nn.Module, args: Sequence[Any], gradients: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    run.zero_grad()
    owner.zero_grad()
    with torch.set_grad_enabled(gradients):
        found = pytree.tree_leaves(run(*_cloned(args)))
    leaves = [leaf for leaf in found if isinstance(leaf, Tensor)]
    if not gradients:
        return leaves, {}
    total = torch.zeros((), dtype=torch.float64)
    for i, leaf in enumerate(leaves):
        if leaf.requires_grad:
            weights = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(i))
            total = total + (leaf.double() * weights).sum()
    total.backward()
    missing = torch.zeros(())
    return [leaf.detach() for leaf in leaves], {
        n: (p.grad if p.grad is not None else missing).clone() for n, p in owner.named_parameters()
    }


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, where: str = "") -> None:
    assert actual.dtype == expected.dtype, f"{where}: {actual.dtype}, expected {expected.dtype}"
    if expected.dim():
        assert actual.shape == expected.shape, f"{where}: {actual.shape}, expected {expected.shape}"
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), 1e-6)
    assert difference <= tolerance * scale, f"{where}: differs by {difference:.3g} of {scale:.3g}"


def _cloned(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def dedented(text: str) -> str:
    import textwrap

    return textwrap.dedent(text).strip("\n").rstrip()
