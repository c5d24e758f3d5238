"""The mode that a conversion leaves for later: captured, rewritten and checked when it is first needed."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from attnres_fx.capture.captured_module import capture_module
from attnres_fx.capture.isolated_run import Mode, outside_inference_mode
from attnres_fx.capture.module_clone import clone_tree
from attnres_fx.conversion.adopted_graph import captured_program
from attnres_fx.conversion.captured_program import CapturedProgram
from attnres_fx.conversion.conversion import ADDED
from attnres_fx.conversion.conversion_call import ConversionCall
from attnres_fx.conversion.converted_model import ConvertedModel
from attnres_fx.conversion.edits import guard_forwards
from attnres_fx.conversion.progress import Progress
from attnres_fx.conversion.rewriting import modules_that_add, require_same_reads, rewrite_, same_streams
from attnres_fx.conversion.size_check import bar_unchecked_ones
from attnres_fx.conversion.verify import check_program
from attnres_fx.passes import analyze_, topology_of

#: Types of tensors that a tracer sees as what they are; others (sharded, quantised) are traced through stand-ins.
_PLAIN = (Tensor, nn.Parameter, nn.UninitializedParameter, nn.Buffer)


@dataclass(frozen=True, eq=False)
class DeferredMode:
    """Captures one more mode of a converted model, with the example of its conversion.

    Attributes:
        mode: `"train"` or `"eval"`.
        call: What the other mode was converted with.
        tree: The original's modules without their tensors, as they were at the conversion.
    """

    mode: Mode
    call: ConversionCall
    tree: nn.Module

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # a copy of the model captures the same mode in the same way

    @outside_inference_mode()
    def __call__(self, model: ConvertedModel) -> CapturedProgram:
        """The program of the mode, checked against the original.

        Raises:
            AttnResError: The mode cannot be captured, does not have the reads of the other, or computes another thing.
        """
        with Progress(model.report.model) as progress:
            progress.step(f"capturing the {self.mode} program")
            plain = all(type(t) in _PLAIN for t in (*model.parameters(), *model.buffers()))
            source, stand_ins = (model.original(), {}) if plain else self._stand_in_source(model)
            source.train(
                self.mode == "train"
            )  # the model may be half way: its root has switched, its children have not
            args, kwargs = self.call.example_for(model)
            captured = capture_module(source, args, kwargs, self.call.dynamic_shapes, (self.mode,), hooks="stateless")
            for note in captured.notes:
                model.report.add_note(note)
            graph = captured.graphs[self.mode]
            streams = analyze_(graph.gm)
            selected = [s.stream for s in model.report.streams]
            require_same_reads({self.mode: streams}, selected)
            plan = topology_of(self.call.config).plan(streams, same_streams(streams, selected), self.call.config)
            model.report.follow(self.call.config, plan.streams)
            guard_forwards(model, model._attnres_conversion.guarded, modules_that_add(captured.root, graph.gm, plan))
            reads = rewrite_(graph.gm, streams, plan, model.attnres)
            _put_back(graph.gm, stand_ins)
            training = self.mode == "train"
            # The example repeats what the first capture bound: only its signature says that a call may leave that out.
            program = captured_program(
                model, self.mode, graph, reads, model._attnres_conversion.signature, captured.in_spec, training
            )
            if plain:
                progress.step(f"comparing the {self.mode} program with the original")
                original = model.original(hooks=True)
                original.train(training)
                check_program(original, model, self.mode, program, captured, self.call.check)
            else:
                bar_unchecked_ones(model, program)
        return program

    def _stand_in_source(self, model: ConvertedModel) -> tuple[nn.Module, dict[int, Tensor]]:
        """The original's modules on tensors without data, for a model whose tensors are sharded or quantised.

        Returns:
            The modules, and by the id of each stand-in the model's tensor.
        """
        source, _ = clone_tree(self.tree)
        made: dict[int, Tensor] = {}
        held: dict[int, Tensor] = {}
        modules = dict(source.named_modules(remove_duplicate=False))
        for path, module in model.named_modules(remove_duplicate=False):
            if path.partition(".")[0] in ADDED:
                continue
            for store in ("_parameters", "_buffers"):
                for name, tensor in getattr(module, store).items():
                    if tensor is not None and path in modules:
                        stand_in = made.setdefault(id(tensor), _without_data(tensor))
                        held[id(stand_in)] = tensor
                        getattr(modules[path], store)[name] = stand_in
        return source, held


def _without_data(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device that takes the memory of one number."""
    made = torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def without_tensors(model: nn.Module) -> nn.Module:
    """A clone of a module tree that holds no parameter and no buffer."""
    tree, _ = clone_tree(model)
    for module in tree.modules():
        for store in (module._parameters, module._buffers):
            store.update(dict.fromkeys(store))
    return tree


def _put_back(gm: GraphModule, stand_ins: dict[int, Tensor]) -> None:
    """Let a graph hold the tensors that stand-ins were traced for."""
    if not stand_ins:
        return
    for module in gm.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if id(tensor) in stand_ins:
                    store[name] = stand_ins[id(tensor)]  # type: ignore[assignment]
