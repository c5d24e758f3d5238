"""Which of the streams found are rewritten."""

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import AlreadyConvertedError, NoStreamError, NotAdditiveError, StreamError, StreamWidthError
from attnres_fx.passes.streams.stream import Stream, StreamSet


def select_streams(streams: StreamSet, config: AttnResConfig, name: str) -> tuple[Stream, ...]:
    """The streams that a config asks for.

    Args:
        streams: What was found in a graph.
        config: Its `streams` says which; under `"main"` and `"all"` a refusal may stop the conversion.
        name: How the errors call the model.

    Raises:
        NotAdditiveError: A stream is carried by something that is no sum.
        AlreadyConvertedError: The model reads its depth already.
        StreamWidthError: There is a stream, and its features are in no one dimension of fixed size, or of another size
            further on.
        StreamNameError: There is no stream of a name that the config gives.
        NoStreamError: There is no stream at all.
    """
    for refusal in streams.refusals:
        if refusal.stops_conversion and config.streams in ("main", "all"):
            kind = _ERRORS[refusal.kind]
            raise kind(f"{name}: at {refusal.place}, {refusal.reason}. {refusal.advice}")
    selected = streams.select(config.streams)
    if selected:
        return selected
    if wide := [r for r in streams.refusals if r.kind == "width"]:
        why = "; ".join(f"the stream from {r.place} is left alone: {r.reason}" for r in wide)
        raise StreamWidthError(f"{name} has no residual stream that can be converted: {why}.")
    raise NoStreamError(_no_stream_message(streams, name))


_ERRORS: dict[str, type[StreamError]] = {
    "not additive": NotAdditiveError,
    "width": StreamWidthError,
    "depth": AlreadyConvertedError,
}


def _no_stream_message(streams: StreamSet, name: str) -> str:
    why = "; ".join(f"{r.place}: {r.reason}" for r in streams.refusals)
    return (
        f"{name} has no residual stream: no addition x + f(x) was found in which f does more than elementwise "
        f"work on x." + (f" What came near: {why}." if why else "") + " See attnres_fx.inspect(model, args, kwargs)."
    )
