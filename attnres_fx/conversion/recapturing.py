"""One more program for a call that none of a converted model's programs fits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnres_fx.capture.captured import Captured
from attnres_fx.capture.captured_module import capture_module
from attnres_fx.capture.isolated_run import Mode
from attnres_fx.config import RewriteConfig
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.rewriting import rewrite_
from attnres_fx.errors import ArgumentError, AttnResError, ExampleError
from attnres_fx.passes import Replacement, analyze_, topology_of


@dataclass(frozen=True)
class Recapturing:
    """Captures a call from the original's Python and rewrites it with the parameters the model has.

    Attributes:
        config: Of the conversion.
    """

    config: RewriteConfig

    def __call__(
        self,
        converted: ConvertedModel,
        source: nn.Module,
        mode: Mode,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[Captured, tuple[Replacement, ...]]:
        """The capture of a call in one mode, rewritten, and its reads.

        Raises:
            ArgumentError: The call cannot be captured, or does not have the reads of the model.
        """
        try:
            captured = capture_module(source, args, dict(kwargs), None, (mode,), as_called=True, hooks="stateless")
            graph = captured.graphs[mode]
            streams = analyze_(graph.gm)
            names = {s.stream.name for s in converted.report.streams}
            selected = tuple(s for s in streams.streams if s.name in names)
            plan = topology_of(self.config).plan(streams, selected, self.config)
            have, want = {r.read for r in plan.reads}, set(converted.attnres.reads.names)
            if have != want:
                raise ArgumentError(_other_reads(sorted(have - want), sorted(want - have)))
            return captured, rewrite_(graph.gm, streams, plan, converted.attnres)
        except ArgumentError:
            raise
        except ExampleError as error:
            raise ArgumentError(str(error)) from error
        except AttnResError as error:
            text = f"Captured as a call of another kind, it fails: {error}"
            if "ax.compile" not in text:
                text += " ax.compile of the original keeps its Python and takes any call."
            raise ArgumentError(text) from error


def _other_reads(fresh: Sequence[str], missing: Sequence[str]) -> str:
    """Why a call whose streams are read elsewhere cannot be served, by convert() or by ax.compile."""
    differences = [f"{verb} {', '.join(names[:4])}" for verb, names in (("reads", fresh), ("lacks", missing)) if names]
    return (
        f"Such a call has another residual stream than the one that was converted (it {' and '.join(differences)}), "
        f"and the added parameters belong to that one's reads; neither convert() nor ax.compile can serve both. Let "
        f"the model add the same terms to its stream in every call (what comes from a cache belongs inside a branch), "
        f"or convert a model of its own for such calls, with one of them as the example."
    )
