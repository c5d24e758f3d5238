"""The operators are registered as soon as torch is there; torch is not imported for their sake."""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_TORCH = "torch"


class _AfterTorch:
    """A finder that finds torch as the others do, and registers the operators once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TORCH:
            return None
        others = (f for f in list(sys.meta_path) if f is not self and hasattr(f, "find_spec"))
        spec = next((s for f in others if (s := f.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            # The loader stays what it is: torch and others ask it for sources and data.
            spec.loader.exec_module = self._then_registered(spec.loader.exec_module)  # type: ignore[assignment, method-assign]
        return spec

    def _then_registered(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)  # type: ignore[arg-type]
            importlib.import_module("attnres_fx.ops")

        return execute_and_register


def register_operators() -> None:
    """Register the operators with torch: at once if it is imported, else when it is.

    Programs that were saved hold the operators by name: whoever imported this package can load them.
    """
    if _TORCH in sys.modules:
        importlib.import_module("attnres_fx.ops")
    elif not any(isinstance(f, _AfterTorch) for f in sys.meta_path):
        sys.meta_path.insert(0, _AfterTorch())  # type: ignore[arg-type]
