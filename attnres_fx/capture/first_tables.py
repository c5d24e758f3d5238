"""Tables that a call makes where the model holds none of its length: made in the graph, and not kept."""

from collections.abc import Collection, Sequence

from torch import Tensor

from attnres_fx.capture.recorder import Recording
from attnres_fx.capture.side_effects import PythonChange, TensorWrite
from attnres_fx.errors import CaptureError
from attnres_fx.passes.graph.nodes import value_of


def without_tables(
    recording: Recording, writes: Sequence[TensorWrite], again: Collection[str], name: str
) -> tuple[list[TensorWrite], list[PythonChange]]:
    """The writes of a call without the buffers that later calls of its sizes find made, and those buffers.

    Args:
        recording: Of the call.
        writes: What it stored.
        again: The places that a later call with the same sizes writes to.
        name: The model's class.

    Raises:
        CaptureError: Such a buffer is part of the model's state.
    """
    tables = [w for w in writes if w.buffer and w.place not in again and _follows_sizes(recording, w)]
    for write in tables:
        if write.persistent:
            raise CaptureError(
                f"a call of {name} stores in the buffer {write.place}, which is part of its state, a tensor whose size "
                f"follows the arguments', and a graph makes that anew at every call: register it with "
                f"persistent=False, call the model before with the largest sizes, or use ax.compile, which runs the "
                f"model's own Python."
            )
    kept = [w for w in writes if w not in tables]
    return kept, [PythonChange(w.module, w.name, "a table", "a table of other sizes", table=True) for w in tables]


def _follows_sizes(recording: Recording, write: TensorWrite) -> bool:
    """Whether the tensor that is stored has a size that is free."""
    output = next(n for n in recording.gm.graph.nodes if n.op == "output")
    value = value_of(output.args[0][write.output])
    return isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape)
