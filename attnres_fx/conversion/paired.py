"""An original and its conversion, run side by side on clones."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from attnres_fx.capture.isolated_run import Mode, isolated_clone, set_mode_
from attnres_fx.capture.reachable_objects import left_as_it_was
from attnres_fx.conversion.captured_program import CapturedProgram, flat_arguments, run_program
from attnres_fx.conversion.comparison import VerifyReport, differences_of
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.trial import BackwardError, Outcome, outcome_of
from attnres_fx.errors import AttnResError, CheckError, ExampleError
from attnres_fx.passes.graph.mutation_order import written_attributes
from attnres_fx.passes.graph.nodes import value_of
from attnres_fx.shown import shortened
from attnres_fx.stream_reads import StreamRead


def _start_anew_(read: StreamRead) -> None:
    """Give a read new parameters as a conversion makes them, in place; under a parametrization its original."""
    for path, parameter in list(read.named_parameters()):
        *inside, last = path.split(".")
        name = inside[-1] if inside and inside[0] == "parametrizations" else last
        holder = read.get_submodule(".".join(inside))
        holder._parameters[last] = nn.Parameter(read.initial(name).to(parameter).expand_as(parameter).clone())


class Pair:
    """An original and its conversion on clones that go on from call to call, in one mode, at zero queries."""

    def __init__(self, original: nn.Module, converted: ConvertedModel, mode: Mode, program: CapturedProgram) -> None:
        self.mode, self.converted, self.given = mode, converted, original
        self.program = program
        written = written_attributes(program.graph)
        self.original = isolated_clone(original, written)
        if isinstance(original, GraphModule) and len(converted.programs) == 1:
            self.original.training = mode == "train"  # a trace in one mode: the modules that it calls stay in theirs
        else:
            set_mode_(self.original, mode)
        self.root = isolated_clone(converted, written)
        modules = dict(self.root.named_modules())
        for path, module in self.original.named_modules():
            if path in modules:  # a symbolic trace calls modules that look at their mode
                modules[path].training = module.training
        for read in self.root._modules["attnres"].reads:  # type: ignore[union-attr]
            _start_anew_(read)
        tables = {c.place for c in program.unkept if c.table}  # another size, and the same rows
        named = (*self.original.named_parameters(), *self.original.named_buffers())
        self.names = [n for n, _ in named if n not in tables]

    def originals(self, args: Any, kwargs: Any, *, gradients: bool) -> Outcome:
        bound = self.program.signature.bound_values
        kwargs = {**bound, **kwargs}
        with left_as_it_was(self.original, args, kwargs):
            return outcome_of(
                self.original, self.original, self.names, args, kwargs, gradients=gradients, asked=self._asked
            )

    def conversions(self, args: Any, kwargs: Any, *, gradients: bool) -> Outcome:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return run_program(self.program, self.root, flat_arguments(self.program, args, kwargs))

        self.root.__dict__["forward"] = forward  # the call itself is a user's, with the hooks on the model
        return outcome_of(self.root, self.root, self.names, args, kwargs, gradients=gradients, asked=self._asked)

    @property
    def _asked(self) -> bool | None:
        """Whether gradients were on when the program was traced, where the model's code asks for it."""
        assumed = self.program.assumed.gradients
        return None if assumed is None else assumed[0] is not False

    def compared(self, args: Any, kwargs: Any, *, gradients: bool, sizes: str = "") -> VerifyReport:
        gradients = gradients and not self.program.lost
        try:
            before = self.originals(args, kwargs, gradients=gradients)
        except BackwardError:  # the original cannot be trained on these arguments
            return self.fresh().compared(args, kwargs, gradients=False, sizes=sizes)
        except AttnResError:
            raise
        except Exception as error:  # whatever a model raises
            raise ExampleError(self._fails(error)) from error
        try:
            after = self.conversions(args, kwargs, gradients=gradients)
        except AttnResError:
            raise
        except Exception as error:  # whatever the graph raises where the original does not
            raise CheckError(
                f"the graph of {type(self.given).__name__} raises {type(error).__name__} in {self.mode} mode, and the "
                f"original does not: {str(error).rstrip('.')}. Use ax.compile, which runs the model's own Python, or "
                f"convert(check=False) for a graph to look at."
            ) from error
        return self.report(before, after, sizes)

    def _fails(self, error: Exception) -> str:
        text = shortened(" ".join(str(error).split()).rstrip("."), 400)
        return (
            f"{self.converted.report.model} itself fails on these arguments, in {self.mode} mode: "
            f"{type(error).__name__}: {text}. Give arguments that the model runs with: look at their dtypes, shapes, "
            f"and the range of indices."
        )

    def report(self, before: Outcome, after: Outcome, sizes: str) -> VerifyReport:
        """How far two outcomes are apart."""
        return VerifyReport(self.mode, tuple(differences_of(before, after, self._dtypes())), sizes)

    def _dtypes(self) -> set[torch.dtype]:
        """The floating dtypes in which is computed what comes from reads."""
        reads = {replacement.node for replacement in self.program.replacements}
        from_reads: set[Node] = set()
        for node in self.program.graph.nodes:
            if node.name in reads or not from_reads.isdisjoint(node.all_input_nodes):
                from_reads.add(node)
        values = [x for node in from_reads for x in pytree.tree_leaves(value_of(node)) if isinstance(x, Tensor)]
        values += self.root.get_submodule("attnres").parameters()  # they tell of a cast since the capture
        kinds = {t.device.type for t in values}
        cast = {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
        return {t.dtype for t in values if t.is_floating_point()} | cast

    def fresh(self) -> "Pair":
        """The pair before its first call."""
        return Pair(self.given, self.converted, self.mode, self.program)
