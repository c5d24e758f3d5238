"""The module that holds the parameters of one hyper-connection."""

import math
from typing import Any

import torch
from torch import Tensor

from attnres_fx.passes.rewrite.hyper_connections.config import HyperConnectionsConfig
from attnres_fx.stream_reads import StreamRead

#: The share of a read, at the start, of the copy that it reads most; the others share the rest.
MOST = 0.7
#: What is added to the logits of copies that change places, at the start: hardly any.
APART = -8.0
#: What dynamic weights are multiplied by at the start (arXiv 2409.19606 and 2512.24880).
SCALE = 0.01


class HyperConnection(StreamRead):
    """Parameters of one read, and of the write before it.

    At the start everything that depends on the token is zero; a write adds the output once to each copy and leaves the
    copies apart; a read takes most of one copy, another one in each sublayer, so that copies become different.

    Args:
        name: Of the read.
        width: D.
        config: The copies, and what their weights depend on.
        place: Sublayers written before the read, which says which copy it reads most.
        writes: Whether it has the weights of the write before it, as the first read behind each sublayer has.
        gated: Whether the read has a gate.
        dtype: Of all parameters; by default torch's default dtype.
        device: Where they are; by default torch's default device.

    Attributes:
        pre: [n], of a read.
        post: [n], of the write; None without one.
        carry: [n, n], of the write: the copy that is written, the copy that it is taken from. None without a write, and
            for the first constrained one: the copies are equal there, which no doubly stochastic matrix changes.
        pre_weight, post_weight, carry_weight: What the dynamic part is computed with; None where not `dynamic`.
            Unconstrained [D], [D] and [n, D]; constrained [n, n D], [n, n D] and [n n, n D].
        pre_scale, post_scale, carry_scale: Scalars.
        gate: A scalar, zero at first, on reads that move a post-norm state; None on others.
    """

    tensor_names = (
        *("pre", "pre_weight", "pre_scale", "post", "post_weight", "post_scale"),
        *("carry", "carry_weight", "carry_scale", "gate"),
    )

    def __init__(
        self,
        name: str,
        width: int,
        *,
        config: HyperConnectionsConfig,
        place: int,
        writes: bool,
        gated: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(name, width)
        self.copies, self.constrained, self.place = config.copies, config.constrained, place
        shapes = connection_shapes(width, config, place=place, writes=writes, gated=gated)
        self.hold_(shapes, dtype=dtype, device=device)

    def initial(self, name: str) -> Tensor:
        """See `StreamRead.initial` and the class."""
        held: Tensor = getattr(self, name)
        match name:
            case "pre":
                most = torch.arange(self.copies, device=held.device) == self.place % self.copies
                if not self.constrained:
                    return most.to(held.dtype)
                rest = (1 - MOST) / (self.copies - 1)
                return torch.where(most, _logit(MOST), _logit(rest)).to(held.dtype)
            case "post":
                return torch.zeros_like(held) if self.constrained else torch.ones_like(held)
            case "carry":
                eye = torch.eye(self.copies, device=held.device)
                return ((1 - eye) * APART if self.constrained else eye).to(held.dtype)
            case "pre_scale" | "post_scale" | "carry_scale":
                return torch.full_like(held, SCALE)
        return torch.zeros_like(held)

    def described(self) -> list[Any]:
        """See `StreamRead.described`; the place and whether it writes follow."""
        return [*super().described(), self.place, self.post is not None]

    def extra_repr(self) -> str:
        writes = "writes and reads" if self.post is not None else "reads"
        gated = ", gated" if self.gate is not None else ""
        return f"{self.name!r}, width={self.width}, {writes} {self.copies} copies{gated}"


def connection_shapes(
    width: int, config: HyperConnectionsConfig, *, place: int, writes: bool, gated: bool
) -> dict[str, tuple[int, ...]]:
    """The shapes of a connection's parameters; for the arguments see `HyperConnection`."""
    copies, constrained = config.copies, config.constrained
    static: dict[str, tuple[int, ...]] = {"pre": (copies,)}
    if writes:
        static["post"] = (copies,)
        if place > 1 or not constrained:
            static["carry"] = (copies, copies)
    shapes = dict(static)
    for name, shape in static.items() if config.dynamic else ():
        each = () if len(shape) == 1 else (copies,)
        shapes[f"{name}_weight"] = (math.prod(shape), copies * width) if constrained else (*each, width)
        shapes[f"{name}_scale"] = ()
    return shapes | ({"gate": ()} if gated else {})


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
