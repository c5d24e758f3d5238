"""The `attnres` backend of `torch.compile`: the rewrite, then AOTAutograd and an inner compiler.

    torch.compile(model, backend="attnres", options={"inner": "inductor"})

Dynamo's graph is copied, rewritten by the passes `convert` uses, and handed on with the inputs it had. Queries and
gains are inputs that Dynamo lifted itself (see `attach`), so every graph of a model uses the model's own.
"""

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch.fx import GraphModule, Node

from attnres_fx.backend.attach import Attachment, ReadKey, attach, is_attached, read_key, require_attached, unwrapped
from attnres_fx.capture.isolated_run import fast_path_off
from attnres_fx.config import AttnResConfig
from attnres_fx.errors import AttachError, AttnResError, BackendError
from attnres_fx.ops.marker import PARAMETERS
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes import (
    Lowering,
    ReadParameters,
    Stream,
    StreamSet,
    checked_lowering,
    find_streams,
    insert_depth_attention_pass,
    lower_,
    normalize_,
    plan_schedule,
    run_pass,
)
from attnres_fx.passes.graph.nodes import tensor_of
from attnres_fx.passes.graph.operations import trains
from attnres_fx.passes.lowering.read_calls import OPERATORS, kernels_of

log = logging.getLogger(__name__)

OPTIONS = ("inner", "mode", "inductor", "lowering")


@dataclass(frozen=True)
class CompiledGraph:
    """One graph that the backend compiled.

    mode: `"train"`, `"eval"`, or `""` where no node tells. grad: whether gradients were on. inputs: shapes of the
    tensors it takes that are no parameters. reads: how many were matched. changed: passes that changed something,
    each with the number of operations it took out and put in. inner: the compiler it was handed to.
    """

    mode: str
    grad: bool
    inputs: tuple[str, ...]
    reads: int
    changed: tuple[str, ...]
    inner: str
    kernels: str


@dataclass
class Explanation:
    """What the backend has done for a model so far; `print` it."""

    model: str
    config: AttnResConfig
    reads: tuple[str, ...]
    graphs: list[CompiledGraph] = field(default_factory=list)

    def __str__(self) -> str:
        head = (
            f"{self.model}: attached, variant {self.config.variant}, output {self.config.output}, "
            f"{len(self.reads)} reads, {len(self.graphs)} graphs compiled"
        )
        rows = [
            {
                "graph": i,
                "mode": g.mode or "either",
                "grad": "on" if g.grad else "off",
                "inputs": " ".join(g.inputs),
                "reads": g.reads,
                "inner": g.inner,
                "kernels": g.kernels,
                "passes": "; ".join(g.changed),
            }
            for i, g in enumerate(self.graphs)
        ]
        return "\n".join([head, "", tabulate(rows, headers="keys", tablefmt="simple")]) if rows else head


#: Graphs compiled so far, by the text that describes the attachment they were made for.
_COMPILED: dict[str, list[CompiledGraph]] = {}


def compile(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: AttnResConfig | None = None,
    inner: str = "inductor",
    mode: str | None = None,
    inductor: Mapping[str, Any] | None = None,
    fullgraph: bool = True,
    dynamic: bool | None = True,
    lowering: Lowering | None = None,
) -> AttnResParameters:
    """Attach a model, unless it is, and compile it in place with the `attnres` backend.

    model, args, kwargs, config: as for `attach`. inner: the compiler behind the rewrite, a registered backend name.
    mode, inductor: Inductor's mode and options. fullgraph, dynamic: as for `torch.compile`.
    lowering: what is folded into the reads, Lowering() by default.
    Returns `model.attnres`. Calls, `generate` and trainers then run the AttnRes form.

    Raises BackendError for a model that is compiled already, and what `attach` raises.
    """
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise BackendError(
            f"{type(model).__name__} is compiled already. Compile a fresh model, or detach(model) and compile again."
        )
    options: dict[str, Any] = {"inner": inner}
    options |= {"mode": mode} if mode is not None else {}
    options |= {"inductor": dict(inductor)} if inductor is not None else {}
    options |= {"lowering": lowering} if lowering is not None else {}
    _checked_options(options, None)
    if config is not None and is_attached(model) and require_attached(model).config != config:
        raise AttachError(
            f"{type(model).__name__} is attached with another config: detach(model) first, or leave config out."
        )
    attached = require_attached(model) if is_attached(model) else attach(model, args, kwargs, config=config)
    model.compile(backend="attnres", fullgraph=fullgraph, dynamic=dynamic, options=options)
    compiled: Any = model._compiled_call_impl

    @functools.wraps(compiled)
    def call(*given: Any, **named: Any) -> Any:
        with fast_path_off():
            return compiled(*given, **named)

    model._compiled_call_impl = call
    return attached


def explain(model: nn.Module) -> Explanation:
    """What the backend has done for an attached model: graphs, reads matched, passes, kernels.

    Models attached alike share their graphs, and so what is said of them. Raises AttachError for others.
    """
    attached = require_attached(model)
    graphs = _COMPILED.get(attached.about, [])
    return Explanation(type(unwrapped(model)).__name__, attached.config, attached.reads.names, list(graphs))


