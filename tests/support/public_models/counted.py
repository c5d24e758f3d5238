"""The right reads of the public models, counted by hand.

A number is how many sources a read has in `full`: the root and what was written before it. A first read, which sees
the root alone, is no read. Nothing here was taken from what the library found.
"""

from dataclasses import dataclass

Reads = dict[str, int]


@dataclass(frozen=True)
class Case:
    """The right answer for one model.

    Args:
        main: The reads of every main stream, in the order in which the streams begin.
        widths: D of every main stream.
        beside: Reads of streams that may be main or nested: the rules leave it open.
        channels: Streams over dimension 1: they are read over it, or the report says that it is the dimension.
        channel_widths: D of those.
        ends: How many streams begin where another ends, each said by the report.
    """

    main: tuple[Reads, ...]
    widths: tuple[int, ...] = (8,)
    beside: tuple[Reads, ...] = ()
    channels: tuple[Reads, ...] = ()
    channel_widths: tuple[int, ...] = ()
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
    "convnext": Case(
        (),
        (),
        channels=(counted("stage1.1.spread", "down_norm"), counted("stage2.1.spread", "pool")),
        channel_widths=(8, 16),
    ),
    # The first block shrinks the image on both sides of its sum: two values meet, and that is the root.
    "coatnet": Case((TWO_LAYERS,), (16,), channels=(counted("convolutions.2.norm", "down"),), channel_widths=(8,)),
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
    "sandwich norm, scaled": Case((FOUR_PARTS,)),
    "shift and memory tokens": Case((FOUR_PARTS,)),
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
