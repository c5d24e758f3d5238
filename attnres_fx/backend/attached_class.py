"""The class of an attached module: its own, with a forward that hands its queries to the graph."""

import contextlib
import functools
import logging
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnres_fx.backend.attachment import ATTRIBUTE
from attnres_fx.backend.plain_runs import runs_plain
from attnres_fx.backend.sharded_blocks import run_sharded
from attnres_fx.capture.isolated_run import fast_path_off
from attnres_fx.conversion.around_forward import WAY_OUT
from attnres_fx.conversion.pretrained_folder import saving_methods
from attnres_fx.errors import AttachError, BackendError, EagerCallError
from attnres_fx.ops.marker import PARAMETERS
from attnres_fx.parameters import check_state

#: The attribute, of an attached model and of its parts, that holds its AttachedParameters and its path in the model.
HELD = "_attnres_attached"
#: Graphs that one forward may need: shapes, caches, modes, gradients on and off, a few models of one class.
MOST_GRAPHS = 64
_DYNAMOS_OWN_LIMIT = 8
#: How the names of what writes a log line begin, libraries' own (`warning_once`) among them.
_LEVELS = ("debug", "info", "warning", "warn", "error", "exception", "critical", "fatal", "log")


_MODULES: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()


def registered_models() -> list[nn.Module]:
    """All modules with an attached class, copies and what was unpickled among them."""
    return list(_MODULES.values())


def attach_class_(module: nn.Module, methods: tuple[str, ...] = ()) -> None:
    """Give a module a class that differs from its own in `forward` and `compile` alone, in place.

    Args:
        module: The module.
        methods: Of its class, those that add to an attached stream: outside of a compiled forward they raise.
    """
    module.__class__ = _attached_class(cast(Any, type(module)), methods)
    _MODULES[id(module)] = module


def detach_class_(module: nn.Module) -> None:
    """Give a module its own class back, in place, and let it run uncompiled."""
    module.__class__ = vars(type(module))["_attnres_base"]
    del module.__dict__[HELD]
    module._compiled_call_impl = None


def has_attached_class(module: nn.Module) -> bool:
    """Whether a module's class is still the one that it was given when it was attached."""
    return "_attnres_base" in vars(type(module))


