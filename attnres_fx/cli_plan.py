"""`attnres-fx plan`: blocks and pipeline stages of a model."""

import argparse
import contextlib

from attnres_fx.cli_inputs import load
from attnres_fx.cli_options import add_variant, indices, new_file


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Give the command its options; those that name a model it has already."""
    add_variant(parser)
    parser.add_argument("--stages", type=int, required=True, metavar="P", help="ranks of the pipeline")
    parser.add_argument("--virtual-stages", type=int, default=1, metavar="V", help="stages on each rank (default: 1)")
    parser.add_argument(
        "--microbatches", type=int, metavar="M", help="of a step; the input is one of them (default: 4 P)"
    )
    parser.add_argument(
        "--schedule",
        choices=("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble"),
        help="PyTorch's name of it (default: 1F1B, with virtual stages Interleaved1F1B)",
    )
    parser.add_argument(
        "--num-blocks", type=_numbers, metavar="N or LOW,HIGH", help="how many blocks, or the fewest and the most"
    )
    parser.add_argument("--block-size", type=int, metavar="N", help="sublayers of a block, instead")
    parser.add_argument("--boundaries", type=indices, metavar="I,J,…", help="first sublayers of later blocks, instead")
    parser.add_argument("--starts", type=indices, metavar="0,I,…", help="first sublayers of stages, to pin them")
    parser.add_argument(
        "--align",
        default="prefer",
        choices=("prefer", "require"),
        help="whether stages may begin inside blocks where that is better (prefer, the default) or never (require)",
    )
    parser.add_argument("--memory-limit", type=_bytes, metavar="BYTES", help="of a rank, e.g. 80GB")
    parser.add_argument("--link-bandwidth", type=_bytes, metavar="BYTES", help="a second between ranks, e.g. 50GB")
    parser.add_argument("--flops", type=float, help="operations a second that a rank reaches, e.g. 400e12")
    parser.add_argument("--memory-bandwidth", type=_bytes, metavar="BYTES", help="a second, of a rank, e.g. 3TB")
    parser.add_argument("--recompute", action="store_true", help="keep only the inputs of sublayers for backward")
    parser.add_argument("--meta", action="store_true", help="build the model without weights, however large it is")
    parser.add_argument("--save", type=new_file, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--plot", type=new_file, metavar="FILE", help="draw timeline and stages (needs matplotlib)")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    import torch

    import attnres_fx as ax
    from attnres_fx.partition import DeviceSpeed

    with torch.device("meta") if options.meta else contextlib.nullcontext():
        model, args, kwargs = load(options.model, options.input)
    counts = options.num_blocks if isinstance(options.num_blocks, tuple) else None
    config = ax.AttnResConfig(
        variant=options.variant,
        num_blocks=None if counts else options.num_blocks,
        block_size=options.block_size,
        boundaries=options.boundaries,
    )
    speeds = {"flops": options.flops, "memory_bandwidth": options.memory_bandwidth}
    speed = DeviceSpeed(**{name: float(value) for name, value in speeds.items() if value is not None})
    plan = ax.plan(
        model,
        args,
        kwargs,
        config=config,
        num_stages=options.stages,
        virtual_stages=options.virtual_stages,
        num_microbatches=options.microbatches,
        schedule=options.schedule,
        num_blocks=counts,
        starts=options.starts,
        align=options.align,
        memory_limit=options.memory_limit,
        link_bandwidth=options.link_bandwidth,
        device=speed,
        recompute=options.recompute,
    )
    print(plan)
    if options.save is not None:
        plan.save(options.save)
        print(f"\nsaved to {options.save}")
    if options.plot is not None:
        plan.plot(options.plot)
        print(f"drawn to {options.plot}")
    return 0


def _numbers(text: str) -> int | tuple[int, int]:
    numbers = indices(text)
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} should be a number, or the fewest and the most: 4,12")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _bytes(text: str) -> int:
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "gib": 2**30, "mib": 2**20}
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    try:
        return int(float(number) * units[text[len(number) :].lower()])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} should be bytes: 80GB, 50e9") from None
