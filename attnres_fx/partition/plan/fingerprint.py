"""How a plan recognises its model: names, counts and digests of parameters, no weights."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from attnres_fx.errors import PlanError


@dataclass(frozen=True)
class PartFingerprint:
    """The parameters of one sublayer, or of what precedes the first or follows the last.

    Args:
        name: As in the costs.
        parameters: How many tensors.
        bytes: Of all of them.
        digest: Of their names, shapes and dtypes.
    """

    name: str
    parameters: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class ModelFingerprint:
    """A model as far as a plan depends on it.

    Args:
        model: Name of its class.
        before: What precedes the first sublayer.
        sublayers: In the order of the chain.
        after: What follows the last sublayer.
    """

    model: str
    before: PartFingerprint
    sublayers: tuple[PartFingerprint, ...]
    after: PartFingerprint

    @property
    def parts(self) -> tuple[tuple[str, PartFingerprint], ...]:
        """Every part, with where it stands in words."""
        named = ((f"sublayer {i}", part) for i, part in enumerate(self.sublayers))
        return (
            ("what precedes the first sublayer", self.before),
            *named,
            ("what follows the last sublayer", self.after),
        )


def fingerprint_part(name: str, parameters: Iterable[tuple[str, Tensor]]) -> PartFingerprint:
    """The fingerprint of one part.

    Args:
        name: As in the costs.
        parameters: Its parameters and buffers by name, in any order. Their values are not read: meta tensors will do.
    """
    lines = sorted((n, tuple(map(int, p.shape)), str(p.dtype), p.numel() * p.element_size()) for n, p in parameters)
    text = "\n".join(f"{n} {shape} {dtype}" for n, shape, dtype, _ in lines)
    return PartFingerprint(
        name, len(lines), sum(size for *_, size in lines), hashlib.sha256(text.encode()).hexdigest()[:16]
    )


def check_same_model(planned: ModelFingerprint, actual: ModelFingerprint) -> None:
    """Check that a model is the one that was planned for.

    Args:
        planned: The fingerprint in the plan.
        actual: The fingerprint of the model.

    Raises:
        PlanError: The models differ; the error names the first difference.
    """
    if planned == actual:
        return
    hint = "plan again for this model, or build the stages of the model the plan was made for"
    if planned.model != actual.model:
        raise PlanError(f"the plan was made for a {planned.model} and this model is a {actual.model}: {hint}.")
    if len(planned.sublayers) != len(actual.sublayers):
        raise PlanError(
            f"the plan was made for {len(planned.sublayers)} sublayers and this model has {len(actual.sublayers)}: "
            f"{hint}."
        )
    for (place, ours), (_, theirs) in zip(planned.parts, actual.parts, strict=True):
        for what, was, now in (
            ("name", repr(ours.name), repr(theirs.name)),
            ("number of parameter tensors", ours.parameters, theirs.parameters),
            ("parameter bytes", ours.bytes, theirs.bytes),
            ("parameter names, shapes or dtypes", f"digest {ours.digest}", f"digest {theirs.digest}"),
        ):
            if was != now:
                raise PlanError(
                    f"the plan was made for another model: {place} ({theirs.name}) differs in its {what}, {was} in the "
                    f"plan and {now} in the model; {hint}."
                )
