"""`from_pretrained`: a folder that `save_pretrained` wrote of a model with reads, as that model."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from attnres_fx.backend.attach import attach
from attnres_fx.conversion.adapter import adapter_config, load_adapter
from attnres_fx.conversion.adapter_folder import CONFIG_FILE, TENSOR_FILE
from attnres_fx.errors import SaveError

log = logging.getLogger(__name__)

#: Arguments of `from_pretrained` that say where on a hub a file is.
_ON_A_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def from_pretrained(
    kind: Any,
    folder: Any,
    *args: Any,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """The model of a folder, attached, with the queries, key gains and gates that were saved beside its weights.

    `kind.from_pretrained` loads the weights, and tells of the `attnres.` tensors among them as unexpected; they are
    loaded from the adapter, which is logged. The model then runs compiled: `attnres_fx.compile(model)`.

    Args:
        kind: A class with `from_pretrained`: of transformers (`AutoModelForCausalLM`), of diffusers, or a user's own.
        folder: What `save_pretrained` wrote of a converted or attached model, or a repository on the Hugging Face Hub
            with the same files.
        *args: For `kind.from_pretrained`.
        example_args: Positional example arguments of a call, as for `attach`.
        example_kwargs: Keyword example arguments. With neither, the model's own `dummy_inputs`.
        **kwargs: For `kind.from_pretrained` (`dtype`, `revision`, …).

    Returns:
        What `kind.from_pretrained` returns, its model attached.

    Raises:
        SaveError: The folder holds no adapter, a damaged one, or one of another model; or the model names no inputs of
            its own and none are given.
        AttnResError: As `attach` raises.
    """
    place = _local(folder, kwargs)
    config = adapter_config(place)  # before a large model is loaded
    loaded = kind.from_pretrained(folder, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if not example_args and example_kwargs is None:
        example_kwargs = _own_example(model)
    attach(model, example_args, example_kwargs, config=config)
    load_adapter(model, place)
    log.warning("the attnres tensors that %s may have called unexpected are loaded, from the adapter", kind.__name__)
    return loaded


def _local(folder: Any, kwargs: Mapping[str, Any]) -> Path:
    """Where the adapter is on this machine, fetched from the hub where it is not."""
    place = Path(folder)
    if place.is_dir():
        return place / (kwargs.get("subfolder") or "")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise SaveError(f"{place} is no folder.") from None
    given = {name: kwargs[name] for name in _ON_A_HUB if name in kwargs}
    try:
        files = [Path(hf_hub_download(str(folder), name, **given)) for name in (CONFIG_FILE, TENSOR_FILE)]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise SaveError(f"{folder} is no folder, and no adapter was found on the hub: {error}") from error
    return files[0].parent


def _own_example(model: nn.Module) -> dict[str, Any]:
    """The model's own example of a call, without what its forward does not take."""
    example = getattr(model, "dummy_inputs", None)
    if not isinstance(example, Mapping):
        raise SaveError(
            f"{type(model).__name__} has no dummy_inputs: give from_pretrained an example of a call, as attach takes "
            f"one (example_args=, example_kwargs=)."
        )
    takes = inspect.signature(model.forward).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    return {name: value for name, value in example.items() if every or name in takes}
