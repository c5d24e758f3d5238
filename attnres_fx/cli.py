"""`attnres-fx inspect | profile | convert | plan | demo`."""

import argparse
import contextlib
import importlib
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnres_fx._version import __version__
from attnres_fx.cli_profile import add_profile
from attnres_fx.errors import AttnResError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments after the program's name; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0, 130 after an interrupt, 2 after an error, which is printed as one paragraph.
    """
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
        print(textwrap.fill(f"attnres-fx: {text}", 100), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnres-fx", description=__doc__)
    parser.add_argument("--version", action="version", version=f"attnres-fx {__version__}")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(required=True, metavar="command")

    look = commands.add_parser("inspect", help="show the residual streams of a model")
    _add_model(look)
    look.set_defaults(run=_inspect)

    profile = commands.add_parser("profile", help="measure how a model uses its depth, before it is converted")
    _add_model(profile)
    add_profile(profile, _load)

    convert = commands.add_parser("convert", help="convert a model, check it, and save it if asked to")
    _add_model(convert)
    convert.add_argument("--variant", default="block", choices=("full", "block", "local"))
    convert.add_argument("--num-blocks", type=int)
    convert.add_argument("--block-size", type=int)
    convert.add_argument("--boundaries", type=_indices, metavar="I,J,…")
    convert.add_argument("--output-mode", dest="output", default="sum", choices=("sum", "mean"))
    convert.add_argument("--eps", type=float, default=1e-6)
    convert.add_argument("--streams", default="main", help="main, all, or names with commas between them")
    convert.add_argument("--no-check", action="store_true", help="skip the comparison with the original")
    convert.add_argument("--save", type=Path, metavar="FILE")
    convert.set_defaults(run=_convert)

    plan = commands.add_parser("plan", help="choose blocks and pipeline stages, and say what they cost")
    _add_model(plan)
    _add_plan(plan)
    plan.set_defaults(run=_plan)

    demo = commands.add_parser("demo", help="train a small GPT, convert it three ways, train on")
    demo.add_argument("--steps", type=int, help="training steps before the conversion")
    demo.add_argument("--more-steps", type=int, help="training steps after it, for each model")
    demo.add_argument("--size", default="small", choices=("tiny", "small", "medium"))
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--output", type=Path, default=Path("demo-output"), metavar="FOLDER")
    demo.set_defaults(run=_demo)
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stages", type=int, required=True, metavar="P", help="ranks of the pipeline")
    parser.add_argument("--virtual-stages", type=int, default=1, metavar="V", help="stages on each rank")
    parser.add_argument("--microbatches", type=int, metavar="M", help="a step; the input is one of them")
    parser.add_argument("--schedule", choices=("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble"))
    parser.add_argument("--variant", default="block", choices=("full", "block", "local"))
    parser.add_argument("--num-blocks", type=_numbers, metavar="N or LOW,HIGH")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--boundaries", type=_indices, metavar="I,J,…", help="first sublayers of later blocks")
    parser.add_argument("--starts", type=_indices, metavar="0,I,…", help="first sublayers of stages, to pin them")
    parser.add_argument("--align", default="prefer", choices=("prefer", "require"))
    parser.add_argument("--memory-limit", type=_bytes, metavar="BYTES", help="of a rank, e.g. 80GB")
    parser.add_argument("--link-bandwidth", type=_bytes, metavar="BYTES", help="a second between ranks, e.g. 50GB")
    parser.add_argument("--flops", type=float, help="operations a second that a rank reaches, e.g. 400e12")
    parser.add_argument("--memory-bandwidth", type=_bytes, metavar="BYTES", help="a second, of a rank, e.g. 3TB")
    parser.add_argument("--recompute", action="store_true", help="keep only the inputs of sublayers for backward")
    parser.add_argument("--meta", action="store_true", help="build the model without weights, however large it is")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw timeline and stages (needs matplotlib)")


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


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="module.path:factory, a Hugging Face folder, or a config.json")
    parser.add_argument(
        "--input", action="append", default=[], metavar="NAME=DTYPE[DIMS]", help="e.g. input_ids=int64[2,16]"
    )
    parser.add_argument("--reads", action="store_true", help="one line for each read")


def _inspect(options: argparse.Namespace) -> int:
    import attnres_fx as ax

    model, args, kwargs = _load(options)
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
    model, args, kwargs = _load(options)
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
        model, args, kwargs = _load(options)
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


def _load(options: argparse.Namespace) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model an argument names, and example arguments for it."""
    inputs = dict(_parse_input(text) for text in options.input)
    path = Path(options.model)
    if path.exists():
        model, config = _from_hugging_face(path)
        return model, (), inputs or _example_of(model, config)
    module, colon, factory = options.model.partition(":")
    if not colon:
        raise ValueError(
            f"{options.model!r} is no folder, no config.json and no module.path:factory. "
            f"Write the factory after a colon, e.g. mypackage.models:tiny."
        )
    sys.path.insert(0, str(Path.cwd()))
    result = getattr(importlib.import_module(module), factory)()
    if not isinstance(result, tuple):
        return result, (), inputs
    model, example = result
    if inputs:
        return model, (), inputs
    return (model, (), dict(example)) if isinstance(example, dict) else (model, tuple(example), {})


def _parse_input(text: str) -> tuple[str, Any]:
    import torch

    name, _, spec = text.partition("=")
    kind, _, dims = spec.rstrip("]").partition("[")
    dtype = getattr(torch, kind, None)
    if not name or not isinstance(dtype, torch.dtype):
        raise ValueError(f"--input {text!r} should look like input_ids=int64[2,16].")
    try:
        sizes = [int(d) for d in dims.split(",") if d]
    except ValueError:
        raise ValueError(f"--input {text!r} should look like input_ids=int64[2,16]: sizes are numbers.") from None
    if dtype.is_floating_point:
        return name, torch.randn(sizes, dtype=dtype)
    return name, torch.ones(sizes, dtype=dtype)


def _from_hugging_face(path: Path) -> tuple[Any, Any]:
    """A model and its config."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("a Hugging Face model needs transformers: pip install 'attnres-fx[hf]'.") from error
    folder = path if path.is_dir() else path.parent
    config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    name = (config.architectures or ["AutoModel"])[0]
    kind = getattr(transformers, name)
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    if weights:
        model = kind.from_pretrained(str(folder), local_files_only=True)
    else:
        print(f"{path} has no weights beside it: {name} gets random ones.")
        model = kind(config) if name != "AutoModel" else kind.from_config(config)
    return model.eval(), config


def _example_of(model: Any, config: Any) -> dict[str, Any]:
    """Example arguments for a Hugging Face model, from what its config says of its main input."""
    import torch

    ids = torch.randint(0, max(getattr(config, "vocab_size", 2) - 1, 1), (2, 16))
    size = getattr(config, "image_size", None)
    if model.main_input_name == "input_ids":
        kwargs = {"input_ids": ids}
    elif model.main_input_name == "pixel_values" and isinstance(size, int):
        kwargs = {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), size, size)}
    else:
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}, of which the config does not tell the size: "
            f"give it with --input {model.main_input_name}=float32[2,…]."
        )
    return {**kwargs, "decoder_input_ids": ids} if config.is_encoder_decoder else kwargs
