"""The passes that lower depth attention to fused and batched operators, their switches and their order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch.fx import GraphModule

from attnres_fx.errors import ConfigError
from attnres_fx.passes.graph.result import PassResult, run_pass
from attnres_fx.passes.lowering.fuse_norms import fuse_norms_pass
from attnres_fx.passes.lowering.fuse_partial_sums import fuse_partial_sums_pass
from attnres_fx.passes.lowering.thread_gradients import AUTO_DEVICE, thread_gradients_pass
from attnres_fx.passes.lowering.two_phase import two_phase_pass
from attnres_fx.passes.normalize.normalization import set_attribute_values_


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """Which of the lowering passes run.

    Args:
        fuse_norms: fold the norm after a read into it.
        fuse_partial_sums: fold in the addition before it.
        two_phase: `"auto"` (a block at a time, where fewer bytes move), True (every block) or False.
        thread_gradients: let backward add up a source's gradients inside the reads; `"auto"` on a CUDA device.

    Raises:
        ConfigError: a field has another value.
    """

    fuse_norms: bool = True
    fuse_partial_sums: bool = True
    two_phase: bool | Literal["auto"] = "auto"
    thread_gradients: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("fuse_norms", "fuse_partial_sums"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"Lowering: {name} is {getattr(self, name)!r}; it must be True or False.")
        for name in ("two_phase", "thread_gradients"):
            value = getattr(self, name)
            if not isinstance(value, bool) and value != "auto":
                raise ConfigError(f"Lowering: {name} is {value!r}; it must be True, False or 'auto'.")


def checked_lowering(lowering: Any) -> Lowering:
    """A `Lowering` from what a user wrote.

    Args:
        lowering: a `Lowering`, a mapping of its fields, or None for the defaults.

    Returns:
        The options, all of them valid.

    Raises:
        ConfigError: it is anything else, or a field is unknown or has a value it cannot have.
    """
    if lowering is None or isinstance(lowering, Lowering):
        return lowering or Lowering()
    names = [f.name for f in fields(Lowering)]
    if not isinstance(lowering, Mapping):
        raise ConfigError(f"lowering is a {type(lowering).__name__}; it must be a Lowering, or a dict of its fields.")
    if unknown := sorted(set(lowering) - set(names), key=str):
        raise ConfigError(f"lowering has no {', '.join(map(repr, unknown))}; it has {', '.join(names)}.")
    return Lowering(**lowering)


@dataclass(frozen=True, kw_only=True)
class LoweringPass:
    """A pass in its place among the others.

    Args:
        run: The pass, `(gm, *, ...) -> PassResult`.
        switch: The field of `Lowering` that turns it on and off.
        reason: Why it stands where it stands.
        takes: Which of the options `choose` (the switch's value) and `training` it is called with.
        training_only: Whether it runs only where gradients will be taken.
        auto_device: Under `"auto"` it changes reads on this type of device alone; None for any.
    """

    run: Callable[..., PassResult]
    switch: str
    reason: str
    takes: tuple[Literal["choose", "training"], ...] = ()
    training_only: bool = False
    auto_device: str | None = None

    @property
    def name(self) -> str:
        """The name of the pass, as the log has it."""
        return self.run.__name__

    @property
    def default(self) -> bool | Literal["auto"]:
        """What its switch says when nobody sets it."""
        value: bool | Literal["auto"] = getattr(Lowering, self.switch)
        return value


#: The passes that lower a graph, in the order they run in.
LOWERING_PASSES = (
    LoweringPass(
        run=two_phase_pass,
        switch="two_phase",
        reason="it looks for equal sources, which the others fold away",
        takes=("choose", "training"),
    ),
    LoweringPass(
        run=fuse_partial_sums_pass,
        switch="fuse_partial_sums",
        reason="before the norms: a read that holds its norm is left alone",
    ),
    LoweringPass(
        run=fuse_norms_pass,
        switch="fuse_norms",
        reason="whatever form the read has by then",
    ),
    LoweringPass(
        run=thread_gradients_pass,
        switch="thread_gradients",
        reason="the others look for reads that hand nothing on",
        takes=("choose",),
        training_only=True,
        auto_device=AUTO_DEVICE,
    ),
)


def lower_(gm: GraphModule, lowering: Lowering | None = None, *, training: bool = True) -> tuple[PassResult, ...]:
    """Lower the reads of a graph, in place, by `LOWERING_PASSES`; run again it changes nothing.

    Args:
        gm: a graph that holds depth attention, with values on its nodes.
        lowering: which passes run; None for `Lowering()`.
        training: whether gradients will be taken, which decides what is cheaper.

    Returns:
        What each pass that ran did, in order. The graph's results are what they were, to rounding.
    """
    lowering = lowering or Lowering()
    set_attribute_values_(gm)
    results = []
    for step in LOWERING_PASSES:
        choose = getattr(lowering, step.switch)
        if choose is False or (step.training_only and not training):
            continue
        options = {"choose": choose, "training": training}
        results.append(run_pass(step.run, gm, **{name: options[name] for name in step.takes}))
    if any(r.modified for r in results):
        gm.recompile()
    return tuple(results)
