"""What a converted model takes for granted of its module tree, and the error when that was changed.

A converted model runs a graph, so a hook, another module or another number put into its tree would do nothing. The
next call says so instead.
"""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from attnres_fx.capture.held_values import Library
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.capture.watched import WatchedValue
from attnres_fx.conversion.around_forward import refuse_around
from attnres_fx.conversion.watch_list import WatchList
from attnres_fx.errors import EditedError

#: Changes of the original that a converted model follows by being captured again.
MOST_FOLLOWED = 16

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")

_DISTRIBUTED = (
    "Shard a converted model as a whole, fully_shard(model), or use ax.compile: shard or parallelize its blocks after "
    "ax.attach."
)
_WAY_OUT = "Do it to the original before convert(), or use ax.compile, which runs the model's own modules."


@dataclass(frozen=True)
class _ModuleState:
    """A module as it was at the conversion."""

    path: str
    module: nn.Module
    kind: type
    children: tuple[nn.Module | None, ...]
    hooks: int


class EditGuard:
    """Compares a module tree with what it was when its graphs were captured.

    Args:
        root: The converted model. Hooks on the root itself work, and are not compared.
        skipped: Names of the root's children that belong to the library.
        original: The model that was converted, which shares its weights: what the graphs hold of it is compared too.
        base: The original's class.
    """

    def __init__(
        self, root: nn.Module, skipped: Sequence[str], original: nn.Module | None, base: type[nn.Module] | None
    ) -> None:
        self.skipped = tuple(skipped)
        self.states = tuple(_state_of(path, m) for path, m in _tree(root, self.skipped))
        self.children = _children(root, self.skipped)
        self.modules = {state.path: state.module for state in self.states}
        self.values = WatchList(base)
        self.original = weakref.ref(original) if original is not None else None
        self.original_values = WatchList()
        self.global_hooks = _global_hooks()
        self.stale: set[Mode] = set()
        self.followed = 0

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model makes a guard of its own."""

    def watch(self, root: nn.Module, values: Iterable[WatchedValue]) -> None:
        """Compare these values too, in the original, and in this tree unless it is behind a change of the original."""
        values = tuple(values)
        if not self.followed:
            self.values.add(root, values)
        self._watch_original(values)

    def watch_only(self, root: nn.Module, values: Iterable[WatchedValue]) -> None:
        """Compare these values of this tree, and no others."""
        if self.followed:
            return
        self.values = WatchList(self.values.base)
        self.values.add(root, values)

    def check(self, root: nn.Module) -> None:
        """Compare.

        Raises:
            EditedError: Something was changed that a call would not see; it is named.
        """
        if (children := _children(root, self.skipped)) != self.children:
            raise EditedError(f"{_change_of(self.children, children)}: that has no effect. {_WAY_OUT}")
        for state in self.states:
            module = state.module
            if type(module) is not state.kind or tuple(module._modules.values()) != state.children:
                self._check_module(state)
            if _hook_count(module) != state.hooks:
                raise EditedError(
                    f"a hook was put on {state.path} (a {state.kind.__name__}) or taken from it after the conversion: "
                    f"a converted model runs a graph, and hooks on its submodules do not fire. "
                    f"{_way_out(module)}"
                )
        if _global_hooks() > self.global_hooks:
            raise EditedError(
                f"a hook for all modules was registered: hooks on the submodules of a converted model do not fire. "
                f"{_WAY_OUT}"
            )
        if (changed := self.values.changed(root)) is not None:
            raise EditedError(_changed(*changed))

    def follow(self) -> None:
        """Count one more change of the original that is followed.

        Raises:
            EditedError: The original was changed too often for that.
        """
        self.followed += 1
        if self.followed > MOST_FOLLOWED:
            raise EditedError(
                f"the original was changed {self.followed} times since the conversion, and each change makes the "
                f"converted model be captured again: convert it when its numbers are final, or use ax.compile."
            )

    def watch_original_anew(self, mode: Mode, values: Iterable[WatchedValue]) -> None:
        """From now on compare the original with what a fresh program of this mode holds of it."""
        modes: set[Mode] = {"train", "eval"}
        self.stale = (self.stale or modes) - {mode}
        self.original_values = WatchList()
        self._watch_original(values)

    def _watch_original(self, values: Iterable[WatchedValue]) -> None:
        original = self.original() if self.original is not None else None
        if original is not None:
            self.original_values.add(original, values)

    def original_changed(self, mode: Mode) -> str:
        """What of the original differs from what the program of a mode holds, in words; empty where nothing does."""
        if mode in self.stale:
            return "the original was changed"
        original = self.original() if self.original is not None else None
        changed = self.original_values.changed(original) if original is not None else None
        if changed is None:
            return ""
        value, now = changed
        return f"{value} of the original is {now!r} and was {value.value!r}"

    def _check_module(self, state: _ModuleState) -> None:
        module = state.module
        children = tuple(c for n, c in module._modules.items() if n != "parametrizations")
        if parametrize.is_parametrized(module) and state.kind in type(module).__mro__ and children == state.children:
            return  # the graph asks for the weight by name, and gets what the parametrization makes of it
        what = f"became a {type(module).__name__}" if type(module) is not state.kind else "got other children"
        raise EditedError(
            f"{state.path} (a {state.kind.__name__}) {what} after the conversion: a converted model runs a graph, and "
            f"modules put into its tree (adapters, quantised or sharded layers) have no effect. "
            f"{_way_out(module)}"
        )


def _way_out(module: nn.Module) -> str:
    """What to do instead of a change to this module: what shards or parallelizes it left DTensors in it."""
    sharded = any(type(p).__name__ == "DTensor" for p in module._parameters.values())
    sharded = sharded or any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
    return _DISTRIBUTED if sharded else _WAY_OUT


def _tree(root: nn.Module, skipped: Sequence[str]) -> list[tuple[str, nn.Module]]:
    added = [m for name in skipped if (m := root._modules.get(name)) is not None]
    inside = {id(m) for child in added for m in child.modules()}
    return [(p, m) for p, m in root.named_modules() if p and id(m) not in inside]


def _state_of(path: str, module: nn.Module) -> _ModuleState:
    return _ModuleState(path, module, type(module), tuple(module._modules.values()), _hook_count(module))


def _children(root: nn.Module, skipped: Sequence[str]) -> list[tuple[str, int]]:
    """In order: the forward of a container goes by it."""
    return [(n, id(m)) for n, m in root._modules.items() if n not in skipped]


def _change_of(children: list[tuple[str, int]], now: list[tuple[str, int]]) -> str:
    """What was done to the root's children since the conversion."""
    before, after = dict(children), dict(now)
    for name, module in after.items():
        if name not in before:
            return f"the module {name!r} was added to the converted model"
        if module != before[name]:
            return f"the module {name!r} of the converted model was replaced"
    gone = [name for name in before if name not in after]
    return (
        f"the module {gone[0]!r} was taken out of the converted model"
        if gone
        else "the modules of the converted model were put in another order"
    )


