"""Calls of compiled models that FSDP2 has sharded, by blocks too: its hooks run around the call, and not inside of it.

A hook of a block gathers the block's weights when the block begins, which in a model compiled as a whole is in the
middle of a graph that took the weights as its inputs. So all blocks are gathered before the graph runs, the outermost
first. What a rank keeps between steps (weights, gradients, the optimizer's state) is sharded as ever.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from attnres_fx.errors import BackendError

_FSDP = "torch.distributed.fsdp"


def run_sharded(model: nn.Module, compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a compiled model, with the hooks that FSDP2 put into it around the call.

    Args:
        model: The model, sharded or not.
        compiled: What a call of it runs.
        args: Of the call.
        kwargs: Of the call.

    Raises:
        BackendError: A block has a mixed precision of its own, whose casts no hook around the call can make.
    """
    if _FSDP not in sys.modules or not _is_sharded(model):
        return compiled(*args, **kwargs)
    sharded = [m for m in model.modules() if _is_sharded(m)]
    _check_precision(model, sharded)
    with _taken_off(sharded, "_forward_pre_hooks") as before, _taken_off(sharded, "_forward_hooks") as after:
        for module, hook in before:
            if module is model:
                args, kwargs = hook(module, args, kwargs)
            else:  # nothing of a block's own goes in: the model's hook has cast what there is to cast
                hook(module, (), {})
        output = compiled(*args, **kwargs)
        for module, hook in reversed(after):
            output = hook(module, (), output)
    return output


def _is_sharded(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


@contextlib.contextmanager
def _taken_off(modules: list[nn.Module], kind: str) -> Iterator[list[tuple[nn.Module, Any]]]:
    """FSDP's hooks of a kind on these modules, which have only their others inside of this context."""
    held: dict[nn.Module, Mapping[int, Any]] = {m: m.__dict__[kind] for m in modules}
    found = [(m, hook) for m in modules for hook in held[m].values() if _is_fsdps(hook)]
    for module, hooks in held.items():
        module.__dict__[kind] = type(hooks)((i, h) for i, h in hooks.items() if not _is_fsdps(h))  # type: ignore[call-arg]
    try:
        yield found
    finally:
        for module, hooks in held.items():
            module.__dict__[kind] = hooks


def _is_fsdps(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)


def _check_precision(model: Any, sharded: list[nn.Module]) -> None:
    """A block may cast what goes into it only as the whole model does."""
    own = _policy(model)
    for module in sharded:
        policy = _policy(module)
        casts = policy is not None and ((policy.param_dtype and policy.cast_forward_inputs) or policy.output_dtype)
        if casts and policy != own:
            name = next(path for path, m in model.named_modules() if m is module)
            raise BackendError(
                f"{name} is sharded with a mixed precision of its own, and in a graph of the whole model nothing is "
                f"cast where a block begins: give fully_shard(model) and its blocks one mp_policy, or the block one "
                f"with cast_forward_inputs=False and no output_dtype."
            )


def _policy(module: Any) -> Any:
    return getattr(module._get_fsdp_state(), "_mp_policy", None)
