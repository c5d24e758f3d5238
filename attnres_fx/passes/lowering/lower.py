"""The passes that lower depth attention to fused and batched operators, their switches and their order."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch.fx import GraphModule

from attnres_fx.errors import ConfigError
from attnres_fx.passes.graph.result import PassResult, run_pass
from attnres_fx.passes.lowering.fuse_norms import fuse_norms_pass
from attnres_fx.passes.lowering.fuse_partial_sums import fuse_partial_sums_pass
from attnres_fx.passes.lowering.thread_gradients import thread_gradients_pass
from attnres_fx.passes.lowering.two_phase import two_phase_pass
from attnres_fx.passes.normalize.normalization import set_attribute_values_


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """Which of the lowering passes run.

    fuse_norms: fold the norm after a read into it. fuse_partial_sums: fold in the addition before it.
    two_phase: `"auto"` (a block at a time, where fewer bytes move), True (every block) or False.
    thread_gradients: let backward add up a source's gradients inside the reads; `"auto"` on a CUDA device.

    Raises ConfigError for other values.
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


def checked_lowering(given: Any) -> Lowering:
    """Lowering() for None, and what a dict of its fields says. Raises ConfigError for anything else."""
    if given is None or isinstance(given, Lowering):
        return given or Lowering()
    names = [f.name for f in fields(Lowering)]
    if not isinstance(given, Mapping):
        raise ConfigError(f"lowering is a {type(given).__name__}; it must be a Lowering, or a dict of its fields.")
    if unknown := sorted(set(given) - set(names), key=str):
        raise ConfigError(f"lowering has no {', '.join(map(repr, unknown))}; it has {', '.join(names)}.")
    return Lowering(**given)


def lower_(gm: GraphModule, lowering: Lowering | None = None, *, training: bool = True) -> tuple[PassResult, ...]:
    """Lower the reads of a graph, in place; results are what they were to rounding. Run again it changes nothing.

    gm: a graph that holds depth attention, with values on its nodes. lowering: Lowering(). training: whether
    gradients will be taken, which decides what is cheaper.
    """
    lowering = lowering or Lowering()
    set_attribute_values_(gm)
    results = []
    if lowering.two_phase is not False:
        # First: it looks for reads with the same sources, which the others fold into something else.
        results.append(run_pass(two_phase_pass, gm, choose=lowering.two_phase, training=training))
    if lowering.fuse_partial_sums:
        # Before the norms: an addition is folded only where nothing sees the sum before the read does, and a read
        # that holds its norm already is left alone.
        results.append(run_pass(fuse_partial_sums_pass, gm))
    if lowering.fuse_norms:
        results.append(run_pass(fuse_norms_pass, gm))  # last: whatever form the read has by now
    if lowering.thread_gradients is not False and training:
        # After all that folds into reads, which look for reads that hand nothing on.
        results.append(run_pass(thread_gradients_pass, gm, choose=lowering.thread_gradients))
    if any(r.modified for r in results):
        gm.recompile()
    return tuple(results)