def attnres(gm: GraphModule, example_inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
    """The backend. options: `inner` (any registered backend, `"inductor"` by default), `mode` and `inductor`
    (Inductor's mode and options), `lowering` (a Lowering or a dict of its fields). A graph that reads through depth
    attention already is lowered and compiled. What cannot be rewritten raises an AttnResError when first run."""
    try:
        options = _checked_options(given.pop("options", None) or {}, given.pop("mode", None))
        if given:
            raise BackendError(f"the attnres backend does not know {', '.join(map(repr, sorted(given)))}.")
        rewritten = _rewritten(gm, options["inner"], options["lowering"])
    except AttnResError as error:
        return _raiser(error)  # raised here, it would reach the user inside one of Dynamo's own
    compiled: Callable[..., Any] = _inner(options)(rewritten, list(example_inputs))
    return compiled


def _raiser(error: AttnResError) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise type(error)(str(error)) from error

    disabled: Callable[..., Any] = torch._dynamo.disable(refuse)
    return disabled


def _checked_options(options: Mapping[str, Any], mode: str | None) -> dict[str, Any]:
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise BackendError(
            f"options {', '.join(map(repr, unknown))} are unknown to the attnres backend; it takes "
            f"{', '.join(OPTIONS)}. Inductor's own go under 'inductor'."
        )
    checked = {"inner": "inductor", "mode": mode, "inductor": {}, "lowering": None, **options}
    checked["lowering"] = checked_lowering(checked["lowering"])
    names = [n for n in list_backends(exclude_tags=()) if n != "attnres"]
    if checked["inner"] not in names:
        raise BackendError(f"options['inner'] is {checked['inner']!r}, which is no backend here: {', '.join(names)}.")
    if checked["inner"] != "inductor" and (checked["mode"] or checked["inductor"]):
        raise BackendError(f"'mode' and 'inductor' are for inner='inductor'; inner is {checked['inner']!r}.")
    if not isinstance(checked["inductor"], Mapping):
        raise BackendError(f"options['inductor'] must be a dict of Inductor's options; it is {checked['inductor']!r}.")
    _check_inductor(checked["mode"], checked["inductor"])
    return checked


def _check_inductor(mode: Any, options: Mapping[str, Any]) -> None:
    from torch._inductor import config, list_mode_options

    if mode is not None and mode not in (modes := list_mode_options()):
        raise BackendError(f"mode {mode!r} is none of Inductor's: {', '.join(modes)}.")
    known = config.get_config_copy()
    unknown = [n for n in options if n.replace("-", "_") not in known]
    if unknown:
        raise BackendError(f"options['inductor'] has {', '.join(map(repr, unknown))}, which Inductor does not know.")


def _inner(options: Mapping[str, Any]) -> Callable[..., Any]:
    if options["inner"] != "inductor":
        other: Callable[..., Any] = lookup_backend(options["inner"])
        return other
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(options["mode"]) if options["mode"] else {}), **options["inductor"]}
    return lambda gm, inputs: compile_fx(gm, inputs, config_patches=patches or None)


# --- one graph ---------------------------------------------------------------------------------------


def _rewritten(gm: GraphModule, inner: str, lowering: Lowering) -> GraphModule:
    """A copy of Dynamo's graph whose streams are read through depth attention."""
    marker = next((n for n in gm.graph.nodes if n.target is PARAMETERS), None)
    if marker is None and any(n.target in OPERATORS for n in gm.graph.nodes):
        copied = _copied(gm)
        lower_(copied, lowering, training=torch.is_grad_enabled())
        return copied
    if marker is None:
        raise BackendError(_no_marker_message(gm))
    about = str(marker.args[1])
    wanted = Attachment.from_text(about)
    copied = _copied(gm)
    found = next(n for n in copied.graph.nodes if n.target is PARAMETERS)
    tensors = found.args[0]
    assert isinstance(tensors, list | tuple)
    weights = _weights(wanted.reads, tensors)  # type: ignore[arg-type]
    copied.graph.erase_node(found)
    results = normalize_(copied)
    streams = find_streams(copied.graph)
    selected = _matched(gm, streams, wanted)
    _check_placement(copied, streams, selected, weights)
    result = run_pass(
        insert_depth_attention_pass,
        copied,
        streams=streams,
        schedules={s.name: plan_schedule(s.num_sublayers, wanted.config) for s in selected},
        output=wanted.config.output,
        eps=wanted.config.eps,
        fetch=lambda stream, read, like: weights[read.name],
    )
    lowered = lower_(copied, lowering, training=torch.is_grad_enabled())
    copied.recompile()
    changed = [str(r) for r in (*results, result, *lowered) if r.modified]
    _note(about, copied, len(wanted.reads), changed, inner)
    return copied


