"""By what a plan knows its model again: names, counts and digests of parameters, no weights."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from attnres_fx.errors import PlanError


@dataclass(frozen=True)
class PartFingerprint:
    """One sublayer, or what precedes the first or follows the last.

    name: as in the costs. parameters: how many tensors. bytes: of all of them. digest: of their names, shapes, dtypes.
    """

    name: str
    parameters: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class ModelFingerprint:
    """A model as far as a plan depends on it. model: the name of its class."""

    model: str
    before: PartFingerprint
    sublayers: tuple[PartFingerprint, ...]
    after: PartFingerprint

    @property
    def parts(self) -> tuple[tuple[str, PartFingerprint], ...]:
        named = ((f"sublayer {i}", part) for i, part in enumerate(self.sublayers))
        return (
            ("what precedes the first sublayer", self.before),
            *named,
            ("what follows the last sublayer", self.after),
        )


def fingerprint_part(name: str, parameters: Iterable[tuple[str, Tensor]]) -> PartFingerprint:
    """Of the parameters (and buffers) of one part, in any order. Reads no values, so meta tensors will do."""
    found = sorted((n, tuple(map(int, p.shape)), str(p.dtype), p.numel() * p.element_size()) for n, p in parameters)
    text = "\n".join(f"{n} {shape} {dtype}" for n, shape, dtype, _ in found)
    return PartFingerprint(
        name, len(found), sum(size for *_, size in found), hashlib.sha256(text.encode()).hexdigest()[:16]
    )


def check_same_model(planned: ModelFingerprint, given: ModelFingerprint) -> None:
    """Raises PlanError naming the first difference."""
    if planned == given:
        return
    hint = "plan again for this model, or build the stages of the model the plan was made for"
    if planned.model != given.model:
        raise PlanError(f"the plan was made for a {planned.model} and this model is a {given.model}: {hint}.")
    if len(planned.sublayers) != len(given.sublayers):
        raise PlanError(
            f"the plan was made for {len(planned.sublayers)} sublayers and this model has {len(given.sublayers)}: "
            f"{hint}."
        )
    for (place, ours), (_, theirs) in zip(planned.parts, given.parts, strict=True):
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
