"""Messages for graphs that are not what was attached."""

from collections.abc import Sequence

from torch.fx import GraphModule

from attnres_fx.backend.attachment import ReadKey


def mismatch_message(gm: GraphModule, expected: set[ReadKey], actual: set[ReadKey], *, in_larger: bool) -> str:
    """For a graph whose reads are not those that were attached.

    Args:
        gm: The graph, with Dynamo's reason for its end.
        expected: The reads that were attached.
        actual: Those that were found.
        in_larger: Whether the graph is of something larger that calls the attached model.
    """
    missing = sorted({k.name for k in expected - actual})
    other = sorted({k.name for k in actual - expected} - set(missing))
    text = f"this graph has {len(actual & expected)} of the {len(expected)} reads that were attached"
    text += f"; missing or changed: {_listed(missing)}" if missing else ""
    text += f"; not attached: {_listed(other)}" if other else ""
    graph_break = _graph_break(gm)
    if graph_break:
        return f"{text}. {graph_break}"
    if in_larger:
        return (
            f"{text}. The attached model is part of a larger compiled one: compile the attached model itself, in place "
            f"(attnres_fx.compile), and leave what calls it uncompiled; or attach the larger one."
        )
    return (
        f"{text}. The model was changed since attach, or takes another path than with the example arguments. Attached "
        f"again (detach(model), then attach with arguments like these) it serves calls like this one, and not those it "
        f"serves now: calls share one attachment where they add the same terms to the stream."
    )


def no_marker_message(gm: GraphModule) -> str:
    """For a graph that does not hand over its queries. gm: as Dynamo handed it over."""
    graph_break = _graph_break(gm)
    if graph_break:
        return f"a part of a model reached the attnres backend without its queries. {graph_break}"
    return (
        "a model reached the attnres backend without its queries: call attnres_fx.attach(model, args, kwargs, "
        "config=...) before torch.compile(model, backend='attnres'), or attnres_fx.compile(model, ...) for both."
    )


def _graph_break(gm: GraphModule) -> str:
    """The graph break that ends the graph, with its place; "" where there is none."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return ""
    frames = getattr(reason, "user_stack", None) or []
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    if frames and "/distributed/fsdp/" in frames[-1].filename.replace("\\", "/"):
        return (
            "FSDP gathers the weights of a block by hooks inside of the model, where they end the graph: shard the "
            "model itself too, fully_shard(model), and compile it in place (attnres_fx.compile, or model.compile). The "
            "hooks then run around the whole call."
        )
    why = " ".join(str(reason.reason).split())[:300]
    return (
        f"A graph break{place} ends it inside the model ({why}). Remove the break; torch.compile(fullgraph=True), "
        f"which attnres_fx.compile sets, shows it in full."
    )


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
