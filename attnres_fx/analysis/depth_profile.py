"""`profile_depth`: how a model uses its depth, before anything is converted and after."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnres_fx.analysis.figures import PAGE, saved
from attnres_fx.analysis.graph_of_call import graph_of_call, with_reads
from attnres_fx.analysis.profile_data import ReadProfile, StreamProfile, SublayerProfile
from attnres_fx.analysis.profile_figure import draw_profile
from attnres_fx.analysis.profile_places import Places, places_of_reads
from attnres_fx.analysis.profile_run import Measurements, measure
from attnres_fx.analysis.profile_text import profile_html, profile_text, reads_table
from attnres_fx.analysis.sum_graph import ProfiledGraph, require_agreement, sum_graph
from attnres_fx.backend.attachment import is_attached, unwrapped
from attnres_fx.capture.isolated_run import fast_path_off, seeded
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.source_model import model_name
from attnres_fx.errors import ArgumentError
from attnres_fx.shown import brief

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: From what a model returns to what is differentiated.
Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class DepthProfile:
    """How a model uses its depth: `print` it for tables and a verdict, `plot` it for a figure.

    Args:
        model: Name of the model's class.
        converted: Whether its reads are attention over depth, not plain sums.
        streams: Its residual streams.
        loss: The loss that gradients are of; None without one.
    """

    model: str
    converted: bool
    streams: tuple[StreamProfile, ...]
    loss: float | None = None

    def __getitem__(self, stream: str) -> StreamProfile:
        return next(s for s in self.streams if s.name == stream)

    @property
    def dilutes(self) -> bool | None:
        """Whether some stream has less of the first half of its sublayers than of the second in its last state."""
        known = [s.dilutes for s in self.streams if s.dilutes is not None]
        return any(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data.

        Returns:
            `model`, `converted`, `loss`, `dilutes` and `streams`, each with its root, sublayers and reads.
        """
        streams = [s.to_dict() for s in self.streams]
        about = {"model": self.model, "converted": self.converted, "loss": self.loss, "dilutes": self.dilutes}
        return {**about, "streams": streams}

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def plot(self, path: str | Path | None = None, *, width: float = PAGE) -> "Figure":
        """Draw magnitudes, shares, gradients and reach by depth.

        Args:
            path: Of a file to write; its suffix chooses one of matplotlib's formats.
            width: Inches.

        Returns:
            The figure.

        Raises:
            MissingPackageError: matplotlib is not installed.
            ArgumentError: The file cannot be written.
        """
        return saved(draw_profile(self.streams, width), path)

    def reads_table(self) -> str:
        """One line a read: its name, the sublayers before it, its state, and what that is mostly made of.

        Returns:
            A table to print.
        """
        return reads_table(self.streams)

    def __str__(self) -> str:
        return profile_text(self._head, self.streams)

    def __repr__(self) -> str:
        return brief(str(self), "see .streams")

    def _repr_html_(self) -> str:
        return profile_html(self._head, self.streams)

    @property
    def _head(self) -> str:
        kind = "reads are attention over depth" if self.converted else "reads are plain sums"
        loss = "no loss was given, so no gradients" if self.loss is None else f"loss {self.loss:.4g}"
        return f"{self.model}: {kind}; {loss}"


