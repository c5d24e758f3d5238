"""`save_pretrained` of models that have reads: the adapter goes beside the weights, and a mark into `config.json`."""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from attnres_fx.conversion.adapter import save_adapter
from attnres_fx.conversion.adapter_folder import CONFIG_FILE
from attnres_fx.conversion.stored.whole_file import write_whole
from attnres_fx.errors import SaveError

#: The key in `config.json`; diffusers shows keys as attributes of the model, of which `attnres` is one already.
MARK = "attnres_fx"
_MODEL_CONFIG = "config.json"


def saving_methods(base: type, why_not: Callable[[Any], str] | None = None) -> dict[str, Any]:
    """What a class derived from a model's own has in place of its `save_pretrained` and `from_pretrained`.

    Args:
        base: The model's own class.
        why_not: Of a module, why it cannot be saved by itself; empty where it can.

    Returns:
        Members by name; empty for a class that has no such methods.
    """
    if not callable(getattr(base, "save_pretrained", None)):
        return {}
    members: dict[str, Any] = {"save_pretrained": _with_adapter(base.save_pretrained, why_not)}  # type: ignore[attr-defined]
    if callable(getattr(base, "from_pretrained", None)):

        @functools.wraps(base.from_pretrained)  # type: ignore[attr-defined]
        def from_pretrained(_: type, *args: Any, **kwargs: Any) -> Any:
            return base.from_pretrained(*args, **kwargs)  # type: ignore[attr-defined]

        members["from_pretrained"] = classmethod(from_pretrained)
    return members


def _with_adapter(own: Any, why_not: Callable[[Any], str] | None) -> Any:
    signature = inspect.signature(own)

    @functools.wraps(own)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if why_not is not None and (reason := why_not(self)):
            raise SaveError(reason)
        if given.get("push_to_hub"):
            raise SaveError(
                "save_pretrained(push_to_hub=True) uploads the folder before the adapter is in it: save it, then "
                "upload it with huggingface_hub.upload_folder(repo_id=..., folder_path=...)."
            )
        result = own(self, *args, **kwargs)
        if given.get("is_main_process", True):
            folder = Path(next(value for name, value in given.items() if name != "self"))
            save_adapter(self, folder)
            _mark(folder, self)
        return result

    return save_pretrained


def _mark(folder: Path, model: nn.Module) -> None:
    """Say in the folder's `config.json`, where it has one, that the model has an adapter."""
    place = folder / _MODEL_CONFIG
    if not place.is_file():  # a framework's own adapters are saved without the model's config
        return
    attnres: Any = model.attnres
    said = {"adapter": CONFIG_FILE, **dataclasses.asdict(attnres.config)}
    text = json.dumps({**json.loads(place.read_text()), MARK: said}, indent=2, sort_keys=True) + "\n"
    write_whole(place, lambda path: path.write_text(text))
