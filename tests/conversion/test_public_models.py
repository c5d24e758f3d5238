"""Public models, written small: every read found, under its name and with its sources, as counted by hand.

A number is how many sources the read has in `full`: the root and what was written before it. A first read, which sees
the root alone, is no read. Nothing here was taken from what the library found.
"""

from dataclasses import dataclass

import pytest

import attnres_fx as ax
from tests.support.public_models import EXAMPLES, drawn

Reads = dict[str, int]
FULL = ax.AttnResConfig(variant="full")


@dataclass(frozen=True)
class Case:
    """The right answer for one model.

    Args:
        main: The reads of every main stream, in the order in which the streams begin.
        widths: D of every main stream.
        beside: Reads of streams that may be main or nested: the rules leave it open.
        channels: Streams over dimension 1: they are read over it, or the report says that it is the dimension.
        ends: How many streams begin where another ends, each said by the report.
    """

    main: tuple[Reads, ...]
    widths: tuple[int, ...] = (8,)
    beside: tuple[Reads, ...] = ()
    channels: tuple[Reads, ...] = ()
    ends: int = 0


def counted(*names: str) -> Reads:
    """Each name one source more than the one before, from two on."""
    return {name: i for i, name in enumerate(names, 2)}


#: Blocks of two sublayers with a norm before each, and a last norm.
TWO_BLOCKS = "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2"
TWO_LAYERS = counted("layers.0.norm2", "layers.1.norm1", "layers.1.norm2", "norm")
FOUR_PARTS = counted("layers.1.norm", "layers.2.norm", "layers.3.norm", "norm")

