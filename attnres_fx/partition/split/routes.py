"""Which value travels over which hop: the one description of what stages hand to each other.

Virtual stage c runs on rank c mod P and talks to its neighbours c - 1 and c + 1 alone, so a value that a later
stage needs walks there stage by stage. A rank keeps what it has received or produced until the microbatch is done:
the walk ends as soon as every rank that needs the value has seen it.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageValue:
    """A tensor that leaves the virtual stage it is made in.

    Attributes:
        name: of its node, unique.
        produced: virtual stage that makes it.
        used: later virtual stages that take it, ascending.
        bytes: of one microbatch.
        differentiable: whether its gradient travels back.
        label: what it is to a reader (`v_0`, `b_2`, `b_3[:2]`, `c_2`, or its name).
    """

    name: str
    produced: int
    used: tuple[int, ...]
    bytes: int
    differentiable: bool = True
    label: str = ""


@dataclass(frozen=True)
class StageRoute:
    """What one virtual stage takes and produces, as names of values, each in the order in which they are made.

    Attributes:
        stage: which virtual stage it is, from 0.
        takes: inputs of its module, each received or cached.
        received: over the hop from the stage before.
        cached: received or produced earlier by another stage of the same rank.
        produced: made here and needed later.
        sent: over the hop to the next stage: received, produced here, or out of the rank's cache where it has one.
    """

    stage: int
    takes: tuple[str, ...]
    received: tuple[str, ...]
    cached: tuple[str, ...]
    produced: tuple[str, ...]
    sent: tuple[str, ...]


def route_values(
    values: Sequence[StageValue], *, num_stages: int, virtual_stages: int = 1, cache: bool = True
) -> tuple[StageRoute, ...]:
    """Routes of all virtual stages, with the fewest bytes over every hop.

    Args:
        values: what leaves a stage, in any fixed order.
        num_stages: pipeline ranks P.
        virtual_stages: virtual stages per rank V.
        cache: whether ranks keep values; without, every hop carries all that any later stage needs.

    Returns:
        P * V routes, in order of the stages.
    """
    count = num_stages * virtual_stages
    hops = {v.name: hops_of(v, num_stages, cache=cache) for v in values}
    routes = []
    for stage in range(count):
        received = tuple(v.name for v in values if stage - 1 in hops[v.name])
        takes = tuple(v.name for v in values if stage in v.used)
        routes.append(
            StageRoute(
                stage,
                takes=takes,
                received=received,
                cached=tuple(n for n in takes if n not in received),
                produced=tuple(v.name for v in values if v.produced == stage),
                sent=tuple(v.name for v in values if stage in hops[v.name]),
            )
        )
    return tuple(routes)


def hops_of(value: StageValue, num_stages: int, *, cache: bool = True) -> range:
    """Hops a value travels, each named by the stage it leaves from."""
    later = [u - value.produced for u in value.used]
    if not cache:
        return range(value.produced, value.produced + max(later, default=0))
    # A stage a whole round later runs on a rank the walk has passed already: it takes the value from there.
    first_arrivals = [d if d < num_stages else d % num_stages for d in later]
    return range(value.produced, value.produced + max(first_arrivals, default=0))
