"""The only file that reaches into `torch.distributed.pipelining`: a stage whose sources come from a rank's cache.

A schedule of PyTorch drives stages through a handful of methods: receive, forward, send, and the same backward.
`SourceStage` replaces what they do with tensors and leaves alone in which order they are called. So to PyTorch every
hop looks empty; buffers are made here, per microbatch and in the exact width of the hop, when a receive is posted.
Written against torch 2.13.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineSchedule, get_schedule_class

from attnres_fx.errors import PipelineError
from attnres_fx.partition.runtime.contract import Shapes, shape_of
from attnres_fx.partition.runtime.source_cache import SourceCache
from attnres_fx.partition.runtime.step_log import HopBytes, StepLog
from attnres_fx.partition.split.routes import StageRoute

MULTI_STAGE = ("Interleaved1F1B", "InterleavedZeroBubble")


class _Root(torch.autograd.Function):
    """An output as a tensor of its own: no view, and no alias of another output or of an input.

    Zero bubble detaches outputs in place once their inputs' gradients are known, which views do not allow.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


@dataclass
class _Run:
    """One microbatch between a stage's forward and its backward: inputs that want gradients, outputs that get them."""

    leaves: dict[str, Tensor]
    roots: dict[str, Tensor]


@dataclass
class _Weights:
    """What the weight gradients of a microbatch still need under zero bubble."""

    groups: list[dict[str, Any]]
    roots: list[Tensor]
    gradients: list[Tensor]


@dataclass(frozen=True)
class Terms:
    """What a stage goes by in one step; train and eval graphs may differ in all of it.

    route: what it takes and gives. inputs: which flat inputs it takes. differentiable: values whose gradients
    travel. shapes: of all values. cache: shared by the stages of a rank, or its own. frees: whether it is the last of
    its rank to use the cache in a forward pass.
    """

    route: StageRoute
    inputs: tuple[int, ...]
    differentiable: frozenset[str]
    shapes: Shapes
    cache: SourceCache
    frees: bool

    @property
    def returns(self) -> tuple[str, ...]:
        """Values whose gradients come over the hop to the next stage."""
        return tuple(n for n in self.route.sent if n in self.differentiable)

    @property
    def gives_back(self) -> tuple[str, ...]:
        """Values whose gradients leave over the hop from the stage before."""
        return tuple(n for n in self.route.received if n in self.differentiable)


