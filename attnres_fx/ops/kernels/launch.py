"""The kernels as operators of `attnres_fx::`, with fake implementations; nothing here needs a GPU to be imported.

On a GPU they are `triton_op`s: Inductor sees the kernels, calls them without Python and can put them in a
package. Triton's interpreter cannot be traced that way, so there they are `custom_op`s.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops.kernels import read
from attnres_fx.ops.kernels.availability import INTERPRETED
from attnres_fx.ops.kernels.layout import MOST_SOURCES, layout_of
from attnres_fx.ops.kernels.tuning import DEFAULT, Launch, launch_for

#: Programs of an interpreted kernel: enough to share rows, few enough to finish.
_INTERPRETED_PROGRAMS = 3
_SUM_BLOCK, _SUM_TILE = 64, 32


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function that launches kernels as `attnres_fx::name`."""
    made = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    return made(f"attnres_fx::{name}", mutates_args=())


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **options: Any) -> None:
    if not INTERPRETED:
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*args, **options)


def padded(values: Sequence[Any], fill: Any = None) -> list[Any]:
    return [*values, *[fill] * (MOST_SOURCES - len(values))]


def _itemsize(sources: Sequence[Tensor]) -> int:
    return max(s.dtype.itemsize for s in sources)


def _packed(sources: Sequence[Tensor]) -> bool:
    return all(isinstance(s.stride(0), int) and s.stride(0) == s.shape[1] for s in sources)


@functools.cache
def _processors(device: torch.device) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


def _launch_for(direction: Any, sources: Sequence[Tensor]) -> tuple[Launch, int]:
    if sources[0].device.type != "cuda":
        return DEFAULT, _INTERPRETED_PROGRAMS
    name, processors = _processors(sources[0].device)
    found = launch_for(direction, name, len(sources), int(sources[0].shape[-1]), sources[0].dtype)
    per_processor = found.programs_per_sm if direction == "forward" else DEFAULT.programs_per_sm
    return found, processors * per_processor


@operator("read_forward")
def read_forward(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor,
    eps: float,
    gain: float,
    delta: Tensor | None,
    carry: Tensor | None,
    carry_lse: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dtype: torch.dtype,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One group of at most 16 sources [N, D] with rows of stride one inside.

    Returns out [N, D] in `dtype`, the new partial sum [N, D], lse [N], stats [2, S, N] and norm_stats [2, N];
    what is not asked for is empty.
    """
    outputs = _forward_outputs(sources, delta, norm, dtype, saves)
    count, width = sources[0].shape[0], int(sources[0].shape[1])
    if isinstance(count, int) and count == 0:
        return outputs
    out, partial, lse, stats, norm_stats = outputs
    layout, (chosen, programs) = layout_of(width, "forward", _itemsize(sources)), _launch_for("forward", sources)
    launch(
        read.read_forward,
        (torch.sym_min(count, programs),),
        *padded(sources),
        *padded([s.stride(0) for s in sources], 0),
        delta,
        delta.stride(0) if delta is not None else 0,
        carry,
        carry_lse,
        query,
        key_weight,
        norm_weight,
        norm_bias,
        out,
        partial if delta is not None else None,
        lse,
        stats if saves else None,
        norm_stats if saves and norm else None,
        count,
        eps,
        gain,
        norm_eps,
        S=len(sources),
        D=width,
        K=layout.chunks,
        C=layout.chunk,
        NORM=norm,
        PACKED=_packed(sources),
        num_warps=layout.warps,
        num_stages=chosen.num_stages,
    )
    return outputs


def _forward_outputs(
    sources: Sequence[Tensor], delta: Tensor | None, norm: int, dtype: torch.dtype, saves: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    last = sources[-1]
    count, width = last.shape
    floats: dict[str, Any] = {"dtype": torch.float32, "device": last.device}
    summed = torch.promote_types(last.dtype, delta.dtype) if delta is not None else last.dtype
    return (
        torch.empty((count, width), dtype=dtype, device=last.device),
        torch.empty((count, width) if delta is not None else (0, width), dtype=summed, device=last.device),
        torch.empty((count,), **floats),
        torch.empty((2, len(sources), count if saves else 0), **floats),
        torch.empty((2, count if saves and norm else 0), **floats),
    )


@operator("read_backward")
def read_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    arrived: Sequence[Tensor | None],
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor,
    gain: float,
    carry: Tensor | None,
    carry_lse: Tensor | None,
    norm: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    lse: Tensor,
    stats: Tensor,
    norm_stats: Tensor,
    needed: Sequence[bool],
    for_weights: bool,
) -> list[Tensor]:
    """Gradients of `read_forward`.

    grad [N, D] and grad_lse [N] come in for out and lse; arrived holds what has come in for each source from
    elsewhere, or None. needed: for which sources a gradient is wanted; for_weights: whether for query and key gain.
    Returns the sources' gradients, then query, key_weight, norm_weight, norm_bias, carry, carry_lse; empty where
    not wanted.
    """
    outputs = _backward_outputs(sources, query, key_weight, carry, norm_weight, norm_bias, needed, for_weights)
    count, width = sources[0].shape[0], int(sources[0].shape[1])
    if isinstance(count, int) and count == 0:
        for made in outputs:
            made.zero_()
        return outputs
    *grads, for_query, for_key, for_norm_weight, for_norm_bias, for_carry, for_carry_lse = outputs
    layout, (chosen, programs) = layout_of(width, "backward", _itemsize(sources)), _launch_for("backward", sources)
    rows = [
        torch.zeros((programs, width), dtype=torch.float32, device=grad.device) if wanted else None
        for wanted in (for_weights, norm_weight is not None, norm_bias is not None)
    ]
    launch(
        read.read_backward,
        (programs,),
        *padded(sources),
        *padded([s.stride(0) for s in sources], 0),
        *padded([g if wanted else None for g, wanted in zip(grads, needed, strict=True)]),
        *padded(arrived),
        carry,
        carry_lse,
        query,
        key_weight,
        norm_weight,
        grad,
        grad.stride(0),
        grad_lse,
        lse,
        stats,
        norm_stats if norm else None,
        for_carry if carry is not None else None,
        for_carry_lse if carry is not None else None,
        *rows,
        count,
        gain,
        S=len(sources),
        D=width,
        K=layout.chunks,
        C=layout.chunk,
        NORM=norm,
        PACKED=_packed(sources),
        num_warps=layout.warps,
        num_stages=chosen.num_stages,
    )
    for summed, factor, out, other, second in (
        (rows[0], key_weight, for_query, query, for_key),
        (rows[1], None, for_norm_weight, None, None),
        (rows[2], None, for_norm_bias, None, None),
    ):
        if summed is not None:
            _sum_rows(summed, factor, out, other, second)
    return outputs


def _sum_rows(rows: Tensor, factor: Tensor | None, out: Tensor, other: Tensor | None, second: Tensor | None) -> None:
    count, width = rows.shape
    grid = (-(-width // _SUM_BLOCK),)
    launch(
        read.sum_rows,
        grid,
        rows,
        factor,
        other,
        out,
        second,
        count,
        width,
        BLOCK=_SUM_BLOCK,
        TILE=_SUM_TILE,
        num_warps=4,
    )


def _backward_outputs(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor,
    carry: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    needed: Sequence[bool],
    for_weights: bool,
) -> list[Tensor]:
    count, width = sources[0].shape
    device = sources[0].device

    def like(value: Tensor | None, wanted: bool) -> Tensor:
        if value is None or not wanted:
            return torch.empty((0,), device=device)
        return torch.empty(value.shape, dtype=value.dtype, device=device)

    made = [
        torch.empty((count, width) if wanted else (0, width), dtype=s.dtype, device=device)
        for s, wanted in zip(sources, needed, strict=True)
    ]
    made += [like(query, for_weights), like(key_weight, for_weights), like(norm_weight, True), like(norm_bias, True)]
    made += [like(carry, True), torch.empty((count if carry is not None else 0,), device=device)]
    return made


if INTERPRETED:

    @read_forward.register_fake
    def _(
        sources: Any, query: Any, key_weight: Any, eps: Any, gain: Any, delta: Any, carry: Any, carry_lse: Any,
        norm: Any, norm_weight: Any, norm_bias: Any, norm_eps: Any, dtype: Any, saves: Any,
    ) -> Any:  # fmt: skip
        return _forward_outputs(sources, delta, norm, dtype, saves)

    @read_backward.register_fake
    def _(
        grad: Any, grad_lse: Any, arrived: Any, sources: Any, query: Any, key_weight: Any, gain: Any, carry: Any,
        carry_lse: Any, norm: Any, norm_weight: Any, norm_bias: Any, lse: Any, stats: Any, norm_stats: Any,
        needed: Any, for_weights: Any,
    ) -> Any:  # fmt: skip
        return _backward_outputs(sources, query, key_weight, carry, norm_weight, norm_bias, needed, for_weights)
