"""`inspect`: the residual streams of a model, and what `convert` would do with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from attnres_fx.capture.capture import capture
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.module_clone import uncompiled
from attnres_fx.config import RewriteConfig
from attnres_fx.conversion.report import StreamReport
from attnres_fx.conversion.source_model import Model, checked_config, model_name, refuse_converted
from attnres_fx.errors import ScheduleError, StreamError
from attnres_fx.passes import Stream, StreamSet, analyze_, topology_of
from attnres_fx.passes.streams.selection import select_streams, why_left


def inspect(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: RewriteConfig | None = None,
    dynamic_shapes: Any = None,
) -> StreamReport:
    """Find the residual streams of a model, and what `convert` would do with them; the model is left as it is.

    Args:
        model: An `nn.Module`, a `GraphModule` or an `ExportedProgram`.
        args: Example arguments.
        kwargs: Example keyword arguments.
        config: What `convert` would get; `AttnResConfig()` by default.
        dynamic_shapes: As `torch.export.export` takes them; by default batch and sequence are free.

    Returns:
        A report: print it, or look at `.streams`, `.converted`, `.left`, `.refusals` and `.error`.

    Raises:
        AlreadyConvertedError: The model reads through depth attention already.
        CaptureError: The model cannot be traced.
    """
    model = uncompiled(model)
    config = checked_config(config)
    refuse_converted(model)
    mode: Mode = "train" if getattr(model, "training", False) else "eval"
    captured = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes, modes=(mode,))
    found = analyze_(next(iter(captured.graphs.values())).gm)
    return _stream_report(found, config, model_name(model), tuple(captured.notes))


def _stream_report(found: StreamSet, config: RewriteConfig, name: str, notes: tuple[str, ...]) -> StreamReport:
    """What a conversion would do, found out by doing it as far as the plan."""
    error = ""
    selected: tuple[Stream, ...] = ()
    try:
        selected = select_streams(found, config, name)
        topology_of(config).plan(found, selected, config)
    except (StreamError, ScheduleError) as raised:
        error, selected = f"{type(raised).__name__}: {raised}", ()
    done = tuple(s.name for s in selected)
    left = () if error else tuple((s, why_left(s, config)) for s in found.streams if s.name not in done)
    return StreamReport(name, found.streams, found.refusals, notes, config, done, left, error)