CASES = {
    # The gates come from the condition, not from the stream: they are part of the branch.
    "dit": Case((counted(*TWO_BLOCKS, "last.norm"),)),
    # The last block writes no text: its norm is the last read there.
    "mmdit": Case(
        (
            counted("blocks.0.image_norm2", "blocks.1.image_norm1", "blocks.1.image_norm2", "last.norm"),
            counted("blocks.0.text_norm2", "blocks.1.text_norm1"),
        ),
        (8, 8),
    ),
    # Attention and MLP are one sublayer. What is cut apart and joined again has only moved its rows.
    "flux single": Case((counted("singles.1.norm", "singles.2.norm", "last.norm"),)),
    # A state that goes through cat and a projection into another stream is read by the block that does it; the same
    # state as the next block's norm sees is one read.
    "u-vit": Case(
        (
            counted(
                "down.0.layer.norm2",
                "down.1.layer.norm1",
                "down.1.layer.norm2",
                "middle.layer.norm1",
                "middle.layer.norm2",
                "up.0",
            ),
            counted("up.0.layer.norm2", "up.1"),
            counted("up.1.layer.norm2", "norm"),
        ),
        (8, 8, 8),
        ends=2,
    ),
    "dinov2": Case((counted(*TWO_BLOCKS, "norm"),)),
    # The four slices of a stage's last state are one state: one read, in the module that joins them.
    "swin": Case(
        (
            counted("stage1.0.norm2", "stage1.1.norm1", "stage1.1.norm2", "merging"),
            counted("stage2.0.norm2", "stage2.1.norm1", "stage2.1.norm2", "norm"),
        ),
        (8, 16),
    ),
    # The convolution of a block is what takes in the state.
    "convnext": Case((), (), channels=(counted("stage1.1.spread", "down_norm"), counted("stage2.1.spread", "pool"))),
    # The first block shrinks the image on both sides of its sum: two values meet, and that is the root.
    "coatnet": Case((TWO_LAYERS,), (16,), channels=(counted("convolutions.2.norm", "down"),)),
    # Positions are added for query and key alone. Each norm reads; the decoder's last norm takes a normed state.
    "detr": Case(
        (
            counted("encoder.0.norm1", "encoder.0.norm2", "encoder.1.norm1", "encoder.1.norm2"),
            counted(*(f"decoder.{i}.norm{j}" for i in (0, 1) for j in (1, 2, 3))),
        ),
        (8, 8),
    ),
    # The state after a layer is shown first and read by the next layer then: one read, named after the first.
    "detr norm first": Case(
        (
            counted("encoder.0.norm2", "encoder.1.norm1", "encoder.1.norm2", "encoder_norm"),
            counted(
                "decoder.0.norm2",
                "decoder.0.norm3",
                "decoder_norm",
                "decoder.1.norm2",
                "decoder.1.norm3",
                "decoder_norm#2",
            ),
        ),
        (8, 8),
    ),
    # The first attention writes over the points, so the queries begin with its norm. The points come back as
    # positions, which are no term.
    "sam two-way": Case(
        (
            counted(
                "layers.0.norm2", "layers.0.norm3", "layers.1.norm1", "layers.1.norm2", "layers.1.norm3", "last_norm"
            ),
            counted("layers.0.norm4", "layers.1.norm4"),
        ),
        (8, 8),
    ),
    # In the first layer both factors are on the root. Later the root once more is a term of the sublayer before, since
    # nothing reads in between. The last norm is a function in the model's own code.
    "nanochat": Case((counted("h.0", "h.1", "h.1#2", "h.read_4"),)),
    # The same, and a skip adds the stream's own earlier terms once more. The smear and its norm make the root.
    "modded-nanogpt": Case(
        (counted("blocks.0", "blocks.1", "blocks.1#2", "blocks.2", "blocks.2#2", "blocks.3", "blocks.3#2", "head"),)
    ),
    # What is added before each step is a term of the sublayer before it.
    "universal": Case(
        (counted("layer.norm2", "layer.norm1", "layer.norm2#2", "layer.norm1#2", "layer.norm2#3", "norm"),)
    ),
    "albert": Case(
        (counted("layer.norm1", "layer.norm2", "layer.norm1#2", "layer.norm2#2", "layer.norm1#3", "layer.norm2#3"),)
    ),
    # A bias that all layers add to their scores is no stream.
    "encoder-decoder": Case(
        (
            counted("encoder.layers.0.norm3", "encoder.layers.1.norm1", "encoder.layers.1.norm3", "encoder.norm"),
            counted(
                "decoder.layers.0.norm2",
                "decoder.layers.0.norm3",
                "decoder.layers.1.norm1",
                "decoder.layers.1.norm2",
                "decoder.layers.1.norm3",
                "decoder.norm",
            ),
        ),
        (8, 8),
    ),
    "sandwich norm": Case((FOUR_PARTS,)),
    "scale residual": Case((FOUR_PARTS,)),
    "shift tokens": Case((FOUR_PARTS,)),
    "memory tokens": Case((FOUR_PARTS,)),
    "deepnorm": Case((counted(*(f"layers.{i}.norm" for i in range(4))),)),
    "macaron": Case((counted(*(f"layers.{i}.norm" for i in range(1, 6)), "norm"),)),
    # A gate between two values of sublayers is inside a sublayer, and stops nothing.
    "value residual": Case((TWO_LAYERS,)),
    # The norm at a block's end is carried on: the next block begins with it.
    "conformer": Case(
        tuple(
            counted(f"blocks.{i}.norm2", f"blocks.{i}.conv.norm", f"blocks.{i}.norm3", f"blocks.{i}.last")
            for i in (0, 1)
        ),
        (8, 8),
        ends=1,
    ),
    # Mean and scale go around the whole stack, which holds the sublayers. Scores added to the next layer's are inside.
    "patchtst": Case((counted("layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2"),)),
    "perceiver": Case(
        (
            counted(
                "layers.0.feed_norm",
                "layers.0.layer.norm1",
                "layers.0.layer.norm2",
                "layers.1.norm",
                "layers.1.feed_norm",
                "layers.1.layer.norm1",
                "layers.1.layer.norm2",
                "norm",
            ),
        )
    ),
    # Inducing points begin and end inside one sublayer of the set's stream, and begin with a parameter: an inner
    # stream or one of its own. The seeds of the pooling are one of its own.
    "set transformer": Case(
        (
            counted(*(f"blocks.{i}.spread.norm{j}" for i in (0, 1) for j in (0, 1))),
            counted("pool.norm0", "pool.norm1"),
        ),
        (8, 8),
        beside=tuple(counted(f"blocks.{i}.gather.norm0", f"blocks.{i}.gather.norm1") for i in (0, 1)),
    ),
    # The outer product is the first to take in the sequences' state, the row attention that of the pairs.
    "evoformer": Case(
        (
            counted(
                "blocks.0.column.norm",
                "blocks.0.msa_transition.norm",
                "blocks.0.outer.norm",
                "blocks.1.column.norm",
                "blocks.1.msa_transition.norm",
                "blocks.1.outer.norm",
            ),
            counted(
                "blocks.0.product.norm",
                "blocks.0.attend.norm",
                "blocks.0.pair_transition.norm",
                "blocks.1.row.pair_norm",
                "blocks.1.product.norm",
                "blocks.1.attend.norm",
                "blocks.1.pair_transition.norm",
                "distances",
            ),
        ),
        (8, 4),
    ),
}