def _hook_count(module: nn.Module) -> int:
    held = module.__dict__
    return sum(len(held[name]) for name in _HOOKS)


def _global_hooks() -> int:
    return sum(len(getattr(torch.nn.modules.module, name)) for name in _GLOBAL_HOOKS)


def _changed(value: WatchedValue, now: Any) -> str:
    was = value.value
    differs = "is another object than" if repr(now) == repr(was) else f"is {now!r} and was {was!r}"
    about = {
        "value": f"{value} of the converted model {differs}",
        "attribute": f"{value} of the converted model {differs}",
        "type": f"the type of {value} of the converted model {differs}",
        "length": f"the length of {value} of the converted model {differs}",
        "keys": f"the keys of {value} of the converted model are others than",
        "key": f"{value} of the converted model {'holds' if now is True else 'does not hold'} {value.key!r}, unlike",
        "has": f"{value} of the converted model {'was set' if now is True else 'was deleted'}, unlike",
        "submodule": f"{value} of the converted model is another module than {was}, which it was",
    }
    return (
        f"{about[value.aspect]} at the conversion, and the graph holds what it was: convert the model again after "
        f"the change, or use ax.compile, which runs the model's own Python."
    )


def refuse_forward(path: str, kind: str, *_: Any, **__: Any) -> Any:
    """Stands in for the forward of a submodule whose own code would compute plain residuals."""
    raise EditedError(
        f"{path} (a {kind}) of a converted model was called by itself: its own code adds plain residuals, and only the "
        f"whole model runs the converted graph. Use ax.compile, or call the original."
    )


def refuse_forwards(root: nn.Module, paths: Iterable[str]) -> None:
    """Let the submodules at these paths raise when they are called by themselves."""
    for path in paths:
        module = root.get_submodule(path)
        module.__dict__["forward"] = Library(refuse_forward, path, type(module).__name__)


def refuse_around_forward(root: nn.Module, guarded: dict[str, Any], paths: Iterable[str]) -> None:
    """Let the submodules at these paths raise when the root's own methods call them.

    Args:
        root: The converted model.
        guarded: By path, the submodules that raise already; it gets the new ones, with the forwards set on them.
        paths: Of the submodules.
    """
    for path in paths:
        if path not in guarded:
            module = root.get_submodule(path)
            guarded[path] = own = module.__dict__.get("forward")
            module.__dict__["forward"] = Library(refuse_around, path, module, own)


def guard_forwards(root: nn.Module, guarded: dict[str, Any], paths: Iterable[str]) -> None:
    """Let further submodules raise when they are called by themselves.

    Args:
        root: The converted model.
        guarded: By path, those that do already, with the forwards that were set on them; it gets the new ones.
        paths: Of the submodules.
    """
    fresh = [path for path in paths if path not in guarded]
    guarded.update({path: root.get_submodule(path).__dict__.get("forward") for path in fresh})
    refuse_forwards(root, fresh)
