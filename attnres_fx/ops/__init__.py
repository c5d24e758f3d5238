"""The depth-attention operator: its definition, its weights, and its registration in one graph node."""

from attnres_fx.ops.operator import depth_attention
from attnres_fx.ops.reference import depth_weights

__all__ = ["depth_attention", "depth_weights"]
