"""Packages that only some of the analysis needs, imported when it is asked for."""

import importlib
from typing import Any

from attnres_fx.errors import MissingPackageError


def needed(module: str, install: str, what: str) -> Any:
    """A module of an optional package.

    Args:
        module: Its name.
        install: What to hand to `pip install`.
        what: What needs it, as the subject of a sentence.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MissingPackageError(
            f"{what} needs {package}, which cannot be imported ({error}): pip install {install}"
        ) from error
