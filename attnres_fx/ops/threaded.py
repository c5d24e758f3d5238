"""`torch.ops.attnres_fx.depth_attention_threaded`: a read that hands its sources on.

A source that K reads take has K gradients, which autograd would add up in K - 1 passes of three accesses each. Where
each read takes the source from the one before, backward meets the reads in turn: what has come in for a source goes
into the kernel, and its sum comes out. Composite, as `depth_attention` is.
"""

import functools

import torch

from attnres_fx.ops.fused import FUSED_ARGUMENTS, run_fused
from attnres_fx.ops.operator import library

_threaded = functools.partial(run_fused, "depth_attention_threaded", returns_sources=True)
library.define(f"depth_attention_threaded({FUSED_ARGUMENTS}) -> Tensor[]")
library.impl("depth_attention_threaded", _threaded, "CompositeImplicitAutograd")
library.impl("depth_attention_threaded", _threaded, "FuncTorchBatched")

#: What stands in a graph. Outputs are those of `depth_attention_fused`, then every source (but the last one, with a
#: delta) as a view.
DEPTH_ATTENTION_THREADED = torch.ops.attnres_fx.depth_attention_threaded.default
