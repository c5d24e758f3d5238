"""Which of the streams found are rewritten."""

from attnres_fx.config import RewriteConfig
from attnres_fx.errors import AlreadyConvertedError, NoStreamError, NotAdditiveError, StreamError, StreamWidthError
from attnres_fx.passes.streams.remarks import remarks
from attnres_fx.passes.streams.stream import Stream, StreamSet


def select_streams(streams: StreamSet, config: RewriteConfig, name: str) -> tuple[Stream, ...]:
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
    why = "; ".join(remarks(streams.refusals))
    if any(r.kind == "width" for r in streams.refusals):
        raise StreamWidthError(f"{name} has no residual stream that can be converted: {why}.")
    raise NoStreamError(_no_stream_message(streams, why, name))


def why_left(stream: Stream, config: RewriteConfig) -> str:
    """Why a stream is not among those that a config asks for."""
    if stream.nested_in is not None and config.streams == "main":
        return f"inside a sublayer of {stream.nested_in!r}; streams='all' converts it too"
    if stream.around is not None and config.streams == "main":
        return f"a skip around {stream.around!r}, which holds the sublayers; streams='all' converts it too"
    return f"not named in streams={config.streams!r}"


_ERRORS: dict[str, type[StreamError]] = {
    "not additive": NotAdditiveError,
    "width": StreamWidthError,
    "depth": AlreadyConvertedError,
}


def _no_stream_message(streams: StreamSet, why: str, name: str) -> str:
    """What is true of a model without a stream: one that is refused is an addition x + f(x) as well."""
    if streams.streams:
        names = ", ".join(repr(s.name) for s in streams.streams)
        said = f"has no main residual stream; streams='all' converts {names}"
    elif why:
        said = f"has no residual stream that can be converted: {why}"
    else:
        said = "has no residual stream: no addition x + f(x) was found in which f does more than elementwise work on x"
    return f"{name} {said}."
