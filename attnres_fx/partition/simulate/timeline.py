"""What one training step of a pipeline looks like in time, and what it keeps, before anything runs.

The model:

- every rank executes its computations in the order of PyTorch's schedule, one at a time, and starts each as soon as
  its input is there;
- a stage's output, and the gradient of its input, leave as soon as the computation has ended. Sending costs the sender
  nothing; between each pair of ranks there is one link in each direction, which carries one message at a time, in the
  order in which they are sent. Where two ranks are neighbours both ways round, forwards and gradients share a link;
- activations stay from the start of a stage's forward to the end of its backward (of the weights, where it is in two
  parts). With recomputation that is what sublayers keep, and while a backward (of the inputs) runs, the activations of
  the largest sublayer that it runs again are there besides. A value kept for later stages stays from its arrival, or
  the end of the forward that makes it, to the end of the same stage's backward: gradients walk the way back, so that is
  its last use on this rank.

Not in it: gradient reduction, the optimizer, the buffers that PyTorch's stages hold to receive every microbatch into
(`Traffic.receive_buffer_bytes`), and that PyTorch's 1F1B loop waits for a send in the pair of messages it posts
together, which on a link slower than a stage makes it wait longer than here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from attnres_fx.errors import PlanError
from attnres_fx.partition.costs.stage_loads import StageLoad
from attnres_fx.partition.simulate.action_order import Action, action_orders


@dataclass(frozen=True)
class TimedAction:
    """A computation in time.

    Args:
        action: What is computed.
        start: Seconds from the start of the step.
        end: The same.
    """

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class TimedHop:
    """A message on its link.

    Args:
        action: What it follows: `F` for an output, `B` or `I` for a gradient.
        source_rank: The rank that sends it.
        target_rank: The rank that receives it.
        start: Seconds from the start of the step to when it leaves.
        end: Seconds from the start of the step to when it is there.
    """

    action: Action
    source_rank: int
    target_rank: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One simulated step.

    Args:
        schedule: Of the pipeline, by PyTorch's name.
        num_stages: Ranks, P.
        virtual_stages: Stages on each rank, V.
        num_microbatches: Of the step.
        ranks: Per rank its computations in order, with their seconds.
        hops: Messages between ranks, in no order.
        peak_activation_bytes: Per rank, the most that is kept for backward at any time.
        peak_cache_bytes: Per rank, the most that is kept for other stages at any time.
    """

    schedule: str
    num_stages: int
    virtual_stages: int
    num_microbatches: int
    ranks: tuple[tuple[TimedAction, ...], ...]
    hops: tuple[TimedHop, ...]
    peak_activation_bytes: tuple[int, ...]
    peak_cache_bytes: tuple[int, ...]

    @cached_property
    def step_seconds(self) -> float:
        """Seconds from the start of the step to the end of its last computation."""
        return max(timed.end for rank in self.ranks for timed in rank)

    @cached_property
    def idle(self) -> tuple[float, ...]:
        """Seconds of the step in which a rank computes nothing."""
        return tuple(self.step_seconds - sum(t.end - t.start for t in rank) for rank in self.ranks)

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time."""
        return sum(self.idle) / (self.num_stages * self.step_seconds) if self.step_seconds else 0.0

    def order(self, rank: int) -> tuple[str, ...]:
        """What a rank computes.

        Args:
            rank: 0 to P - 1.

        Returns:
            The computations in order, as PyTorch spells them: `("0F0", "0F1", "0B0", …)`.
        """
        return tuple(str(timed.action) for timed in self.ranks[rank])


def simulate(
    loads: Sequence[StageLoad],
    *,
    schedule: str,
    num_stages: int,
    virtual_stages: int = 1,
    num_microbatches: int,
) -> Timeline:
    """Simulate one training step, as the head of this file describes it.

    Args:
        loads: One per virtual stage, stage c on rank c mod num_stages; seconds and bytes of one microbatch.
        schedule: Of the pipeline, by PyTorch's name.
        num_stages: Ranks, P.
        virtual_stages: Stages on each rank, V.
        num_microbatches: Of the step.

    Returns:
        Every computation and message with its start and end in seconds, and the peaks in bytes.

    Raises:
        PlanError: The schedule cannot run these numbers, or the number of loads is not P times V.
    """
    if len(loads) != num_stages * virtual_stages:
        raise PlanError(
            f"{len(loads)} stage loads were given for num_stages={num_stages} times virtual_stages={virtual_stages}: "
            f"give {num_stages * virtual_stages}."
        )
    orders = action_orders(
        schedule, num_stages=num_stages, virtual_stages=virtual_stages, num_microbatches=num_microbatches
    )
    ranks, hops = _run(orders, loads)
    return Timeline(
        schedule,
        num_stages,
        virtual_stages,
        num_microbatches,
        ranks,
        hops,
        peak_activation_bytes=tuple(_peak_activations(rank, loads) for rank in ranks),
        peak_cache_bytes=tuple(_peak_cache(r, rank, hops, loads) for r, rank in enumerate(ranks)),
    )


def seconds_of(action: Action, load: StageLoad) -> float:
    """How long a computation takes."""
    parts = {
        "F": load.forward,
        "I": load.backward_input,
        "W": load.backward_weight,
        "B": load.backward_input + load.backward_weight,
    }
    return parts[action.kind]


def _run(
    orders: Sequence[Sequence[Action]], loads: Sequence[StageLoad]
) -> tuple[tuple[tuple[TimedAction, ...], ...], tuple[TimedHop, ...]]:
    """Each rank goes on while its next input has been sent. Every link has one sender, which sends in its own order,
    so no clock has to be kept across ranks."""
    num_stages, last = len(orders), len(loads) - 1
    done: list[list[TimedAction]] = [[] for _ in orders]
    hops: list[TimedHop] = []
    available: dict[tuple[int, bool, int], float] = {}
    link_free: dict[tuple[int, int], float] = {}
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while len(done[rank]) < len(order):
                action = order[len(done[rank])]
                required = _awaited(action, last)
                if required is not None and required not in available:
                    break
                moved = True
                free = done[rank][-1].end if done[rank] else 0.0
                start = max(free, available[required]) if required is not None else free
                end = start + seconds_of(action, loads[action.stage])
                done[rank].append(TimedAction(action, start, end))
                target = _target(action, last)
                if target is None:
                    continue
                forward, to = action.kind == "F", target % num_stages
                if to != rank:
                    load = loads[action.stage]
                    leaves = max(end, link_free.get((rank, to), 0.0))
                    end = leaves + (load.send_forward if forward else load.send_backward)
                    link_free[rank, to] = end
                    hops.append(TimedHop(action, rank, to, leaves, end))
                available[target, forward, action.microbatch] = end
    stuck = [str(order[len(d)]) for order, d in zip(orders, done, strict=True) if len(d) < len(order)]
    if stuck:
        raise PlanError(
            f"the schedule never gets to {', '.join(stuck)}, each of which waits for another: "
            f"change schedule or num_microbatches."
        )
    return tuple(map(tuple, done)), tuple(hops)


def _awaited(action: Action, last: int) -> tuple[int, bool, int] | None:
    """What must have arrived at a stage: (stage, whether from the one before, microbatch)."""
    if action.kind == "F":
        return (action.stage, True, action.microbatch) if action.stage else None
    if action.kind == "W" or action.stage == last:
        return None
    return (action.stage, False, action.microbatch)


def _target(action: Action, last: int) -> int | None:
    """The stage that waits for what this computation makes."""
    if action.kind == "F":
        return action.stage + 1 if action.stage < last else None
    return action.stage - 1 if action.kind in "BI" and action.stage else None


def _peak_activations(rank: Sequence[TimedAction], loads: Sequence[StageLoad]) -> int:
    held = peak = 0
    for timed in rank:
        size = loads[timed.action.stage].activation_bytes
        if timed.action.kind == "F":
            held += size
            peak = max(peak, held)
            continue
        if timed.action.kind in "BI":
            peak = max(peak, held + loads[timed.action.stage].recomputed_bytes)
        if timed.action.kind in "BW":
            held -= size
    return peak


def _peak_cache(rank: int, timed: Sequence[TimedAction], hops: Sequence[TimedHop], loads: Sequence[StageLoad]) -> int:
    # Between stages of one rank nothing arrives, nor does it at the first stage.
    arrivals = {
        (hop.action.stage + 1, hop.action.microbatch): hop.end
        for hop in hops
        if hop.target_rank == rank and hop.action.kind == "F"
    }
    changes = [(end, loads[stage].received_bytes) for (stage, _), end in arrivals.items()]
    for t in timed:
        load, received = loads[t.action.stage], (t.action.stage, t.action.microbatch) in arrivals
        if t.action.kind == "F":
            changes.append((t.end, load.produced_bytes))
        elif t.action.kind in "BW":
            changes.append((t.end, -load.produced_bytes - (load.received_bytes if received else 0)))
    held = peak = 0
    # At one time what is freed goes before what comes.
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak
