"""Implementations of depth attention to compare: ours, the definition, and public packages where they import.

Every one is called as `call(sources, query, key_weight, eps)` with `sources` a list of [N, D], or one [S, N, D]
tensor for those that take no list (their time then leaves out the stack that a model would have to make).
"""

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres_fx.ops import depth_attention

Call = Callable[[Any, Tensor, Tensor, float], Tensor]
#: (sources, tokens, width, dtype) -> why an implementation cannot take them, or None.
Refuses = Callable[[int, int, int, torch.dtype], str | None]


@dataclass(frozen=True)
class Implementation:
    """One row of the tables. stacked: takes one [S, N, D] tensor. key_gain: has a learned key gain (without one it is
    run and verified with a gain of one). note: what a reader of its times should know."""

    name: str
    call: Call
    package: str | None = None
    stacked: bool = False
    key_gain: bool = True
    refuses: Refuses = lambda sources, tokens, width, dtype: None
    note: str = ""


def stacked_definition(sources: Sequence[Tensor], query: Tensor, key_weight: Tensor, eps: float) -> Tensor:
    """The definition as one would first write it: stack, float32, softmax, sum."""
    values = torch.stack(tuple(sources)).float()
    keys = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * key_weight.float()
    weights = torch.einsum("snd,d->sn", keys, query.float()).softmax(0)
    return torch.einsum("sn,snd->nd", weights, values).to(sources[0].dtype)


def _ours(sources: Sequence[Tensor], query: Tensor, key_weight: Tensor, eps: float) -> Tensor:
    return depth_attention(sources, query, key_weight, eps=eps)


def _compiled() -> Implementation:
    call = torch.compile(stacked_definition, dynamic=False, fullgraph=True)
    return Implementation("definition, torch.compile", call, "torch")


def _fla_triton(level: int) -> Implementation:
    fla: Any = importlib.import_module("fla.ops.attnres")
    # Both switches choose the Gluon kernels, and silently.
    os.environ.pop("FLA_GLUON", None)
    os.environ.pop("FLA_ATTNRES_GLUON", None)

    def call(sources: Sequence[Tensor], query: Tensor, key_weight: Tensor, eps: float) -> Tensor:
        return fla.fused_attnres(query, sources, key_weight, rms_eps=eps, checkpoint_level=level)

    return Implementation(f"fla-core, Triton level {level}", call, "fla-core")


def _fla_gluon() -> Implementation:
    module: Any = importlib.import_module("fla.ops.attnres.backends.gluon")
    backend = module.AttnResGluonBackend()

    def call(sources: Sequence[Tensor], query: Tensor, key_weight: Tensor, eps: float) -> Tensor:
        # The package's own dispatch would fall back to Triton where this refuses.
        accepted, reason = backend.fused_attnres_verifier(query, sources, key_weight, rms_eps=eps)
        if not accepted:
            raise RuntimeError(reason)
        return backend.fused_attnres(query, sources, key_weight, rms_eps=eps)

    return Implementation("fla-core, Gluon", call, "fla-core")


def _fast_attnres() -> Implementation:
    attnres: Any = importlib.import_module("attnres")

    def call(sources: Sequence[Tensor], query: Tensor, key_weight: Tensor, eps: float) -> Tensor:
        return attnres.attnres(list(sources), query, eps=eps)

    def refuses(sources: int, tokens: int, width: int, dtype: torch.dtype) -> str | None:
        if dtype != torch.bfloat16:
            return "bfloat16 only"
        return None if sources <= 129 and width <= 8192 else "at most 129 sources and a width of 8192"

    return Implementation(
        "fast-attnres", call, "fast-attnres", key_gain=False, refuses=refuses, note="no key gain: run with ones"
    )


def _overflows(sources: int, tokens: int, width: int, dtype: torch.dtype) -> str | None:
    return "its offsets are 32 bits wide" if sources * tokens * width >= 2**31 else None


def _liger() -> Implementation:
    module: Any = importlib.import_module("liger_kernel.ops.attn_res")

    def call(stacked: Tensor, query: Tensor, key_weight: Tensor, eps: float) -> Tensor:
        return module.LigerAttnResFunction.apply(stacked, query, key_weight, eps)

    return Implementation(
        "liger-kernel", call, "liger-kernel", stacked=True, refuses=_overflows, note="stacked beforehand, untimed"
    )


def _flash_attn_res() -> Implementation:
    module: Any = importlib.import_module("flash_attn_res.ops.phase_1")

    def call(stacked: Tensor, query: Tensor, key_weight: Tensor, eps: float) -> Tensor:
        values = stacked.unsqueeze(1)  # [S, 1, N, D]
        outputs, _ = module.phase_1_batched_attention_triton_op(values, query.unsqueeze(0), eps)
        return outputs[0, 0]

    def refuses(sources: int, tokens: int, width: int, dtype: torch.dtype) -> str | None:
        if width & (width - 1):
            return "its widths are powers of two"
        if dtype != torch.bfloat16:
            return "its outputs are bfloat16"
        return _overflows(sources, tokens, width, dtype)

    return Implementation(
        "flash-attn-res, phase 1",
        call,
        "flash-attn-res",
        stacked=True,
        key_gain=False,
        refuses=refuses,
        note="one query; no key gain: run with ones; stacked beforehand, untimed",
    )


#: Name in the tables -> (needs a GPU, how to make it).
MAKERS: dict[str, tuple[bool, Callable[[], Implementation]]] = {
    "ours": (False, lambda: Implementation("ours", _ours, "attnres-fx")),
    "definition, eager": (False, lambda: Implementation("definition, eager", stacked_definition, "torch")),
    "definition, torch.compile": (False, _compiled),
    "fla-core, Triton level 0": (True, lambda: _fla_triton(0)),
    "fla-core, Triton level 1": (True, lambda: _fla_triton(1)),
    "fla-core, Gluon": (True, _fla_gluon),
    "fast-attnres": (True, _fast_attnres),
    "liger-kernel": (True, _liger),
    "flash-attn-res, phase 1": (True, _flash_attn_res),
}
PACKAGES = ("fla-core", "fast-attnres", "liger-kernel", "flash-attn-res", "einops")


def load(
    device: torch.device, only: Sequence[str] = (), skip: Sequence[str] = ()
) -> tuple[list[Implementation], dict[str, str]]:
    """What can run here, and for the rest why not. `only` and `skip` are beginnings of names."""
    found: list[Implementation] = []
    missing: dict[str, str] = {}
    for name, (needs_gpu, make) in MAKERS.items():
        if (only and not name.startswith(tuple(only))) or (skip and name.startswith(tuple(skip))):
            continue
        try:
            implementation = make()
        except Exception as error:  # a peer may fail in any way while it is imported
            missing[name] = f"not here: {type(error).__name__}: {error}".splitlines()[0][:160]
            continue
        if needs_gpu and device.type != "cuda":
            missing[name] = "not here: needs a CUDA device"
            continue
        found.append(implementation)
    return found, missing
