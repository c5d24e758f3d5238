"""The graph of an original, and the check that it computes what the original does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from attnres_fx.analysis.profile_places import Places, places_of_sum
from attnres_fx.capture.capture import capture
from attnres_fx.capture.isolated_run import Mode, isolated_clone, run_untouched
from attnres_fx.capture.restore import restore_autograd_pass
from attnres_fx.config import AttnResConfig
from attnres_fx.conversion.comparison import differences_of
from attnres_fx.conversion.source_model import model_name, refuse_converted
from attnres_fx.conversion.trial import HeldTensor, Outcome
from attnres_fx.errors import CheckError
from attnres_fx.passes import analyze_
from attnres_fx.passes.streams.selection import select_streams


@dataclass(frozen=True)
class ProfiledGraph:
    """A graph to be measured, on a clone of its model.

    Attributes:
        gm: The graph.
        inputs: Flat inputs.
        out_spec: Pytree of its result; None where it returns it as it is.
        places: Where to look.
        kwargs: Of the call, with those that the capture bound.
    """

    gm: GraphModule
    inputs: list[Any]
    out_spec: Any
    places: Places
    kwargs: dict[str, Any]


def sum_graph(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> ProfiledGraph:
    """The graph of a call of an original, in the mode that it is in; the model is left as it is."""
    refuse_converted(model)
    mode = _mode(model)
    clone = isolated_clone(model)
    captured = capture(clone, args, kwargs, modes=(mode,))
    graph = next(iter(captured.graphs.values()))
    found = analyze_(graph.gm)
    selected = select_streams(found, AttnResConfig(), model_name(model))
    places = places_of_sum(graph.gm, found, selected)
    restore_autograd_pass(graph.gm)
    graph.gm.recompile()
    given, named = captured.signature.bind(tuple(args), dict(kwargs or {}))
    inputs = list(given) if captured.in_spec is None else pytree.tree_leaves((given, named))
    return ProfiledGraph(graph.gm, inputs, graph.out_spec, places, captured.kwargs)


def require_agreement(model: nn.Module, outputs: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise CheckError where a model returns something else than its graph did, from the same random state."""
    expected = run_untouched(model, tuple(args), kwargs, _mode(model))
    differences = list(differences_of(_outcome(expected), _outcome(outputs)))
    if wrong := [d for d in differences if not d.passed]:
        raise CheckError(
            f"the captured graph of {model_name(model)} does not compute what the model does: {wrong[0]}. This is a "
            f"defect of attnres_fx, or the capture lost something: compare with torch.compile(model, backend='eager')."
        )


def _outcome(outputs: Any) -> Outcome:
    leaves = pytree.tree_flatten_with_path(outputs)[0]
    held = {pytree.keystr(p): HeldTensor(x.detach(), False) if isinstance(x, Tensor) else x for p, x in leaves}
    return Outcome(held, {}, {})


def _mode(model: nn.Module) -> Mode:
    return "train" if model.training else "eval"
