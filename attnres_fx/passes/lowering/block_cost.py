"""What the reads of one block cost, read by read and in two phases: byte counts, and the choice between the two.

Pure arithmetic, no graph and no torch. U is one pass over [N, D]: as many bytes as one source has.
"""

from dataclasses import dataclass

#: Phase-1 outputs may take this share of what the block keeps for backward anyway.
MEMORY_SHARE = 0.2


def forward_passes(num_sources: int) -> int:
    """Passes over one source's bytes that a fused read of S sources makes: it reads each and writes one, S + 1."""
    return num_sources + 1


def backward_passes(num_sources: int) -> int:
    """Passes over one source's bytes that a read's backward makes, 3 S + 1.

    It reads the incoming gradient once, and each source with the gradient it has so far, and writes each gradient.
    """
    return 3 * num_sources + 1


@dataclass(frozen=True)
class BlockReads:
    """The reads of a block that share their completed sources.

    Args:
        completed: How many sources all of them see.
        merged: How many reads see the partial sum as well.
        folded: How many of those also take in the addition that builds it.
        alone: How many reads see the completed sources only.
        folded_alone: How many of those take in an addition, which they can only outside of two phases.
        saved: U that the block's sublayers keep for backward, whatever the reads do.
        batched: Whether phase 1 runs on the kernels, which read a source for all queries at once; the inner compiler
            makes a loop over the sources for each query.
    """

    completed: int
    merged: int
    folded: int = 0
    alone: int = 0
    folded_alone: int = 0
    saved: float = 0.0
    batched: bool = True

    @property
    def reads(self) -> int:
        """How many reads the block has."""
        return self.merged + self.alone


@dataclass(frozen=True)
class BlockCost:
    """What the reads of a block move and keep, in U.

    Args:
        forward, backward: Moved in each direction.
        live: Kept alive over the block beyond sources and results.
    """

    forward: int
    backward: int
    live: int

    def moved(self, training: bool) -> int:
        """U moved in a step, backward included in training."""
        return self.forward + (self.backward if training else 0)


def cost_read_by_read(block: BlockReads) -> BlockCost:
    """Each read by itself moves what the schedule says of its sources, and 2 U more forward with an addition."""
    sources = [block.completed + 1] * block.merged + [block.completed] * block.alone
    additions = 2 * (block.folded + block.folded_alone)
    return BlockCost(sum(map(forward_passes, sources)) + additions, sum(map(backward_passes, sources)), 0)


def cost_two_phase(block: BlockReads) -> BlockCost:
    """Phase 1 writes an output a read; each merge reads that and the partial sum.

    Phase 1 moves 2C + Q forward (its kernels read the sources for the logits, then for the mixtures) and 7C + 2Q
    backward (sources for the scores, their gradients and the weights' gradients; C written; autograd adds them to what
    the sources have so far, 3C). A merge moves 3 U forward, 2 more with an addition, and 6 backward (it reads the
    incoming gradient, its two sources and the partial sum's gradient so far, and writes two gradients). A read of the
    completed sources alone takes its phase-1 output as it is, 2 U each way, and leaves an addition where it was, 3 U.
    """
    forward, backward = 2 * block.completed + block.reads, 7 * block.completed + 2 * block.reads
    if not block.batched:
        forward, backward = (block.reads * moved(block.completed) for moved in (forward_passes, backward_passes))
    forward += 3 * block.merged + 2 * block.folded + 2 * block.alone + 3 * block.folded_alone
    backward += 6 * block.merged + 2 * block.alone
    return BlockCost(forward, backward, block.reads)


@dataclass(frozen=True)
class PhaseChoice:
    """The form that the reads of a block get.

    Args:
        two_phase: Whether it is two phases.
        block: The reads.
        per_read, phased: U moved read by read, and in two phases.
        live: U that two phases keep alive.
        why: The reason in words.
    """

    two_phase: bool
    block: BlockReads
    per_read: int
    phased: int
    live: int
    why: str

    def to_text(self, bytes_a_token: int) -> str:
        """What the log says.

        Args:
            bytes_a_token: Bytes of one U, divided by the N tokens.

        Returns:
            One line: the form, the reason, and the counts in U and in bytes a token.
        """
        form = "two-phase" if self.two_phase else "read by read"
        each, phased = self.per_read * bytes_a_token, self.phased * bytes_a_token
        return (
            f"{self.block.reads} reads over {self.block.completed} completed sources: {form} ({self.why}; read by read "
            f"{self.per_read} U, {each} bytes a token; two-phase {self.phased} U, {phased} bytes a token, and "
            f"{self.live} U live)"
        )


def choose_phases(block: BlockReads, *, training: bool, memory_share: float = MEMORY_SHARE) -> PhaseChoice:
    """The form that moves fewer bytes, unless two phases would keep too much memory in training.

    Args:
        block: The reads of one block.
        training: Whether backward counts too; phase-1 outputs are kept for it.
        memory_share: How much the outputs may keep, as a share of what the block keeps anyway.

    Returns:
        The form, with the counts that it was chosen by.
    """
    each, phased = cost_read_by_read(block), cost_two_phase(block)
    costs = each.moved(training), phased.moved(training)
    if block.reads < 2:
        return PhaseChoice(False, block, *costs, phased.live, "nothing is shared")
    if costs[1] >= costs[0]:
        return PhaseChoice(False, block, *costs, phased.live, "fewer bytes")
    if training and phased.live > memory_share * block.saved:
        why = f"live outputs above {memory_share:.0%} of the {block.saved:.1f} U kept anyway"
        return PhaseChoice(False, block, *costs, phased.live, why)
    return PhaseChoice(True, block, *costs, phased.live, "fewer bytes")
