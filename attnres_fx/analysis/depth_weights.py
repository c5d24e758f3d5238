"""The weights of attention over depth in a model, read by read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Interpreter, Node

from attnres_fx.analysis.figures import PAGE, saved
from attnres_fx.analysis.graph_of_call import GraphOfCall, graph_of_call, with_reads
from attnres_fx.analysis.read_weights import ReadWeights, column
from attnres_fx.analysis.text_map import text_map
from attnres_fx.analysis.weights_figure import Scale, draw_weights
from attnres_fx.analysis.weights_html import weights_html
from attnres_fx.analysis.written_back import written_back
from attnres_fx.capture.isolated_run import seeded
from attnres_fx.ops.general import read_from_arguments
from attnres_fx.shown import brief

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class DepthWeights:
    """Attention over depth of every read; `print` it for a small heat map, `plot` it for a figure.

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

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON.

        Returns:
            `{"reads": [...]}`, one entry a read, as `ReadWeights.to_dict` says.
        """
        return {"reads": [r.to_dict() for r in self.reads]}

    def plot(self, path: str | Path | None = None, *, scale: Scale = "row", width: float = PAGE) -> "Figure":
        """Draw a heat map, and beside it how far each read looks.

        Args:
            path: Of a file to write; its suffix chooses one of matplotlib's formats.
            scale: What a colour is: `"row"`, the weight over the largest of the read; `"log"`, the weight on a
                logarithmic scale; `"linear"`, the weight from 0 to 1.
            width: Inches; labels stay 7 points.

        Returns:
            The figure. Lines are drawn between layers where they have room; a mark is on each long jump: where a read
            weighs most what is further back than it would look with all weights alike.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: There is no such scale, or the file cannot be written.
        """
        return saved(draw_weights(self.reads, scale=scale, width=width), path)

    def __str__(self) -> str:
        return text_map(self.reads)

    def __repr__(self) -> str:
        return brief(str(self), 'see .reads, or ["name"]')

    def _repr_html_(self) -> str:
        return weights_html(self.reads)


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
            its current mode, on a clone: its buffers and the random state stay as they are.
        args: Positional arguments, as for calling it.
        kwargs: Keyword arguments.
        per_token: Keep weights [S, ...] for every token, with heads [S, ..., H], instead of their average [S].

    Returns:
        The weights by read, in execution order; float32, or float64 for float64 sources. Sigmoid weights are divided
        by their sum over the sources.

    Raises:
        AttachError: The model is neither converted nor attached.
        ArgumentError: The call fits no program, and cannot be captured.
    """
    call = graph_of_call(with_reads(model, args, kwargs, "depth_weights"), args, kwargs)
    recorder = _Recorder(call, per_token)
    with torch.no_grad(), seeded(call.devices):
        recorder.run(*call.inputs)
    return DepthWeights(tuple(recorder.weights))


class _Recorder(Interpreter):
    """Runs a graph and records the weights of its reads."""

    def __init__(self, call: GraphOfCall, per_token: bool) -> None:
        super().__init__(call.gm)
        self.replacements = {r.node: r for r in call.program.replacements}
        self.schedules = {s.stream.name: s.schedule for s in call.converted.report.streams}
        self.per_token = per_token
        self.weights: list[ReadWeights] = []

    def run_node(self, n: Node) -> Any:
        replacement = self.replacements.get(n.name)
        if replacement is not None:
            sources, *arguments = self.fetch_args_kwargs_from_env(n)[0]
            read, _ = read_from_arguments(*arguments)
            weights = read.weights(sources)
            weights = weights / weights.sum(0)  # of sigmoids; softmax weights add up to one already
            if not self.per_token:
                weights = weights.flatten(1).mean(1)
            elif read.form.heads == 1:
                weights = weights.squeeze(-1)
            plan = replacement.plan
            back = written_back(plan, self.schedules[plan.stream])
            self.weights.append(ReadWeights(plan.read, plan.stream, plan.sources, weights, back))
        return super().run_node(n)