class SourceStage(PipelineStage):
    """A virtual stage that takes its inputs from, and leaves its outputs in, the source cache of its rank.

    module: called with values and flat inputs; `terms` and `flat_inputs` (of every microbatch) are set before a step.
    """

    terms: Terms

    def __init__(
        self,
        module: nn.Module,
        index: int,
        count: int,
        *,
        log: StepLog,
        device: torch.device,
        group: dist.ProcessGroup | None,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(module, index, count, device, input_args=(), output_args=(), group=group)
        self.log, self.replicas = log, replicas
        self.own_cache = SourceCache()
        self.flat_inputs: Sequence[Sequence[Any]] = ()
        self.outputs: dict[int, tuple[Any, ...]] = {}
        self._arrived: dict[int, tuple[Tensor, ...]] = {}
        self._returned: dict[int, tuple[Tensor, ...]] = {}
        self._leaving: dict[int, tuple[Tensor, ...]] = {}
        self._leaving_back: dict[int, tuple[Tensor, ...]] = {}
        self._runs: dict[int, _Run] = {}
        self._weights: dict[int, _Weights] = {}

    @property
    def cache(self) -> SourceCache:
        return self.terms.cache if hasattr(self, "terms") else self.own_cache

    # Hops

    def _receive(self, names: Sequence[str], stage: int, action: str) -> tuple[tuple[Tensor, ...], list[dist.P2POp]]:
        buffers = tuple(
            torch.empty(self.terms.shapes[n][0], dtype=self.terms.shapes[n][1], device=self.device) for n in names
        )
        if not names:
            return buffers, []
        peer = self._resolve_peer_global_rank(stage)
        self.log.waiting[action] = f"stage {stage} on rank {peer}"
        return buffers, [dist.P2POp(dist.irecv, b, peer, self.group) for b in buffers]

    def _send(self, tensors: Sequence[Tensor], stage: int) -> list[dist.P2POp]:
        if not tensors:
            return []
        peer = self._resolve_peer_global_rank(stage)
        return [dist.P2POp(dist.isend, t.contiguous(), peer, self.group) for t in tensors]

    def _hop(self, stage: int) -> HopBytes:
        return self.log.sent.setdefault(stage, HopBytes())

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        action = f"{self.stage_index}F{fwd_chunk_id}"
        self._arrived[fwd_chunk_id], ops = self._receive(self.terms.route.received, self.stage_index - 1, action)
        return ops

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        values = self._leaving.pop(fwd_chunk_id, ())
        if values:
            self._hop(self.stage_index).forward += sum(v.nbytes for v in values)
        return self._send(values, self.stage_index + 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.has_backward:
            return []
        action = f"{self.stage_index}B{bwd_chunk_id}"
        self._returned[bwd_chunk_id], ops = self._receive(self.terms.returns, self.stage_index + 1, action)
        return ops

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.has_backward:
            return []
        gradients = self._leaving_back.pop(bwd_chunk_id, ())
        if gradients:
            self._hop(self.stage_index - 1).backward += sum(g.nbytes for g in gradients)
        return self._send(gradients, self.stage_index - 1)

    # Neighbours on one rank (P = 1) hand over without communication.

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        self._arrived[mb_index] = prev_stage_outputs

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor, ...]:
        return self._leaving_back.pop(mb_index, ())

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        self._returned[mb_index] = tuple(g for g in next_stage_bwd_outputs if g is not None)

    # Forward

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        mb, action = fwd_chunk_id, f"{self.stage_index}F{fwd_chunk_id}"
        self.log.waiting.pop(action, None)
        self.log.actions.append(action)
        for name, value in zip(self.terms.route.received, self._arrived.pop(mb, ()), strict=True):
            self.cache.put(mb, name, value)
        outputs = self.log.attempt(action, lambda: self._forward(mb))
        if outputs is None and not self.is_last:
            for name in self.terms.route.produced:
                shape, dtype = self.terms.shapes[name]
                self.cache.put(mb, name, torch.zeros(shape, dtype=dtype, device=self.device))
        leaving = tuple(self.cache.value(mb, name) for name in self.terms.route.sent)
        if not self.is_last and self.group_size > 1:
            self._leaving[mb] = leaving
        elif self.is_last and not self.has_backward and outputs is not None:
            self.outputs[mb] = outputs
        if not self.has_backward and self.terms.frees:
            self.cache.finish(mb)
        return outputs if self.is_last else leaving

    def _forward(self, mb: int) -> tuple[Any, ...]:
        wants = self.has_backward and torch.is_grad_enabled()
        taken = {n: self.cache.value(mb, n).detach() for n in self.terms.route.takes}
        leaves = {n: v.requires_grad_() for n, v in taken.items() if wants and n in self.terms.differentiable}
        flat = self.flat_inputs[mb]
        outputs = self.forward_maybe_with_nosync(*taken.values(), *(flat[i] for i in self.terms.inputs))
        outputs = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
        made = {} if self.is_last else self._named(outputs)
        for name, value in made.items():
            self.cache.put(mb, name, value)
        if wants:
            roots = {n: _Root.apply(v) for n, v in made.items() if n in self.terms.differentiable and v.requires_grad}
            self._runs[mb] = _Run(leaves, roots)
        return outputs

    def _named(self, outputs: tuple[Any, ...]) -> dict[str, Tensor]:
        names = self.terms.route.produced
        if len(outputs) != len(names):
            raise PipelineError(
                f"virtual stage {self.stage_index} returned {len(outputs)} values and its route names {len(names)}."
            )
        for name, value in zip(names, outputs, strict=True):
            if not isinstance(value, Tensor) or shape_of(value) != (
                tuple(self.terms.shapes[name][0]),
                self.terms.shapes[name][1],
            ):
                found = shape_of(value) if isinstance(value, Tensor) else type(value).__name__
                raise PipelineError(
                    f"virtual stage {self.stage_index} made value {name!r} as {found}; planned was "
                    f"{self.terms.shapes[name]}. Plan with the shapes, and under the autocast, that it runs with."
                )
        return dict(zip(names, outputs, strict=True))

    # Backward

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        if not self.has_backward:
            return
        mb, action = bwd_chunk_id, f"{self.stage_index}{'B' if full_backward else 'I'}{bwd_chunk_id}"
        self.log.waiting.pop(f"{self.stage_index}B{mb}", None)
        self.log.actions.append(action)
        for name, gradient in zip(self.terms.returns, self._returned.pop(mb, ()), strict=True):
            self.cache.bank(mb, name, gradient)
        run = self._runs.pop(mb, None)
        if run is not None:
            self.log.attempt(action, lambda: self._backward(mb, run, loss, full_backward, last_backward))
        self._leaving_back[mb] = tuple(self._gradient(mb, name) for name in self.terms.gives_back)
        self.cache.drop(mb, (*self.terms.route.received, *self.terms.route.produced))

    def _gradient(self, mb: int, name: str) -> Tensor:
        gradient = self.cache.gradient(mb, name)
        return torch.zeros_like(self.cache.value(mb, name)) if gradient is None else gradient

    def _backward(self, mb: int, run: _Run, loss: Tensor | None, full: bool, last: bool) -> None:
        if self.is_last:
            roots = [loss] if loss is not None and loss.requires_grad else []
            gradients = [torch.ones_like(r) for r in roots]
        else:
            roots, gradients = list(run.roots.values()), [self._gradient(mb, n) for n in run.roots]
        if full:
            found = self._full_backward(roots, gradients, list(run.leaves.values()), last)
        else:
            found, self._weights[mb] = self._input_backward(roots, gradients, list(run.leaves.values()))
        for name, gradient in zip(run.leaves, found, strict=True):
            if gradient is not None:
                self.cache.bank(mb, name, gradient)

    def _full_backward(
        self, roots: list[Tensor], gradients: list[Tensor], leaves: list[Tensor], last: bool
    ) -> Sequence[Tensor | None]:
        if not roots:
            return [None] * len(leaves)
        found, _ = self.backward_maybe_with_nosync(
            "full", {"stage_output": roots, "output_grads": gradients, "input_values": leaves}, last_backward=last
        )
        return found

    def _input_backward(
        self, roots: list[Tensor], gradients: list[Tensor], leaves: list[Tensor]
    ) -> tuple[Sequence[Tensor | None], _Weights]:
        """Gradients of the leaves alone.

        PyTorch finds the parameters that are left for later by walking up from the leaves. It so misses those that
        only reach outputs no leaf reaches, an embedding in the middle of the pipeline: such outputs wait entire.
        Nor can it tell apart two uses of one parameter (layers that share their weights): then nothing is left.
        """
        if _uses_a_parameter_twice(roots, leaves):
            return self._full_backward(roots, gradients, leaves, False), _Weights([], [], [])
        pairs = list(zip(roots, gradients, strict=True))
        reached = [pair for pair in pairs if _reaches(pair[0], leaves)]
        waiting = [pair for pair in pairs if all(pair[0] is not r for r, _ in reached)]
        later = _Weights([], [r for r, _ in waiting], [g for _, g in waiting])
        if not reached:
            return [None] * len(leaves), later
        found, groups = self.backward_maybe_with_nosync(
            "input",
            {
                "stage_output": [r for r, _ in reached],
                "output_grads": [g for _, g in reached],
                "input_values": leaves,
            },
        )
        for leaf in leaves:
            leaf.grad = None
        later.groups = groups or []
        return found, later

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if not self.has_backward:
            return
        action = f"{self.stage_index}W{bwd_chunk_id}"
        self.log.actions.append(action)
        later = self._weights.pop(bwd_chunk_id, None)
        if later is not None:
            self.log.attempt(action, lambda: self._weight_backward(later, last_backward))

    def _weight_backward(self, later: _Weights, last: bool) -> None:
        if later.groups and later.roots:
            # Both may pass through the same node, an embedding that two outputs use.
            torch.autograd.backward(later.roots, later.gradients, retain_graph=True)
        elif later.roots:
            self._full_backward(later.roots, later.gradients, [], last)
        if later.groups:
            self.backward_maybe_with_nosync("weight", {"param_groups": later.groups}, last_backward=last)

    # Between steps

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if not isinstance(self.submod, FSDPModule):
            return
        if self.has_backward and not self._failed_somewhere():
            super().perform_reduce_grad(grad_scale_factor)
        else:
            self.submod.reshard()

    def _failed_somewhere(self) -> bool:
        """Whether a replica has no gradients to reduce: the others would wait for it."""
        failed = torch.tensor(float(self.log.failure is not None), device=self.device)
        dist.all_reduce(failed, group=self.replicas)
        return bool(failed)

    def _post_metadata_inference_cleanup(self) -> None:
        """Nothing was inferred; PyTorch would drop the gradients that FSDP has accumulated."""

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        held: tuple[dict[int, Any], ...] = (
            self._arrived,
            self._returned,
            self._leaving,
            self._leaving_back,
            self._runs,
            self._weights,
            self.outputs,
        )
        for states in held:
            states.clear()
        self.cache.clear()

    @property
    def held(self) -> int:
        """Tensors that a finished step must not leave behind."""
        tensors = (self._arrived, self._returned, self._leaving, self._leaving_back, self.outputs)
        graphs = len(self._runs) + len(self._weights)
        return len(self.cache) + graphs + sum(len(held) for by_microbatch in tensors for held in by_microbatch.values())


def _reaches(root: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether the graph of `root` leads to one of the leaves."""
    wanted = {id(leaf) for leaf in leaves}
    nodes, seen = [root.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return False


def _uses_a_parameter_twice(roots: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether two operations of a graph take one and the same parameter."""
    inputs = {id(leaf) for leaf in leaves}
    nodes, seen, taken = [root.grad_fn for root in roots], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for after, _ in node.next_functions:
            if after is not None and hasattr(after, "variable") and id(after.variable) not in inputs:
                if after in taken:
                    return True
                taken.add(after)
            nodes.append(after)
    return False


def build_schedule(
    name: str, stages: Sequence[SourceStage], microbatches: int, loss: Callable[[Any, Tensor], Tensor] | None
) -> _PipelineSchedule:
    """PyTorch's schedule of that name over this rank's stages; without a loss it runs forward only."""
    driven: Any = list(stages) if name in MULTI_STAGE else stages[0]
    try:
        schedule: _PipelineSchedule = get_schedule_class(name)(driven, microbatches, loss_fn=loss, scale_grads=False)
        return schedule
    except (ValueError, AssertionError) as error:
        raise PipelineError(
            f"schedule {name!r} does not run {microbatches} microbatches on {len(stages)} virtual stages a rank: "
            f"{error} Change num_microbatches or schedule in the plan."
        ) from error


def run_schedule(schedule: _PipelineSchedule, microbatches: int) -> None:
    """All of a schedule's actions. The loss is called with a microbatch's output and its number as a tensor."""
    schedule.step(target=torch.arange(microbatches), return_outputs=False)
