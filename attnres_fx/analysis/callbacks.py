"""Callbacks that record depth weights while a trainer trains.

Each is made of the trainer's own class of callbacks when the first one is made, so that neither package is imported
before.
"""

from functools import cache
from typing import Any, Self

from torch import nn

from attnres_fx.analysis.extras import needed
from attnres_fx.analysis.weight_watch import WeightWatch
from attnres_fx.errors import MissingPackageError


class _Callback(WeightWatch):
    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        kind: Any = cls
        made: Self = object.__new__(_derived(kind) if "_base" in vars(kind) else kind)
        return made

    def __reduce__(self) -> Any:
        state = {**self.__dict__, "_seen": None}
        return _made_again, (next(k for k in type(self).__mro__ if "_base" in vars(k)), state)


class DepthWeightsCallback(_Callback):
    """For `transformers.Trainer`: depth weights of one call every so many steps, and at the end.

    The model runs in eval mode on a clone; its mode, buffers and the random state stay as they are.

    Args:
        args: Positional arguments of the call: a fixed example, so that steps can be compared.
        kwargs: Keyword arguments of it, e.g. `{"input_ids": ids}`.
        every: Steps.
        to: Path of a CSV file, or a TensorBoard writer, as `log_depth_weights` takes them; None keeps `.history` alone.

    Raises:
        MissingPackageError: transformers is not installed.
    """

    _base = ("transformers", "TrainerCallback", "'attnres-fx[hf]'")

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if model is not None and state.global_step % self.every == 0:
            self.look(model, state.global_step, writes=state.is_world_process_zero)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if model is not None:
            self.look(model, state.global_step, writes=state.is_world_process_zero)


class LightningDepthWeightsCallback(_Callback):
    """The same for Lightning's `Trainer`; the converted or attached model is the module itself or one in it.

    Args:
        args: Positional arguments of the call: a fixed example, so that steps can be compared.
        kwargs: Keyword arguments of it.
        every: Steps.
        to: As for `DepthWeightsCallback`.

    Raises:
        MissingPackageError: Lightning is not installed.
    """

    _base = ("lightning.pytorch|pytorch_lightning", "Callback", "lightning")

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *_: Any, **__: Any) -> None:
        if trainer.global_step and trainer.global_step % self.every == 0:
            self.look(pl_module, trainer.global_step, writes=trainer.is_global_zero)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self.look(pl_module, trainer.global_step, writes=trainer.is_global_zero)


@cache
def _derived(kind: type[_Callback]) -> type[Any]:
    """The callback as a class of the trainer's."""
    modules, name, install = kind._base  # type: ignore[attr-defined]
    *first, last = modules.split("|")
    for module in first:
        try:
            return _joined(kind, getattr(needed(module, install, kind.__name__), name))
        except MissingPackageError:
            continue
    return _joined(kind, getattr(needed(last, install, kind.__name__), name))


def _joined(kind: type[_Callback], base: type[Any]) -> type[Any]:
    return type(kind.__name__, (kind, base), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _made_again(kind: type[_Callback], state: dict[str, Any]) -> Any:
    callback = kind.__new__(kind)
    callback.__dict__.update(state)
    return callback
