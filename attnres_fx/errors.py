"""What the library raises.

Every error says what was wrong with which node or argument, what was expected, and which option or
call to change. All of them derive from `AttnResError`, so one `except` catches the library.
"""


class AttnResError(Exception):
    """Base of everything attnres_fx raises on purpose."""


class ConfigError(AttnResError, ValueError):
    """An option of `AttnResConfig`, or a combination of options, that is not allowed."""


class ScheduleError(ConfigError):
    """Blocks that do not fit the number of sublayers the model has."""


class OperatorError(AttnResError, ValueError):
    """`depth_attention` was given sources, a query or a gain it is not defined for."""


class CaptureError(AttnResError, RuntimeError):
    """The model could not be traced, in any of the ways that were tried."""


class ExampleError(CaptureError):
    """The model itself fails on the arguments that its conversion was to be compared with."""


class ModeError(AttnResError, RuntimeError):
    """A mode (train or eval) was asked for that has no captured graph."""


class StreamError(AttnResError, ValueError):
    """Something about the residual streams of a model stops the conversion."""


class NoStreamError(StreamError):
    """No residual stream was found."""


class StreamNameError(StreamError):
    """A stream was named that the model does not have."""


class NotAdditiveError(StreamError):
    """A stream is carried by something other than addition: hyper-connections, gated carries."""


class StreamWidthError(StreamError):
    """The features of a stream are in no one dimension of fixed size, or of another size further on."""


class AlreadyConvertedError(StreamError):
    """The model already reads its streams through depth attention."""


class AttachError(AttnResError, RuntimeError):
    """A model is attached already, is not, or no longer is what it was when it was attached."""


class EagerCallError(AttnResError, RuntimeError):
    """An attached model ran outside the compiled path."""


class BackendError(AttnResError, RuntimeError):
    """The compile backend was given options, or a graph, it cannot take."""


class ArgumentError(AttnResError, TypeError):
    """A converted model was called with arguments, or shapes, it was not captured with."""


class EditedError(AttnResError, RuntimeError):
    """A converted model was changed in a way that its graph cannot see."""


class CheckError(AttnResError, RuntimeError):
    """The self-check found a converted model that does not compute what the original computes."""


class RewriteError(AttnResError, RuntimeError):
    """A graph could not be rewritten; nothing was changed."""


class SaveError(AttnResError, RuntimeError):
    """A converted model could not be written to, or read from, a file."""


class PlanError(AttnResError, ValueError):
    """A plan that cannot be made, read, or used with this model."""


class PipelineError(AttnResError, RuntimeError):
    """A pipeline that cannot be built or run as planned."""


class MissingPackageError(AttnResError, ImportError):
    """What was asked for needs an optional package that is not installed."""
