"""From a captured graph to its residual streams: normalise, find, name what was hidden."""

from dataclasses import replace

from torch.fx import GraphModule, Node

from attnres_fx.errors import AlreadyConvertedError
from attnres_fx.passes.graph.nodes import describe
from attnres_fx.passes.graph.operations import op_name
from attnres_fx.passes.graph.result import defects_named
from attnres_fx.passes.normalize.inline_regions import hidden_regions
from attnres_fx.passes.normalize.normalization import normalize_
from attnres_fx.passes.streams.finding import find_streams
from attnres_fx.passes.streams.refusals import Refusal
from attnres_fx.passes.streams.stream import StreamSet


def analyze_(gm: GraphModule) -> StreamSet:
    """Normalise a graph in place and find its residual streams.

    Args:
        gm: A module with values on the nodes of its graph.

    Returns:
        The streams, and what looks like one and is refused, regions that cannot be inlined among it.

    Raises:
        AlreadyConvertedError: The graph reads through depth attention already.
        RewriteError: The analysis raised an error that is not one of the library's; it is the cause.
    """
    for node in gm.graph.nodes:
        if op_name(node).startswith("attnres_fx::"):
            raise AlreadyConvertedError(
                f"the model already reads through depth attention at {describe(node)}: "
                f"convert the original, or use this one as it is."
            )
    normalize_(gm)
    with defects_named("finding the residual streams"):
        found = find_streams(gm.graph)
    return replace(found, refusals=(*found.refusals, *map(_hidden, hidden_regions(gm))))


def _hidden(node: Node) -> Refusal:
    what = op_name(node).removeprefix("higher_order::")
    return Refusal("hidden", describe(node), f"the bodies of {what!r} may write to a stream and cannot be inlined")
