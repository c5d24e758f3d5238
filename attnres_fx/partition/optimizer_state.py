"""An optimizer's state between a checkpoint, which knows parameters by name, and the optimizer, which counts them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def room_for(parameter: Tensor, prefixes: tuple[str, ...], written: dict[str, Any]) -> dict[str, Any]:
    """Where to read a parameter's optimizer state into: sharded as the parameter is, where it has its shape."""
    room: dict[str, Any] = {}
    for key, what in written.items():
        if key.startswith(prefixes):
            if not isinstance(what, TensorStorageMetadata):
                room[key] = None
            elif what.size == parameter.shape:
                room[key] = torch.zeros_like(parameter, dtype=what.properties.dtype, requires_grad=False)
            else:
                room[key] = torch.zeros(what.size, dtype=what.properties.dtype)
    return room


def restore_optimizer(optimizer: torch.optim.Optimizer, prefixes: Sequence[str], state: dict[str, Any]) -> None:
    """Put what was read where the optimizer keeps it; parameters the checkpoint knows nothing of start afresh."""
    whole = optimizer.state_dict()
    ordered = iter(prefixes)

    def read(prefix: str) -> dict[str, Any]:
        """Copies: data parallelism gives tied parameters of one rank each their own state."""
        entries = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in entries.items()}

    for group in whole["param_groups"]:
        for place, (index, prefix) in enumerate(zip(group["params"], ordered, strict=False)):
            entries = read(prefix.replace("param_groups", "state", 1))
            if entries:
                whole["state"][index] = entries
            if place == 0:
                group |= read(prefix)
    optimizer.load_state_dict(whole)