@functools.cache
def _attached_class(base: Any, methods: tuple[str, ...]) -> Any:
    """The class for all modules of one class, so that copies and pickles have it too."""
    original = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached, path = self.__dict__[HELD]
        # What runs plain is for this thread and task alone. A graph is for all of them, so none is traced plain.
        if torch.compiler.is_dynamo_compiling() or not runs_plain(attached):
            PARAMETERS(attached.tensors(path), attached.abouts[path])
        return original(self, *args, **kwargs)

    def compile(self: Any, *args: Any, **kwargs: Any) -> None:
        base.compile(self, *args, **kwargs)
        self._compiled_call_impl = _call(self, self._compiled_call_impl)
        attached, path = self.__dict__[HELD]
        if path == "":
            for part in attached.parts_of(self):
                part.compile(*args, **kwargs)

    def load_from_state_dict(self: Any, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        check_state(self, state_dict, prefix)  # before any parameter is loaded
        base._load_from_state_dict(self, state_dict, prefix, *args)

    def reduce(self: Any, _: Any) -> Any:
        return _new_instance, (base, methods), self.__getstate__()

    members = {"forward": functools.wraps(original)(_with_own_code(forward)), "compile": compile}
    members |= saving_methods(base, _why_not_saved)
    members |= {"_attnres_base": base, "__reduce_ex__": reduce, "_load_from_state_dict": load_from_state_dict}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    refusing = {name: _refusing_outside_forward(getattr(base, name)) for name in methods}
    return type(base.__name__, (base,), {**names, **refusing, **members})


def _why_not_saved(module: nn.Module) -> str:
    """Why an attached module cannot be saved by itself: its reads belong to the model that it is a part of."""
    path = module.__dict__[HELD][1]
    if path == "":
        return ""
    return f"this {type(module).__name__} is {path!r} of an attached model, which has the reads: save that."


def _refusing_outside_forward(method: Any) -> Any:
    """A method of an attached model that adds to its streams: it runs in a compiled forward, and plain on purpose."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (torch.compiler.is_dynamo_compiling() or runs_plain(self.__dict__[HELD][0])):
            raise EagerCallError(
                f"{method.__name__} of an attached model was called by itself: it adds plain residuals, and only what "
                f"forward does is compiled. {WAY_OUT} `with attnres_fx.plain(model):` runs it as it is."
            )
        return method(self, *args, **kwargs)

    return run


def _new_instance(base: Any, methods: tuple[str, ...] = ()) -> Any:
    attached = _attached_class(base, methods)
    module = attached.__new__(attached)
    _MODULES[id(module)] = module
    return module


def _with_own_code(function: Any) -> Any:
    """The function on a code object of its own: Dynamo counts the graphs of each, and classes do not share one."""
    code = function.__code__
    return types.FunctionType(
        code.replace(co_name=code.co_name), function.__globals__, function.__name__, None, function.__closure__
    )


def _call(model: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What a call of a compiled model runs: its graphs, or outside of them its original function."""

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or runs_plain(model.__dict__[HELD][0]):
            return model._call_impl(*args, **kwargs)
        model.__dict__[HELD][0].check_written()
        _check_parameters(model)
        with fast_path_off(), _more_graphs(), _log_lines_left_out(), _numbers_of_modules(args, kwargs):
            try:
                return run_sharded(model, compiled, args, kwargs)
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                raise BackendError(_limit_message(model)) from error

    return call


def _check_parameters(model: nn.Module) -> None:
    """Raise AttachError where the model's parameters were put aside for others, which no graph would take."""
    attached, path = model.__dict__[HELD]
    now = model._modules.get(ATTRIBUTE)
    if path == "" and now is not attached:
        raise AttachError(
            f"{type(model).__name__}.attnres is a {type(now).__name__} now, whose queries would be trained and not be "
            f"used (PEFT makes copies of what modules_to_save names). Leave attnres as it is: let its own parameters "
            f"train, model.attnres.requires_grad_(True), and save them by attnres_fx.save_adapter; or put adapters "
            f"into the model first and compile it afterwards."
        )


def _more_graphs() -> contextlib.AbstractContextManager[object]:
    """Room for the graphs of an attached model, unless the user has set a limit."""
    if torch._dynamo.config.recompile_limit != _DYNAMOS_OWN_LIMIT:
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[object] = torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS)
    return patched


def _log_lines_left_out() -> contextlib.AbstractContextManager[object]:
    """A line that forward logs is no reason to end a graph; Dynamo can only leave it out."""
    logged = {f for name, f in vars(logging.Logger).items() if name.split("_")[0] in _LEVELS}
    ignored = torch._dynamo.config.ignore_logging_functions | logged
    patched: contextlib.AbstractContextManager[object] = torch._dynamo.config.patch(ignore_logging_functions=ignored)
    return patched


def _numbers_of_modules(*arguments: Any) -> contextlib.AbstractContextManager[object]:
    """Numbers that modules hold are part of a graph, as an eps is, and only a float among the arguments is an input.

    As inputs, Dynamo traces the model twice for them, and fails at those that a checkpointed region takes.
    """
    if any(isinstance(leaf, float) for leaf in pytree.tree_leaves(arguments)):
        return contextlib.nullcontext()
    patched: contextlib.AbstractContextManager[object] = torch._dynamo.config.patch(specialize_float=True)
    return patched


def _limit_message(model: nn.Module) -> str:
    limit = torch._dynamo.config.recompile_limit
    return (
        f"{type(model).__name__} needs another graph, and the compiler's limit of {limit} for one forward is reached "
        f"(a graph for each kind of call: shapes, caches, train or eval, gradients). Raise "
        f"torch._dynamo.config.recompile_limit (and accumulated_recompile_limit, for many models of one class), or "
        f"look at TORCH_LOGS=recompiles for what changes from call to call; torch.compiler.reset() forgets all graphs."
    )
