"""The model that a command line names, and the example arguments for it."""

import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOW = "--input NAME=DTYPE[DIMS], e.g. --input input_ids=int64[2,16]:0..99"

_INPUT = re.compile(r"(?P<name>\w+)=(?P<dtype>\w+)\[(?P<dims>[\d,\s]*)\](?::(?P<low>[^.]\S*?)\.\.(?P<high>\S+))?")


def load(name: str, inputs: Sequence[str]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A model and example arguments for it.

    Args:
        name: `module.path:factory`, a Hugging Face folder, or a `config.json`. A factory returns a model, or a model
            with its arguments: a dict by keyword, a tuple by position.
        inputs: `NAME=DTYPE[DIMS]` or `NAME=DTYPE[DIMS]:LOW..HIGH`, in the place of any other example.

    Returns:
        The model, and arguments by position and by keyword.

    Raises:
        ValueError: The name names no model, an input cannot be read, or there is no example.
    """
    given = dict(parse_input(text) for text in inputs)
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        raise ValueError(
            f"{name!r} is a file of Python: name a function in it that returns the model, {path.stem}:FUNCTION in the "
            f"file's folder, or PACKAGE.{path.stem}:FUNCTION as Python imports it."
        )
    if path.exists():
        model, config = _from_hugging_face(path)
        args, kwargs = (), given or _example_of_config(model, config)
    else:
        model, args, kwargs = _made(name)
        if given:
            args, kwargs = (), given
    takes = _arguments(model)
    unknown = [n for n in given if takes is not None and n not in takes]
    if unknown:
        raise ValueError(
            f"--input {unknown[0]}: {type(model).__name__} takes no argument of this name; "
            f"it takes {', '.join(takes or ())}."
        )
    if not args and not kwargs and _needs_example(model):
        kwargs = _own_example(model, takes)
    return model, args, kwargs


def parse_input(text: str) -> tuple[str, Any]:
    """The name and the tensor that an `--input` asks for.

    Args:
        text: `NAME=DTYPE[DIMS]`: ones of whole numbers, normally distributed floats. With `:LOW..HIGH` behind it,
            drawn evenly from there, both ends among the whole numbers.

    Raises:
        ValueError: It is not written like that.
    """
    import torch

    match = _INPUT.fullmatch(text)
    dtype = getattr(torch, match["dtype"], None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"--input {text!r} should look like input_ids=int64[2,16], mask=bool[2,16] or, with the range to draw "
            f"from, input_ids=int64[2,16]:0..99: a dtype of torch, sizes that are numbers, and lowest..highest."
        )
    sizes = [int(d) for d in match["dims"].split(",") if d.strip()]
    if match["low"] is None:
        floating = dtype.is_floating_point or dtype.is_complex
        return match["name"], torch.randn(sizes, dtype=dtype) if floating else torch.ones(sizes, dtype=dtype)
    span = f"{match['low']}..{match['high']}"
    try:
        low, high = float(match["low"]), float(match["high"])
        if dtype.is_floating_point:
            return match["name"], torch.empty(sizes, dtype=dtype).uniform_(low, high)
        return match["name"], torch.randint(int(low), int(high) + 1, sizes, dtype=dtype)
    except (ValueError, RuntimeError):
        raise ValueError(f"--input {text!r}: {span} is no range of {match['dtype']}.") from None


def named_object(place: str, what: str) -> Any:
    """What `module.path:name` names; modules of the current folder are found too.

    Args:
        place: The text of the command line.
        what: The argument that it was given as, for the errors.

    Raises:
        ValueError: There is no such module, or nothing of that name in it.
    """
    module, _, name = place.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports another that is not
        raise ValueError(
            f"{what} {place!r}: there is no module {error.name!r} in {here} or among the installed packages. Write "
            f"the module as Python imports it, with dots and without .py: mypackage.models:tiny."
        ) from error
    if not hasattr(found, name):
        own = [n for n, v in vars(found).items() if callable(v) and getattr(v, "__module__", None) == module]
        raise ValueError(
            f"{what} {place!r}: the module {module} has no {name!r}; it has {', '.join(own) or 'no functions'}."
        )
    return getattr(found, name)


def _made(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if ":" not in name:
        raise ValueError(
            f"there is no file or folder {name!r} here. A model of your own is given as module.path:function, e.g. "
            f"mypackage.models:tiny; a model of the Hugging Face Hub by its folder, after `hf download "
            f"OWNER/NAME --local-dir FOLDER`."
        )
    factory = named_object(name, "model")
    if needed := _needed_by(factory):
        raise ValueError(
            f"model {name!r} cannot be called without arguments, it needs {', '.join(needed)}: name a function that "
            f"takes none and returns the model."
        )
    result = factory()
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, ())
    if not _is_model(model):
        raise ValueError(
            f"model {name!r} returned a {type(result).__name__}: it should return an nn.Module, a graph of one, or a "
            f"tuple of it and its example arguments."
        )
    return (model, (), dict(example)) if isinstance(example, dict) else (model, tuple(example), {})


def _needed_by(factory: Any) -> list[str]:
    """The arguments that it cannot be called without."""
    try:
        found = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in found if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _is_model(found: Any) -> bool:
    from torch import nn
    from torch.export import ExportedProgram

    return isinstance(found, nn.Module | ExportedProgram)


def _arguments(model: Any) -> dict[str, inspect.Parameter] | None:
    """What forward takes by name; None where it takes any name, or cannot be asked."""
    try:
        found = inspect.signature(model.forward).parameters
    except (TypeError, ValueError, AttributeError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in found.values()):
        return None
    return {n: p for n, p in found.items() if p.kind is not p.VAR_POSITIONAL}


def _needs_example(model: Any) -> bool:
    """Whether it has to be traced: not a graph, which may know its inputs."""
    from torch import fx, nn

    return isinstance(model, nn.Module) and not isinstance(model, fx.GraphModule)


def _own_example(model: Any, takes: dict[str, inspect.Parameter] | None) -> dict[str, Any]:
    """The model's `dummy_inputs`, as far as forward takes them."""
    example = getattr(model, "dummy_inputs", None)
    if isinstance(example, dict):
        return {n: v for n, v in example.items() if takes is None or n in takes}
    needed = [n for n, p in (takes or {}).items() if p.default is p.empty]
    if needed or takes is None:
        raise ValueError(
            f"{type(model).__name__} has no dummy_inputs, so an example must be given: {HOW}"
            + (f". It needs {', '.join(needed)}." if needed else ".")
        )
    return {}


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


def _example_of_config(model: Any, config: Any) -> dict[str, Any]:
    """Arguments for a Hugging Face model: from what its config says of its main input, else its `dummy_inputs`."""
    import torch

    ids = torch.randint(0, max(getattr(config, "vocab_size", 2) - 1, 1), (2, 16))
    size = getattr(config, "image_size", None)
    if model.main_input_name == "input_ids":
        kwargs = {"input_ids": ids}
    elif model.main_input_name == "pixel_values" and isinstance(size, int):
        kwargs = {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), size, size)}
    elif model.main_input_name in (own := _own_example(model, _arguments(model))):
        return own
    else:
        raise ValueError(
            f"{type(model).__name__} takes {model.main_input_name}, of which neither its config nor its dummy_inputs "
            f"tell the size: give it with --input {model.main_input_name}=float32[2,…]."
        )
    return {**kwargs, "decoder_input_ids": ids} if config.is_encoder_decoder else kwargs
