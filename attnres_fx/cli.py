"""`attnres-fx inspect | profile | convert | plan | demo`."""

import argparse
import contextlib
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from attnres_fx._version import __version__
from attnres_fx.cli_inputs import HOW, load, new_file
from attnres_fx.cli_profile import add_profile
from attnres_fx.errors import AttnResError, CaptureError

_EXAMPLES = """\
examples:
  attnres-fx inspect mypackage.models:tiny --input ids=int64[2,16]:0..255
  attnres-fx convert path/to/huggingface-folder --variant full --save model.attnres
  attnres-fx plan path/to/config.json --meta --stages 4 --flops 400e12 --link-bandwidth 50GB

`attnres-fx command --help` tells of one command's options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0, 130 after an interrupt, 2 after an error, which is printed as one paragraph.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # shades and arrows, where the encoding has none
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if options.verbose:
            raise
        text = " ".join(str(error).split())
        if not isinstance(error, AttnResError | ValueError):
            text = f"{type(error).__name__}: {text}"
        elif isinstance(error, CaptureError):
            text += f" Where the example is what does not fit, give another: {HOW}."
        print(textwrap.fill(f"attnres-fx: {text}", 100), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnres-fx",
        description="Residual connections as attention over depth: look at a model, convert it, plan its pipeline.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"attnres-fx {__version__}", help="show the version")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(required=True, metavar="command")

    look = commands.add_parser("inspect", help="show the residual streams of a model")
    _add_model(look)
    _add_reads(look)
    look.set_defaults(run=_inspect)

    profile = commands.add_parser("profile", help="measure how a model uses its depth, before it is converted")
    _add_model(profile)
    _add_reads(profile)
    add_profile(profile)

    convert = commands.add_parser("convert", help="convert a model, check it, and save it if asked to")
    _add_model(convert)
    _add_reads(convert)
    _add_convert(convert)
    convert.set_defaults(run=_convert)

    plan = commands.add_parser("plan", help="choose blocks and pipeline stages, and say what they cost")
    _add_model(plan)
    _add_plan(plan)
    plan.set_defaults(run=_plan)

    demo = commands.add_parser(
        "demo", help="train a small GPT twice from scratch, residual and block, and compare them"
    )
    _add_demo(demo)
    demo.set_defaults(run=_demo)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="module.path:function, which takes no arguments and returns the model, or the model and its example "
        "arguments (a tuple by position, a dict by name); or a Hugging Face folder, or a config.json",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=DTYPE[DIMS]:LOW..HIGH",
        help="an example argument, once for each, e.g. input_ids=int64[2,16]:0..99 or mask=bool[2,16]; without a "
        "range ones, or normal floats; default: what the factory returns, the config says, or dummy_inputs holds",
    )


def _add_reads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reads", action="store_true", help="one line for each read as well")


def _add_variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant",
        default="block",
        choices=("full", "block", "local"),
        help="what a read sees: every sublayer, sums of blocks, or its own block (default: block)",
    )


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_variant(parser)
    parser.add_argument("--num-blocks", type=int, metavar="N", help="how many blocks (default: about 8)")
    parser.add_argument("--block-size", type=int, metavar="N", help="sublayers of a block, instead")
    parser.add_argument("--boundaries", type=_indices, metavar="I,J,…", help="first sublayers of later blocks, instead")
    parser.add_argument(
        "--output-mode",
        dest="output",
        default="sum",
        choices=("sum", "mean"),
        help="sum computes what the original does at first, mean is the paper's literal form (default: sum)",
    )
    parser.add_argument("--eps", type=float, default=1e-6, help="of the norm of keys (default: 1e-6)")
    parser.add_argument("--streams", default="main", help="main, all, or names with commas between them")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with the original")
    parser.add_argument("--save", type=new_file, metavar="FILE", help="write the converted model, for attnres_fx.load")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_variant(parser)
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
    parser.add_argument("--boundaries", type=_indices, metavar="I,J,…", help="first sublayers of later blocks, instead")
    parser.add_argument("--starts", type=_indices, metavar="0,I,…", help="first sublayers of stages, to pin them")
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


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of both models")
    parser.add_argument(
        "--more-steps",
        type=int,
        metavar="N",
        help="how many more the residual model gets, trained again from the start",
    )
    parser.add_argument(
        "--size", default="small", choices=("tiny", "small", "medium"), help="of model and steps (default: small)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="for losses, pictures and models (default: demo-output)",
    )


def _numbers(text: str) -> int | tuple[int, int]:
    numbers = _indices(text)
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


def _indices(text: str) -> list[int]:
    try:
        return [int(t) for t in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} should be sublayer indices with commas between them: 4,8") from None


def _inspect(options: argparse.Namespace) -> int:
    import attnres_fx as ax

    model, args, kwargs = load(options.model, options.input)
    report = ax.inspect(model, args, kwargs)
    print(report)
    if options.reads:
        print(f"\n{report.reads_table()}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    import attnres_fx as ax

    streams = options.streams if options.streams in ("main", "all") else options.streams.split(",")
    config = ax.AttnResConfig(
        variant=options.variant,
        num_blocks=options.num_blocks,
        block_size=options.block_size,
        boundaries=options.boundaries,
        output=options.output,
        eps=options.eps,
        streams=streams,
    )
    model, args, kwargs = load(options.model, options.input)
    converted = ax.convert(model, args, kwargs, config=config, check=not options.no_check)
    print(converted.report)
    if options.reads:
        print(f"\n{converted.report.reads_table()}")
    if options.save is not None:
        ax.ConvertedModel.save(converted, options.save)
        print(f"\nsaved to {options.save}")
    return 0


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


def _demo(options: argparse.Namespace) -> int:
    from attnres_fx.demo.run import run_demo

    return run_demo(
        steps=options.steps,
        more_steps=options.more_steps,
        size=options.size,
        seed=options.seed,
        output=options.output,
    )