def profile_depth(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss | None = None,
) -> DepthProfile:
    """Measure how a model uses its depth, in one run: is what its early layers write still there at the end?

    The model runs in its current mode on a clone: gradients, buffers and the random state stay as they are. Every
    token counts, padding too.

    Args:
        model: An original, whose streams are those that `inspect` finds and `convert` would take; or a converted or
            attached model.
        args: Positional arguments of a call.
        kwargs: Keyword arguments.
        loss: From what the model returns to a scalar; by default the `loss` that it returns (as Hugging Face models
            do when they get labels), or itself where it is a scalar. Without one there are no gradients.

    Returns:
        Magnitude of the state by depth, share of each sublayer in the last state, gradient norm of each sublayer,
        entropy and reach of each read.

    Raises:
        ArgumentError: `loss` returns no scalar that depends on the model, or tensors have no values (meta).
        AlreadyConvertedError: The model reads through depth attention, and was not made by this library's `convert`.
        CaptureError: The model cannot be traced.
        StreamError: It has no residual stream that can be profiled.
        CheckError: The captured graph does not compute what the model computes.
    """
    _require_values(model, args, kwargs, loss)
    inner = unwrapped(model)
    attends = isinstance(inner, ConvertedModel) or is_attached(inner)
    if attends:
        call = graph_of_call(with_reads(inner, args, kwargs, "profile_depth"), args, kwargs)
        graph = ProfiledGraph(call.gm, call.inputs, call.program.out_spec, places_of_reads(call), {})
        name = call.converted.report.model
    else:
        graph, name = sum_graph(inner, args, kwargs), model_name(inner)
    places = graph.places
    for parameter in graph.gm.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # a frozen model has gradients at its sublayers too
    devices = list({p.device for p in graph.gm.parameters()})
    with seeded(devices), torch.enable_grad(), fast_path_off():
        found = measure(graph.gm, graph.inputs, places)
        outputs = _structured(found.outputs, graph.out_spec)
        if not attends:
            require_agreement(inner, outputs, args, graph.kwargs)
        value = _loss_of(outputs, loss)
        gradients = {} if value is None else _gradients(value, found)
    streams = tuple(_stream(s, places, found, gradients) for s in places.streams)
    return DepthProfile(name, attends, streams, None if value is None else float(value.detach()))


def _require_values(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, loss: Any) -> None:
    if loss is not None and not callable(loss):
        raise ArgumentError(f"loss must be a function of what the model returns; it is a {type(loss).__name__}.")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"profile_depth takes an nn.Module; it got a {type(model).__name__}.")
    given = pytree.tree_leaves((tuple(args), dict(kwargs or {})))
    if any(t.is_meta for t in (*model.parameters(), *(x for x in given if isinstance(x, Tensor)))):
        raise ArgumentError("a profile is made of values, and this model or its arguments are on the meta device.")


def _structured(outputs: Any, out_spec: Any) -> Any:
    return outputs if out_spec is None else pytree.tree_unflatten(outputs[: out_spec.num_leaves], out_spec)


def _loss_of(outputs: Any, loss: Loss | None) -> Tensor | None:
    if loss is not None:
        value: Any = loss(outputs)
    elif isinstance(outputs, Mapping):
        value = outputs.get("loss")
    else:
        value = getattr(outputs, "loss", outputs)
    scalar = isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad
    if loss is not None and not scalar:
        what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ArgumentError(f"loss must return a scalar tensor that depends on the model; it returned {what}.")
    return value if scalar else None


def _gradients(loss: Tensor, found: Measurements) -> dict[tuple[str, int], float]:
    """The norm of the gradient of each sublayer's output: of its terms, which are only added, that of the largest."""
    pairs = [(key, t) for key, terms in found.written.items() for t in terms if t.requires_grad]
    grads = torch.autograd.grad(loss, [t for _, t in pairs], allow_unused=True)
    norms: dict[tuple[str, int], float] = {}
    for (key, _), grad in zip(pairs, grads, strict=True):
        norm = 0.0 if grad is None else float(torch.linalg.vector_norm(grad.float()))
        norms[key] = max(norm, norms.get(key, 0.0))
    return norms


def _stream(
    name: str, places: Places, found: Measurements, gradients: Mapping[tuple[str, int], float]
) -> StreamProfile:
    writes = [
        SublayerProfile(
            w.index,
            w.name,
            found.magnitudes.get((name, w.index)),
            gradients.get((name, w.index)),
            found.shares.get((name, w.index)),
        )
        for w in places.writes
        if w.stream == name
    ]
    reads = [_read(p, found) for p in places.reads if p.plan.stream == name]
    last = places.last_read(name)
    shares = () if last is None else tuple(zip(last.plan.sources, found.reads[last.plan.read].shares, strict=True))
    return StreamProfile(name, writes[0], tuple(writes[1:]), tuple(reads), shares)


def _read(place: Any, found: Measurements) -> ReadProfile:
    measured, plan, back = found.reads[place.plan.read], place.plan, place.back
    even = sum(back) / len(back)
    if not (place.summed or place.attends):
        return ReadProfile(plan.read, plan.position, measured.magnitude, plan.sources, (), None, None, even)
    mixture = tuple(measured.mixture.mean(1).tolist())
    entropy = float(torch.special.entr(measured.mixture).sum(0).mean())
    reach = sum(m * b for m, b in zip(mixture, back, strict=True))
    return ReadProfile(plan.read, plan.position, measured.magnitude, plan.sources, mixture, entropy, reach, even)
