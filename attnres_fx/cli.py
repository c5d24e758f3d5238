"""`attnres-fx inspect | profile | convert | plan | demo`."""

import argparse
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from attnres_fx._version import __version__
from attnres_fx.cli_inputs import HOW, load
from attnres_fx.cli_options import add_variant, indices, new_file
from attnres_fx.cli_plan import add_plan
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
    add_plan(plan)

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


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add_variant(parser)
    parser.add_argument("--num-blocks", type=int, metavar="N", help="how many blocks (default: about 8)")
    parser.add_argument("--block-size", type=int, metavar="N", help="sublayers of a block, instead")
    parser.add_argument("--boundaries", type=indices, metavar="I,J,…", help="first sublayers of later blocks, instead")
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


def _demo(options: argparse.Namespace) -> int:
    from attnres_fx.demo.run import run_demo

    return run_demo(
        steps=options.steps,
        more_steps=options.more_steps,
        size=options.size,
        seed=options.seed,
        output=options.output,
    )
