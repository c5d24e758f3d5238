"""The weights of attention over depth in a model, read by read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from attnres_fx.backend.attachment import is_attached, unwrapped
from attnres_fx.backend.converted_form import converted_form
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.errors import AttachError
from attnres_fx.ops import depth_weights as weights_of
from attnres_fx.shown import WIDTH, brief, table

_SHADES = " ░▒▓█"
#: How wide the map may be where a cell is one shade and no number, beside the names of the reads.
_STRIP = 60


@dataclass(frozen=True)
class ReadWeights:
    """Attention over depth of one read.

    Attributes:
        name: Of the read.
        stream: The residual stream it belongs to.
        sources: What each weight is on, oldest first: `v_0` (the root), `v_i` (sublayer i), `b_n` (block n),
            `b_n[:i]` (its first i sublayers), `c_n` (what block n receives).
        weights: [S], averaged over tokens, or [S, ...] per token; they sum to one over S.
    """

    name: str
    stream: str
    sources: tuple[str, ...]
    weights: Tensor

    def mean(self) -> list[float]:
        """[S]: the weights, averaged over tokens."""
        weights = self.weights
        return (weights.flatten(1).mean(1) if weights.dim() > 1 else weights).tolist()

    def __repr__(self) -> str:
        shown = ", ".join(f"{s} {w:.2f}" for s, w in zip(self.sources, self.mean(), strict=True))
        return brief(f"ReadWeights({self.name!r}, [{', '.join(map(str, self.weights.shape))}]: {shown})", length=1_000)


@dataclass(frozen=True)
class DepthWeights:
    """Attention over depth of every read; `print` it for a small heat map.

    Args:
        reads: In execution order; `weights["name"]` is the one of that name.
    """

    reads: tuple[ReadWeights, ...]

    def __iter__(self) -> Iterator[ReadWeights]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, name: str) -> ReadWeights:
        return next(r for r in self.reads if r.name == name)

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source that some read sees, in the order in which they are first seen."""
        return tuple(dict.fromkeys(column(s) for r in self.reads for s in r.sources))

    def __str__(self) -> str:
        columns = self.sources
        cells = {r.name: dict(zip(map(column, r.sources), r.mean(), strict=True)) for r in self.reads}
        name = max((len(n) for n in cells), default=0)
        if name + 9 * len(columns) <= WIDTH:
            rows = [{"read": n, **{c: _cell(found.get(c)) for c in columns}} for n, found in cells.items()]
            return table(rows)
        each = -(-len(columns) // _STRIP)
        several = "one shade a source" if each == 1 else f"one shade for {each} sources"
        header = f"{columns[0]} … {columns[-1]}, {several}"
        rows = [{"read": n, header: _strip(found, columns, each)} for n, found in cells.items()]
        return table(rows)

    def __repr__(self) -> str:
        return brief(str(self), 'see .reads, or ["name"]')


def column(source: str) -> str:
    """The column of a source in the heat map: a partial sum shares that of its block."""
    return source.split("[")[0]


def _strip(cells: Mapping[str, float], columns: Sequence[str], each: int) -> str:
    """The weights as shades side by side, those of `each` sources added; a dot where none is seen."""
    groups = [[cells[c] for c in columns[i : i + each] if c in cells] for i in range(0, len(columns), each)]
    return "".join(_shade(sum(g)) if g else "." for g in groups)


def _shade(weight: float) -> str:
    return _SHADES[min(int(weight * len(_SHADES)), len(_SHADES) - 1)]


def _cell(weight: float | None) -> str:
    if weight is None:
        return ""
    return f"{_shade(weight) * 2} {weight:.2f}"


def depth_weights(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    per_token: bool = False,
) -> DepthWeights:
    """Run a model once, without gradients, and return the weights of every read.

    Source: arXiv 2603.15031, section 5.3 (the learned weights it plots).

    Args:
        model: A converted model, or an attached one (compiled or not), which is captured to look into it. It runs in
            its current mode.
        args: Positional arguments, as for calling it.
        kwargs: Keyword arguments.
        per_token: Keep weights [S, ...] for every token instead of their average [S].

    Returns:
        The weights by read, in execution order; float32, or float64 for float64 sources.

    Raises:
        AttachError: The model is neither converted nor attached.
    """
    converted = _with_graph(model, args, kwargs)
    gm = converted.graph_module()
    replacements = {r.node: r for r in converted.replacements()}
    recorder = _Recorder(gm, replacements, per_token)
    with torch.no_grad():
        recorder.run(*converted.flatten_arguments(*args, **(kwargs or {})))
    return DepthWeights(tuple(recorder.weights))


def _with_graph(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> ConvertedModel:
    if isinstance(model, ConvertedModel):
        return model
    if not is_attached(unwrapped(model)):
        raise AttachError(
            f"depth_weights takes a converted or an attached model, and {type(model).__name__} is neither: call "
            f"attnres_fx.convert(model, args, kwargs) first, and train what it returns."
        )
    return converted_form(model, args, kwargs)


class _Recorder(Interpreter):
    """Runs a graph and records the weights of its reads."""

    def __init__(self, gm: torch.fx.GraphModule, replacements: Mapping[str, Any], per_token: bool) -> None:
        super().__init__(gm)
        self.replacements = replacements
        self.per_token = per_token
        self.weights: list[ReadWeights] = []

    def run_node(self, n: Node) -> Any:
        replacement = self.replacements.get(n.name)
        if replacement is not None:
            sources, query, key_weight, eps, _ = self.fetch_args_kwargs_from_env(n)[0]
            weights = weights_of(sources, query, key_weight, eps=eps)
            if not self.per_token:
                weights = weights.flatten(1).mean(1)
            labels = tuple(label for label, _ in replacement.sources)
            self.weights.append(ReadWeights(replacement.read, replacement.stream, labels, weights))
        return super().run_node(n)
