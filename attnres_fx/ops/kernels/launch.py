"""How kernels become operators of `attnres_fx::`, and how they are launched; nothing here needs a GPU to be imported.

On a GPU the operators are `triton_op`s: Inductor sees the kernels, calls them without Python and can put them in a
package. Triton's interpreter cannot be traced that way, so there they are `custom_op`s.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops.kernels.availability import INTERPRETED
from attnres_fx.ops.kernels.layout import MOST_SOURCES, Direction
from attnres_fx.ops.kernels.tuning import DEFAULT, Launch, launch_for

#: Programs of an interpreted kernel: enough to share rows, few enough to finish.
_INTERPRETED_PROGRAMS = 3


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function that launches kernels as `attnres_fx::name`."""
    made = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    return made(f"attnres_fx::{name}", mutates_args=())


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton kernel so that a compiler sees it, or run it in the interpreter."""
    if not INTERPRETED:
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*args, **options)


def padded(values: Sequence[Any], fill: Any = None) -> list[Any]:
    """As many values as a kernel takes sources."""
    return [*values, *[fill] * (MOST_SOURCES - len(values))]


def itemsize(sources: Sequence[Tensor]) -> int:
    """Bytes of the widest number among the sources."""
    return max(s.dtype.itemsize for s in sources)


def packed(sources: Sequence[Tensor]) -> bool:
    """Whether every source's rows lie one right after the other."""
    return all(isinstance(s.stride(0), int) and s.stride(0) == s.shape[1] for s in sources)


@functools.cache
def _processors(device: torch.device) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def chosen_launch(direction: Direction, sources: Sequence[Tensor]) -> tuple[Launch, int]:
    """The launch for a read of these sources, and the number of its programs."""
    if sources[0].device.type != "cuda":
        return DEFAULT, _INTERPRETED_PROGRAMS
    name, processors = _processors(sources[0].device)
    chosen = launch_for(direction, name, len(sources), int(sources[0].shape[-1]), sources[0].dtype)
    per_processor = chosen.programs_per_sm if direction == "forward" else DEFAULT.programs_per_sm
    return chosen, processors * per_processor
