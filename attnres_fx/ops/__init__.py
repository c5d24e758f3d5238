"""The depth-attention operators: their definitions, their weights, and their registration, one graph node each."""

from attnres_fx.ops import marker, threaded  # registered as the others are: graphs that are loaded may hold them
from attnres_fx.ops.fused import depth_attention_fused
from attnres_fx.ops.general import depth_attention_general
from attnres_fx.ops.operator import depth_attention
from attnres_fx.ops.phases import depth_attention_batch, depth_attention_merge
from attnres_fx.ops.read_form import depth_weights

__all__ = [
    "depth_attention",
    "depth_attention_batch",
    "depth_attention_fused",
    "depth_attention_general",
    "depth_attention_merge",
    "depth_weights",
    "marker",
    "threaded",
]
