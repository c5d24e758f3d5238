"""All stages of a model together: their values, sizes, modes, and how the model is called."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, overload

import torch

from attnres_fx.capture.isolated_run import Mode
from attnres_fx.partition.split.batch_rows import inputs_with_rows
from attnres_fx.partition.split.input_sizes import concrete_shape, sizes_for
from attnres_fx.partition.split.routes import StageValue
from attnres_fx.partition.split.split_chain import Split
from attnres_fx.partition.split.stage import Stage
from attnres_fx.passes.graph.nodes import tensor_of
from attnres_fx.state_config import MadeFor


class Stages(Sequence[Stage]):
    """The virtual stages of a model in order, and what they have in common. Made by `build_stages`.

    Attributes:
        num_stages: pipeline ranks P.
        virtual_stages: virtual stages per rank V; stage c runs on rank c mod P.
        cache: whether the stages of a rank share the values they have received or produced.
        made_for: the config and the blocks that the model was converted with.
        tied: groups of (stage, parameter name) that are one and the same parameter.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        splits: Mapping[Mode, Split],
        *,
        num_stages: int,
        virtual_stages: int,
        cache: bool = True,
        made_for: MadeFor,
        leaves: Callable[[tuple[Any, ...], Mapping[str, Any]], list[Any]],
        flatten: Callable[[Mode, tuple[Any, ...], Mapping[str, Any]], list[Any]],
        unflatten: Callable[[Mode, Any], Any],
    ) -> None:
        self._stages = tuple(stages)
        self._splits = dict(splits)
        self._with_rows = {mode: inputs_with_rows(split.chain.graph) for mode, split in splits.items()}
        self.num_stages = num_stages
        self.virtual_stages = virtual_stages
        self.cache = cache
        self.made_for = made_for
        self._leaves = leaves
        self._flatten = flatten
        self._unflatten = unflatten
        self.tied = _tied(self._stages)

    def __len__(self) -> int:
        return len(self._stages)

    @overload
    def __getitem__(self, index: int) -> Stage: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Stage, ...]: ...
    def __getitem__(self, index: int | slice) -> Stage | tuple[Stage, ...]:
        return self._stages[index]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self._stages)

    @property
    def mode(self) -> Mode:
        """The mode whose graphs run."""
        return self._stages[0].mode

    @property
    def values(self) -> tuple[StageValue, ...]:
        """What travels between stages in the current mode, in the order in which it is made."""
        return self._splits[self.mode].values

    def shapes(self, inputs: Sequence[Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every value that travels.

        Args:
            inputs: a microbatch's flat inputs, as `flatten` returns them.

        Returns:
            By name of the value, its shape and dtype in the current mode.
        """
        split = self._splits[self.mode]
        nodes = [n for n in split.chain.graph.nodes if n.op == "placeholder"]
        sizes = sizes_for(split.symbols, dict(zip(nodes, inputs, strict=True)))
        shapes = {}
        for name, node in split.nodes.items():
            value = tensor_of(node)
            assert value is not None
            shapes[name] = (concrete_shape(value, sizes), value.dtype)
        return shapes

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """A call's arguments as the model's flat inputs.

        Args:
            args: By position.
            kwargs: By keyword.

        Returns:
            One value per input of the current mode's graph, in order.

        Raises:
            ArgumentError: They do not fit what was captured.
        """
        return self._flatten(self.mode, args, kwargs)

    def shared(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[int]:
        """The tensors among the arguments of a whole batch that all its rows share, by the sizes of the graph.

        Args:
            args: by position.
            kwargs: by keyword.

        Returns:
            Their ids; empty where the graph has no free size that tells.
        """
        inputs = self._leaves(args, kwargs)
        with_rows = self._with_rows[self.mode]
        if len(inputs) != len(with_rows):
            return set()
        held = {id(x) for x, has in zip(inputs, with_rows, strict=True) if has}
        return {id(x) for x in inputs if isinstance(x, torch.Tensor)} - held

    def unflatten(self, outputs: Any) -> Any:
        """The last stage's outputs as the model returns them.

        Args:
            outputs: What the last stage returned: flat, in the order of the model's own outputs.

        Returns:
            The same values in the structure that the model returns.
        """
        return self._unflatten(self.mode, outputs)

    def train(self, mode: bool = True) -> Self:
        """Choose the train graphs of all stages, or the eval ones.

        Args:
            mode: True for train mode, False for eval mode.

        Returns:
            The stages themselves.
        """
        for stage in self._stages:
            stage.train(mode)
        return self

    def eval(self) -> Self:
        """Choose the eval graphs of all stages.

        Returns:
            The stages themselves.
        """
        return self.train(False)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """All stages one after another in this process: what the pipeline computes, for comparisons.

        Args:
            *args: of a call of the model, by position.
            **kwargs: of a call of the model, by keyword.

        Returns:
            What the model returns.
        """
        leaves = self.flatten(args, kwargs)
        held: dict[str, Any] = {}
        outputs: Any = ()
        for stage in self._stages:
            taken = [held[name] for name in stage.route.takes]
            outputs = stage(*taken, *(leaves[i] for i in stage.inputs))
            if stage is not self._stages[-1]:
                held.update(zip(stage.route.produced, outputs, strict=True))
        return self.unflatten(outputs)


def _tied(stages: Sequence[Stage]) -> tuple[tuple[tuple[int, str], ...], ...]:
    places: dict[int, list[tuple[int, str]]] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            places.setdefault(id(parameter), []).append((stage.index, name))
    return tuple(tuple(group) for group in places.values() if len(group) > 1)
