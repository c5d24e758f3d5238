"""The Python of an original that stands around its forward: taken off a converted model, whose graphs hold it."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from attnres_fx.capture.followed import Followed
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.capture.root_hooks import take_backward_hooks_, take_forward_hooks_
from attnres_fx.capture.signature import has_own_call, parameters_of_call
from attnres_fx.conversion.taken_names import yielded


@dataclass(frozen=True)
class OwnPython:
    """What a converted model must not run again, because its graphs hold it, and what it takes to capture once more.

    Attributes:
        kind: The original's class.
        called: The parameters of a call of the original.
        held: By the attribute that held it, the forward that was set on the original itself, and its forward hooks
            where the graphs hold them.
        methods: Those of the class in which sums of the converted streams are made.
        names: Those of a converted model's own that the original has itself, and keeps.
    """

    kind: type[nn.Module]
    called: inspect.Signature
    held: dict[str, Any]
    methods: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def taken_off_(cls, root: nn.Module, methods: tuple[str, ...], *, hooks: bool) -> Self:
        """Take it off a clone of the original, in place.

        Args:
            root: The clone, which becomes a converted model.
            methods: See the attribute.
            hooks: Whether the graphs hold the forward hooks on the root.
        """
        called = parameters_of_call(root)
        held = take_forward_hooks_(root) if hooks else {}
        if "forward" in root.__dict__:
            held["forward"] = root.__dict__.pop("forward")
        return cls(type(root), called, held, methods, yielded(root))

    def on(self, modules: Mapping[int, nn.Module]) -> Self:
        """The same for a copy of the model, whose modules are given by the ids of this one's."""
        return replace(self, held=Followed(modules)(self.held))

    def original_of(self, model: nn.Module, guarded: Mapping[str, Any], *, hooks: bool) -> nn.Module:
        """A clone of a converted model's tree that is what was converted, on the same tensors.

        Args:
            model: The converted model; its class, and what it holds beside the original's modules, come along no
                further than `_modules` and `__dict__`.
            guarded: By path, the forwards that were set on submodules which raise now when they are called.
            hooks: Whether to keep the hooks that fire around the graphs.
        """
        root, clones = clone_tree(model)
        follow = Followed(clones)
        for path, forward in guarded.items():
            attributes = root.get_submodule(path).__dict__
            attributes.pop("forward", None)
            if forward is not None:
                attributes["forward"] = follow(forward)
        root.__class__ = self.kind
        root.__dict__.pop("forward", None)  # set since, it wraps the converted model's forward
        around = take_forward_hooks_(root)
        if not (hooks or has_own_call(root)):
            take_backward_hooks_(root)
        root.__dict__.update(follow(self.held))
        for name, registered in around.items() if hooks else ():
            root.__dict__[name].update(registered)
        return root
