"""Another output mode, eps and blocks for a model that is converted or attached already, in place."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from attnres_fx.capture.recorder import CAPTURE_LOCK
from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.conversion_call import ConversionCall
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.deferred import DeferredMode
from attnres_fx.conversion.kept_programs import drop_unused_constants
from attnres_fx.conversion.recapturing import Recapturing
from attnres_fx.errors import AttnResError, SaveError
from attnres_fx.parameters import AttnResParameters
from attnres_fx.passes.schedule import plan_schedule
from attnres_fx.state_config import MadeFor, StreamBlocks, shown_config


def reconfigure_(owner: nn.Module, attnres: AttnResParameters, config: AttnResConfig) -> None:
    """Let a model read as another config says, with the parameters that it has.

    Args:
        owner: A converted or attached model. It is as it was where this fails.
        attnres: Its parameters; those of the other config have the same names and shapes.
        config: The other config.

    Raises:
        SaveError: The model holds no Python of its original, or cannot be captured under the config.
    """
    if not isinstance(owner, ConvertedModel):
        attnres.set_made_for(_made_for(attnres, config))  # what is compiled is compiled again
        return
    reconfigure = owner._attnres_conversion.reconfigure
    if reconfigure is None:
        raise SaveError(
            f"this {type(owner).__name__} was made from a graph or a file, and cannot be rewritten: convert the "
            f"original with config={shown_config(config)}, and load this into the result"
        )
    reconfigure(owner, config)


@dataclass(frozen=True, eq=False)
class Reconfiguring:
    """Captures and rewrites a converted model's programs anew, with its parameters and another config.

    Attributes:
        call: What the model was converted with.
        tree: The original's modules without their tensors, as they were at the conversion.
        pickled: Says, for such a call, what a pickle of the model calls.
    """

    call: ConversionCall
    tree: nn.Module
    pickled: Callable[[ConversionCall, ConvertedModel], tuple[Any, ...]]

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # a copy of the model is captured in the same way

    def __call__(self, model: ConvertedModel, config: AttnResConfig) -> None:
        """Do it, in place.

        Raises:
            EditedError: The model was changed in a way that a capture does not see.
            SaveError: A mode cannot be captured under the config; the model is as it was.
        """
        with CAPTURE_LOCK:
            conversion = model._attnres_conversion
            if conversion.edits is not None:
                conversion.edits.check(model)
            conversion.note_tensors(model)
            # Not checked: means are not what the original computes.
            call = dataclasses.replace(self.call, config=config, check=False)
            before, report = model.attnres.made_for, dataclasses.replace(conversion.report)
            modes = {mode: DeferredMode(mode, call, self.tree) for mode in (*conversion.programs, *conversion.deferred)}
            model.attnres.set_made_for(_made_for(model.attnres, config))
            try:
                programs = {mode: modes[mode](model) for mode in conversion.programs}
            except BaseException as error:
                model.attnres.set_made_for(before)
                conversion.report.take(report)
                if not isinstance(error, AttnResError):
                    raise
                raise SaveError(f"the model cannot be rewritten with {shown_config(config)}: {error}") from error
            conversion.programs, conversion.deferred = programs, {m: modes[m] for m in conversion.deferred}
            conversion.further.clear()
            conversion.outdated.clear()
            conversion.recapture = Recapturing(config)
            conversion.reconfigure = dataclasses.replace(self, call=call)
            conversion.pickled = functools.partial(self.pickled, call)
            drop_unused_constants(model)
            conversion.watch_anew(model)


def _made_for(attnres: AttnResParameters, config: AttnResConfig) -> MadeFor:
    """A config with the blocks that it gives the streams of a model."""
    counts = {blocks.stream: blocks.sublayers for blocks in attnres.made_for.blocks}
    blocks = (StreamBlocks(name, plan_schedule(count, config).starts, count) for name, count in counts.items())
    return MadeFor(config, tuple(blocks))
