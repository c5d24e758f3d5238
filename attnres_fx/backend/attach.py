"""`attach` and `detach`: an AttnRes model that keeps its Python API, rewritten by the compile backend.

`attach` registers the queries and gains on the model and lets its `forward` hand them to the graph. From then on
the model runs compiled, or raises.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.fx import GraphModule

from attnres_fx.backend.attached_class import HELD, attach_class_, detach_class_, has_attached_class
from attnres_fx.backend.attachment import ATTRIBUTE, AttachedParameters, read_key, require_attached, unwrapped
from attnres_fx.backend.plain_runs import plain
from attnres_fx.capture.capture import capture
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.config import RewriteConfig
from attnres_fx.conversion.around_forward import methods_that_add
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.source_model import checked_config
from attnres_fx.errors import AlreadyConvertedError, AttachError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes import ReadPlan, analyze_, topology_of
from attnres_fx.passes.graph.module_paths import common_calls
from attnres_fx.passes.rewrite.parameters import make_parameters
from attnres_fx.passes.streams.selection import select_streams

__all__ = ["attach", "detach", "plain"]


def attach(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: RewriteConfig | None = None,
) -> AttnResParameters:
    """Register `model.attnres`, the queries and gains of an AttnRes form of a model, in place.

    The model then runs under `torch.compile(model, backend="attnres")` and raises EagerCallError elsewhere. Its new
    parameters are found by optimizers and `state_dict`; its own names do not change.

    Args:
        model: A module with code of its own. It is captured once, in its current mode, to find its reads.
        args: Positional example arguments.
        kwargs: Keyword example arguments.
        config: What the streams become, as for `convert`; `AttnResConfig()` by default.

    Returns:
        `model.attnres`: for every read a query [D], a key gain [D] and, in post-norm streams of mode `"sum"`, a gate
        [], or what another topology has, in the dtype and on the device of the stream.

    Raises:
        AttachError: The model is attached already, or is not an `nn.Module` with code of its own.
        AlreadyConvertedError: It is a converted model.
        AttnResError: As `convert` raises where a model cannot be rewritten.
    """
    config = checked_config(config)
    _check_attachable(model)
    mode: Mode = "train" if model.training else "eval"
    captured = capture(model, args, kwargs, modes=(mode,), python_runs=True)
    gm = next(iter(captured.graphs.values())).gm
    streams = analyze_(gm)
    selected = select_streams(streams, config, type(model).__name__)
    plan = topology_of(config).plan(streams, selected, config)
    parameters = make_parameters(gm.graph, captured.root, plan, config)
    attached = AttachedParameters(parameters, [read_key(r) for r in plan.reads], _homes(model, gm, plan))
    _attach_parts_(model, attached, methods_that_add(model, gm, plan))
    return attached


def detach(model: nn.Module) -> None:
    """Remove `model.attnres` again, in place: the model is what it was before `attach`.

    Args:
        model: An attached model, or what `torch.compile` returned for one.

    Raises:
        AttachError: It is not attached, or its class was changed since.
    """
    attached = require_attached(model)
    model = unwrapped(model)
    parts = [model, *attached.parts_of(model)]
    for part in parts:
        if not has_attached_class(part):
            raise AttachError(f"the class of this {type(part).__name__} was changed after attach: undo that first.")
    for part in parts:
        detach_class_(part)
    delattr(model, ATTRIBUTE)


def _check_attachable(model: Any) -> None:
    if isinstance(model, ConvertedModel):
        raise AlreadyConvertedError("the model is converted already: attach the original, or torch.compile this.")
    if isinstance(model, OptimizedModule):
        raise AttachError("the model is what torch.compile returned: attach the model itself, compile it afterwards.")
    if not isinstance(model, nn.Module) or isinstance(model, GraphModule):
        raise AttachError(
            f"attach takes an nn.Module with code of its own, and this {type(model).__name__} is "
            f"{'a graph, which convert() takes' if isinstance(model, GraphModule) else 'none'}."
        )
    if isinstance(model._modules.get(ATTRIBUTE), AttachedParameters):
        raise AttachError(f"{type(model).__name__} is attached already: detach(model) first, to attach it anew.")
    for path, module in model.named_modules():
        if HELD in module.__dict__:
            raise AttachError(
                f"{path or type(model).__name__} is attached already, or a part of a model that is: detach that first."
            )
    if hasattr(model, ATTRIBUTE):
        raise AttachError(
            f"{type(model).__name__} has an attribute {ATTRIBUTE!r} of its own, where attach would put its: rename "
            f"it, or attach a module that holds the model and calls it in forward."
        )
    if "forward" in vars(model):
        raise AttachError(
            f"the forward of this {type(model).__name__} is replaced on the instance by {_name_of(model.forward)}, "
            f"which calls the original around what attach adds. Attach the model first, and wrap it afterwards "
            f"(accelerate's prepare, autocast wrappers, offloading hooks), or take the wrapper off: del model.forward."
        )


def _name_of(function: Any) -> str:
    """A function as its author would find it."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        return type(function).__name__
    return f"{getattr(code, 'co_qualname', code.co_name)} ({code.co_filename}:{code.co_firstlineno})"


def _attach_parts_(model: nn.Module, attached: AttachedParameters, methods: tuple[str, ...]) -> None:
    """Let a model and its parts hand their queries to the graph, in place; these methods of it alone do not."""
    model.add_module(ATTRIBUTE, attached)
    for path in attached.parts:
        part = model.get_submodule(path)
        part.__dict__[HELD] = attached, path
        attach_class_(part, () if path else methods)


def _homes(model: nn.Module, gm: GraphModule, plan: ReadPlan) -> dict[str, str]:
    """For each stream the path of the innermost module whose call writes all of it; `""` for the model itself."""
    nodes = {n.name: n for n in gm.graph.nodes}
    homes = {}
    for planned in plan.streams:
        written = [nodes[t.written_by] for t in planned.stream.terms if t.written_by in nodes]
        called = [p for p in common_calls(written) if _can_be_called(model, p)]
        homes[planned.stream.name] = called[-1] if called else ""
    return homes


def _can_be_called(model: nn.Module, path: str) -> bool:
    """Whether a path leads to a module whose call can be seen: one with code of its own, not wrapped already."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    known = not isinstance(module, GraphModule | torch.jit.ScriptModule) and "forward" not in vars(module)
    return path != "" and known and getattr(module, "_compiled_call_impl", None) is None