def _copied(gm: GraphModule) -> GraphModule:
    """A copy on the same tensors, with what Dynamo knows of its inputs: which are parameters and stay in place."""
    copied = GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta = dict(gm.meta)
    for old, new in zip(gm.graph.nodes, copied.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copied


def _weights(keys: Sequence[ReadKey], tensors: Sequence[Node]) -> dict[str, ReadParameters]:
    if len(tensors) != sum(2 + k.gated for k in keys):
        raise BackendError(f"model.attnres holds {len(tensors)} tensors for {len(keys)} reads: attach the model anew.")
    given = iter(tensors)
    return {k.name: ReadParameters(next(given), next(given), next(given) if k.gated else None) for k in keys}


def _matched(gm: GraphModule, streams: StreamSet, wanted: Attachment) -> tuple[Stream, ...]:
    """The streams whose reads are those that were attached, or an error that says where they are not."""
    names = {s.name for s in streams.streams}
    asked = wanted.config.streams
    known = asked if isinstance(asked, str) else [n for n in asked if n in names]
    selected = streams.select(known) if known else ()
    found = {read_key(s, r, wanted.config) for s in selected for r in s.depth_reads}
    expected = set(wanted.reads)
    if found == expected:
        return selected
    raise BackendError(_mismatch_message(gm, expected, found))


def _mismatch_message(gm: GraphModule, expected: set[ReadKey], found: set[ReadKey]) -> str:
    missing = sorted({k.name for k in expected - found})
    other = sorted({k.name for k in found - expected} - set(missing))
    text = f"this graph has {len(found & expected)} of the {len(expected)} reads that were attached"
    text += f"; missing or changed: {_listed(missing)}" if missing else ""
    text += f"; not attached: {_listed(other)}" if other else ""
    broken = _break_of(gm)
    if broken:
        return f"{text}. {broken}"
    if any(name.endswith(f".{part}") for name in other for part in missing):
        return (
            f"{text}. The attached model is part of a larger compiled one: compile the attached model itself, in place "
            f"(attnres_fx.compile), and leave what calls it uncompiled; or attach the larger one."
        )
    return (
        f"{text}. The model was changed since attach, or takes another path than with the example arguments: "
        f"detach(model) and attach it again with arguments like these. A generate() that runs an encoder by itself "
        f"takes another path too: attach the decoder alone."
    )


def _no_marker_message(gm: GraphModule) -> str:
    broken = _break_of(gm)
    if broken:
        return f"a part of a model reached the attnres backend without its queries. {broken}"
    return (
        "a model reached the attnres backend without its queries: call attnres_fx.attach(model, args, kwargs, "
        "config=...) before torch.compile(model, backend='attnres'), or attnres_fx.compile(model, ...) for both."
    )


def _break_of(gm: GraphModule) -> str:
    """What cut the graph off, and where, if it was cut off."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return ""
    frames = getattr(reason, "user_stack", None) or []
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    why = " ".join(str(reason.reason).split())[:300]
    return (
        f"A graph break{place} ends it inside the model ({why}). Remove the break; torch.compile(fullgraph=True), "
        f"which attnres_fx.compile sets, shows it in full."
    )


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_placement(
    gm: GraphModule, streams: StreamSet, selected: Sequence[Stream], weights: Mapping[str, ReadParameters]
) -> None:
    """Queries must be where the sources are, in their dtype or in float32."""
    nodes = {n.name: n for n in gm.graph.nodes}
    for stream, read in ((s, r) for s in selected for r in s.depth_reads):
        source, query = tensor_of(nodes[read.site]), tensor_of(weights[read.name].query)
        assert source is not None and query is not None
        if source.device != query.device:
            raise BackendError(
                f"the read {read.name} of {stream.name} is on {source.device} and its query on {query.device}: move "
                f"model.attnres with the model."
            )
        same_kind = torch.promote_types(source.dtype, query.dtype) == query.dtype
        if not same_kind and not torch.is_autocast_enabled(source.device.type):
            raise BackendError(
                f"the read {read.name} of {stream.name} is {source.dtype} and its query {query.dtype}: cast "
                f"model.attnres with the model; float32 queries are taken everywhere."
            )


# --- what happened -----------------------------------------------------------------------------------


def _note(about: str, gm: GraphModule, reads: int, changed: Sequence[str], inner: str) -> None:
    baked = {trains(n) for n in gm.graph.nodes} - {None}
    mode = "" if not baked else "train" if True in baked else "eval"
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and not _is_static(n)]
    shapes = tuple(
        f"{list(t.shape)}".replace(" ", "") for n in inputs if (t := tensor_of(n)) is not None and t.dim() > 0
    )
    kernels = ", ".join(sorted(kernels_of(gm)))
    graph = CompiledGraph(mode, torch.is_grad_enabled(), shapes, reads, tuple(changed), inner, kernels)
    _COMPILED.setdefault(about, []).append(graph)
    log.info("compiled %s", graph)


def _is_static(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, nn.Parameter) or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


__all__ = ["CompiledGraph", "Explanation", "attnres", "compile", "explain"]
