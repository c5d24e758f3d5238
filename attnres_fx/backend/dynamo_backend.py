"""The `attnres` backend of `torch.compile`: the rewrite, then AOTAutograd and an inner compiler.

    torch.compile(model, backend="attnres", options={"inner": "inductor"})

Dynamo's graph is copied, rewritten by the passes `convert` uses, and handed on with the inputs it had. Queries and
gains are inputs that Dynamo lifted itself (see `attach`), so every graph of a model uses the model's own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch.fx import GraphModule

from attnres_fx.backend.graph_rewrite import rewrite_graph
from attnres_fx.backend.plain_runs import refusing_plain
from attnres_fx.capture.restore import restore_autograd_pass
from attnres_fx.errors import AttnResError, BackendError
from attnres_fx.passes import checked_lowering

__all__ = ["attnres"]

#: Inner compilers that run a graph of torch functions as it is. What Dynamo records of checkpoints and custom backwards
#: is right only behind AOTAutograd: run as it is, a checkpoint draws other dropout in its recomputation.
RUNS_GRAPHS_EAGERLY = ("eager", "eager_noexcept", "eager_debug", "pre_dispatch_eager")

OPTIONS = ("inner", "mode", "inductor", "lowering")


def attnres(gm: GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
    """The backend: rewrites a graph of an attached model and compiles it.

    A graph that reads through depth attention already is lowered and compiled.

    Args:
        gm: Dynamo's graph; it is left as it is.
        example_inputs: Its inputs, as Dynamo has them.
        **settings: `mode` and `options`, as `torch.compile` passes them. Options are `inner` (any registered backend,
            `"inductor"` by default), `mode` and `inductor` (Inductor's mode and options) and `lowering` (a Lowering
            or a dict of its fields).

    Returns:
        The compiled graph. Where the graph cannot be rewritten or an option is wrong: a function that raises the
        AttnResError when it is first called.
    """
    try:
        options = checked_options(settings.pop("options", None) or {}, settings.pop("mode", None))
        if settings:
            raise BackendError(f"the attnres backend does not know {', '.join(map(repr, sorted(settings)))}.")
        rewritten = rewrite_graph(gm, options["inner"], options["lowering"])
    except AttnResError as error:
        return _raiser(error)  # raised here, it would reach the user inside one of Dynamo's own
    if options["inner"] in RUNS_GRAPHS_EAGERLY:
        restore_autograd_pass(rewritten)
    compiled: Callable[..., Any] = inner_compiler(options)(rewritten, list(example_inputs))
    return refusing_plain(compiled, gm)


def _raiser(error: AttnResError) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise type(error)(str(error)) from error

    disabled: Callable[..., Any] = torch._dynamo.disable(refuse)
    return disabled


def checked_options(options: Mapping[str, Any], mode: str | None) -> dict[str, Any]:
    """Options with their defaults.

    Args:
        options: As a user writes them.
        mode: Inductor's, where it came beside the options.

    Raises:
        BackendError: One of them is unknown, or does not go with another.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise BackendError(
            f"options {', '.join(map(repr, unknown))} are unknown to the attnres backend; it takes "
            f"{', '.join(OPTIONS)}. Inductor's own go under 'inductor'."
        )
    checked = {"inner": "inductor", "mode": mode, "inductor": {}, "lowering": None, **options}
    checked["lowering"] = checked_lowering(checked["lowering"])
    if checked["inner"] == "attnres" or checked["inner"] not in list_backends(exclude_tags=()):
        usual = sorted({*list_backends(), "aot_eager", "eager"} - {"attnres"})
        raise BackendError(f"options['inner'] is {checked['inner']!r}, which is no backend here: {', '.join(usual)}.")
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


def inner_compiler(options: Mapping[str, Any]) -> Callable[..., Any]:
    """The compiler behind the rewrite: (graph, inputs) -> compiled graph."""
    if options["inner"] != "inductor":
        other: Callable[..., Any] = lookup_backend(options["inner"])
        return other
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(options["mode"]) if options["mode"] else {}), **options["inductor"]}
    return lambda gm, inputs: compile_fx(gm, inputs, config_patches=patches or None)