def reads_of(stream):
    return {read.name: 1 + read.position + len(read.extras) for read in stream.depth_reads}


def inspected(name, *, train=False, **options):
    model, args = EXAMPLES[name]()
    return ax.inspect(drawn(model).train(train), args, **options)


def main_reads(report):
    return [reads_of(s) for s in report.streams if s.nested_in is None]


def check(report, case):
    found = [(list(reads_of(s).items()), s.width) for s in report.streams if s.nested_in is None]
    wanted = [(list(reads.items()), width) for reads, width in zip(case.main, case.widths, strict=True)]
    optional = [list(reads.items()) for reads in (*case.beside, *case.channels)]
    assert [f for f in found if f[0] not in optional] == wanted, f"{report}\n{found}"
    read_over_channels = [reads for reads, _ in found if dict(reads) in case.channels]
    if case.channels and not read_over_channels:
        reasons = [r.reason for r in report.refusals if r.kind == "width"]
        assert len(reasons) == len(case.channels), str(report)
        assert all("dimension 1" in why or "channel" in why for why in reasons), str(report)
    else:
        assert len(read_over_channels) == len(case.channels), str(report)
    assert sum(r.kind == "interrupted" for r in report.refusals) >= case.ends, str(report)


@pytest.mark.parametrize("name", CASES)
def test_a_public_model_has_the_reads_that_are_counted_by_hand(name):
    check(inspected(name), CASES[name])


def test_a_branch_of_a_part_of_the_batch_is_written_into_the_one_stream():
    """Picking rows of a batch moves rows: the norm of the picked rows reads, as it does in eval mode."""
    check(inspected("dinov2", train=True, dynamic_shapes={"image": {}}), CASES["dinov2"])


def test_a_subset_whose_size_is_computed_from_the_batch_is_captured():
    check(inspected("dinov2", train=True), CASES["dinov2"])


def test_streams_of_text_and_image_that_are_joined_go_on_or_are_said_to_end():
    """A joined state is of two streams: its rows keep the sources of each, or both are read where they are joined."""
    report = inspected("flux")
    found = main_reads(report)
    apart = {"doubles.0.image_norm2": 2, "doubles.0.text_norm2": 2}
    together = {name: sources for reads in found for name, sources in reads.items()}
    if "singles.0" not in together:
        assert together == {**apart, "singles.0.norm": 3, "singles.1.norm": 4, "last.norm": 5}, str(report)
        return
    joined = {"singles.0": 3, "singles.0#2": 3}
    assert together == {**apart, **joined, "singles.1.norm": 2, "last.norm": 3}, str(report)
    assert any(r.kind == "interrupted" for r in report.refusals), str(report)


def test_two_lanes_are_both_main():
    """Attention reads the right lane alone, so the left lane's first sum may be its first sublayer or its root."""
    found = main_reads(inspected("two lanes"))
    left = [{"layers.0.norm2": 2, "layers.1.norm2": 3}, {"layers.1.norm2": 2}]
    assert {"layers.1.norm1": 2, "norm_right": 3} in found
    assert any(reads in left for reads in found) and len(found) == 2, found


def test_two_lanes_of_one_root_see_what_was_written_into_their_own():
    found = main_reads(inspected("two lanes of one root"))
    together = {name: sources for reads in found for name, sources in reads.items()}
    # The lanes' last states: the left one's is read by the last layer first, and by its own norm too.
    assert together == {"layers.0.norm2": 2, "layers.1.norm1": 2, "layers.1.norm2": 3, "norm_right": 3}


@pytest.mark.parametrize(
    "name, main",
    [
        ("rwkv-7", counted("blocks.0.ln2", "blocks.1.ln1", "blocks.1.ln2", "ln_out")),
        ("mamba", counted("norms.1", "norms.2", "norm")),
    ],
)
def test_a_recurrence_over_time_gives_no_reads_at_any_length(name, main):
    """Under `streams="all"` neither: no stream, main or nested, grows with the length."""
    found = []
    for length in (3, 4):
        model, (tokens,) = EXAMPLES[name]()
        report = ax.inspect(drawn(model), (tokens[:, :1].repeat(1, length),))
        assert main_reads(report) == [main], f"{length}: {report}"
        found.append(sorted(map(str, map(reads_of, report.streams))))
    assert found[0] == found[1]


def test_a_gated_residual_is_refused_by_name():
    model, args = EXAMPLES["gate residual"]()
    with pytest.raises(ax.errors.NotAdditiveError, match="gate"):
        ax.convert(drawn(model), args, config=FULL)
