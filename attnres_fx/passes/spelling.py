"""The former home of `attnres_fx.passes.graph.operations`, which pages and passes of users name."""

import warnings

from attnres_fx.passes.graph.operations import op_name

__all__ = ["op_name"]

warnings.warn(
    "attnres_fx.passes.spelling has moved: import op_name from attnres_fx.passes.", DeprecationWarning, stacklevel=2
)
