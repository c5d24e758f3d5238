"""The former home of `attnres_fx.passes.graph.nodes`, which pages and passes of users name."""

import warnings

from attnres_fx.passes.graph.nodes import insert_call

__all__ = ["insert_call"]

warnings.warn(
    "attnres_fx.passes.graph_tools has moved: import insert_call from attnres_fx.passes.",
    DeprecationWarning,
    stacklevel=2,
)
