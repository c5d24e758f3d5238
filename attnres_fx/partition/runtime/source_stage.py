"""A stage of `torch.distributed.pipelining` whose sources come from its rank's cache.

A schedule of PyTorch drives stages through a handful of methods: receive, forward, send, and the same backward.
`SourceStage` replaces what they do with tensors and leaves alone in which order they are called. So to PyTorch every
hop looks empty; buffers are made here, per microbatch and in the exact width of the hop, when a receive is posted.
Written against torch 2.13.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from attnres_fx.errors import PipelineError
from attnres_fx.partition.runtime import stage_backward
from attnres_fx.partition.runtime.source_cache import SourceCache
from attnres_fx.partition.runtime.stage_backward import DeferredWeights, DetachedOutput, ForwardState
from attnres_fx.partition.runtime.stage_spec import StageSpec, shape_of
from attnres_fx.partition.runtime.step_log import HopBytes, StepLog


class SourceStage(PipelineStage):
    """A virtual stage that takes its inputs from, and leaves its outputs in, the source cache of its rank.

    `spec` and `flat_inputs` (those of every microbatch) are set before a step. What is received or to be sent waits
    by microbatch under PyTorch's names of the four transfers: fwd_recv, fwd_send, bwd_recv, bwd_send.
    """

    spec: StageSpec

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
        """Stage `index` of `count` stages.

        Args:
            module: Called with the values it takes and then its flat inputs, all positional.
            index: Of the virtual stage.
            count: Virtual stages of the pipeline.
            log: Shared by the stages of this rank.
            device: Where it runs.
            group: The ranks of the pipeline.
            replicas: The ranks that hold the same stage, under data parallelism.
        """
        super().__init__(module, index, count, device, input_args=(), output_args=(), group=group)
        self.log, self.replicas = log, replicas
        self.own_cache = SourceCache()
        self.flat_inputs: Sequence[Sequence[Any]] = ()
        self.outputs: dict[int, tuple[Any, ...]] = {}
        self._fwd_recv: dict[int, tuple[Tensor, ...]] = {}
        self._bwd_recv: dict[int, tuple[Tensor, ...]] = {}
        self._fwd_send: dict[int, tuple[Tensor, ...]] = {}
        self._bwd_send: dict[int, tuple[Tensor, ...]] = {}
        self._forward_states: dict[int, ForwardState] = {}
        self._deferred_weights: dict[int, DeferredWeights] = {}

    @property
    def cache(self) -> SourceCache:
        return self.spec.cache if hasattr(self, "spec") else self.own_cache

    # Transfers

    def _receive(self, names: Sequence[str], stage: int, action: str) -> tuple[tuple[Tensor, ...], list[dist.P2POp]]:
        buffers = tuple(
            torch.empty(self.spec.shapes[n][0], dtype=self.spec.shapes[n][1], device=self.device) for n in names
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
        self._fwd_recv[fwd_chunk_id], ops = self._receive(self.spec.route.received, self.stage_index - 1, action)
        return ops

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        values = self._fwd_send.pop(fwd_chunk_id, ())
        if values:
            self._hop(self.stage_index).forward += sum(v.nbytes for v in values)
        return self._send(values, self.stage_index + 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.has_backward:
            return []
        action = f"{self.stage_index}B{bwd_chunk_id}"
        self._bwd_recv[bwd_chunk_id], ops = self._receive(self.spec.bwd_recv, self.stage_index + 1, action)
        return ops

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.has_backward:
            return []
        gradients = self._bwd_send.pop(bwd_chunk_id, ())
        if gradients:
            self._hop(self.stage_index - 1).backward += sum(g.nbytes for g in gradients)
        return self._send(gradients, self.stage_index - 1)

    # Neighbours on one rank (P = 1) hand over without communication.

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        self._fwd_recv[mb_index] = prev_stage_outputs

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor, ...]:
        return self._bwd_send.pop(mb_index, ())

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        self._bwd_recv[mb_index] = tuple(g for g in next_stage_bwd_outputs if g is not None)

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
        for name, value in zip(self.spec.route.received, self._fwd_recv.pop(mb, ()), strict=True):
            self.cache.put(mb, name, value)
        outputs = self.log.attempt(action, lambda: self._forward(mb))
        if outputs is None and not self.is_last:
            for name in self.spec.route.produced:
                shape, dtype = self.spec.shapes[name]
                self.cache.put(mb, name, torch.zeros(shape, dtype=dtype, device=self.device))
        sent = tuple(self.cache.value(mb, name) for name in self.spec.route.sent)
        if not self.is_last and self.group_size > 1:
            self._fwd_send[mb] = sent
        elif self.is_last and not self.has_backward and outputs is not None:
            self.outputs[mb] = outputs
        if not self.has_backward and self.spec.last_user:
            self.cache.finish(mb)
        return outputs if self.is_last else sent

    def _forward(self, mb: int) -> tuple[Any, ...]:
        spec, needs_backward = self.spec, self.has_backward and torch.is_grad_enabled()
        inputs = {n: self.cache.value(mb, n).detach() for n in spec.route.takes}
        flat = self.flat_inputs[mb]
        grad_inputs = {n: v.requires_grad_() for n, v in inputs.items() if needs_backward and n in spec.differentiable}
        outputs = self.forward_maybe_with_nosync(*inputs.values(), *(flat[i] for i in spec.inputs))
        outputs = tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)
        produced = {} if self.is_last else self._by_name(outputs)
        for name, value in produced.items():
            self.cache.put(mb, name, value)
        if needs_backward:
            differentiable = {n: v for n, v in produced.items() if n in spec.differentiable and v.requires_grad}
            roots = {n: DetachedOutput.apply(v) for n, v in differentiable.items()}
            self._forward_states[mb] = ForwardState(grad_inputs, roots)
        return outputs

    def _by_name(self, outputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """The stage's outputs by the names of its route. Raises PipelineError where they are not as planned."""
        names = self.spec.route.produced
        if len(outputs) != len(names):
            raise PipelineError(
                f"virtual stage {self.stage_index} returned {len(outputs)} values and its route names {len(names)}."
            )
        for name, value in zip(names, outputs, strict=True):
            shape, dtype = self.spec.shapes[name]
            actual = shape_of(value) if isinstance(value, Tensor) else type(value).__name__
            if actual != (tuple(shape), dtype):
                raise PipelineError(
                    f"virtual stage {self.stage_index} made value {name!r} as {actual}; planned was "
                    f"{self.spec.shapes[name]}. Plan with the shapes, and under the autocast, that it runs with."
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
        for name, grad_output in zip(self.spec.bwd_recv, self._bwd_recv.pop(mb, ()), strict=True):
            self.cache.accumulate_grad(mb, name, grad_output)
        state = self._forward_states.pop(mb, None)
        if state is not None:
            self.log.attempt(action, lambda: self._backward(mb, state, loss, full_backward, last_backward))
        self._bwd_send[mb] = tuple(self._grad_or_zeros(mb, name) for name in self.spec.bwd_send)
        self.cache.drop(mb, (*self.spec.route.received, *self.spec.route.produced))

    def _grad_or_zeros(self, mb: int, name: str) -> Tensor:
        grad = self.cache.grad(mb, name)
        return torch.zeros_like(self.cache.value(mb, name)) if grad is None else grad

    def _backward(
        self, mb: int, state: ForwardState, loss: Tensor | None, full_backward: bool, last_backward: bool
    ) -> None:
        if self.is_last:
            outputs = [loss] if loss is not None and loss.requires_grad else []
            grad_outputs = [torch.ones_like(o) for o in outputs]
        else:
            outputs, grad_outputs = list(state.outputs.values()), [self._grad_or_zeros(mb, n) for n in state.outputs]
        inputs, run = list(state.inputs.values()), self.backward_maybe_with_nosync
        if full_backward:
            grad_inputs = stage_backward.full_backward(
                outputs, grad_outputs, inputs, run_backward=run, last_backward=last_backward
            )
        else:
            grad_inputs, deferred = stage_backward.input_backward(outputs, grad_outputs, inputs, run_backward=run)
            self._deferred_weights[mb] = deferred
        for name, grad_input in zip(state.inputs, grad_inputs, strict=True):
            if grad_input is not None:
                self.cache.accumulate_grad(mb, name, grad_input)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if not self.has_backward:
            return
        action = f"{self.stage_index}W{bwd_chunk_id}"
        self.log.actions.append(action)
        deferred = self._deferred_weights.pop(bwd_chunk_id, None)
        if deferred is not None:
            run = self.backward_maybe_with_nosync
            self.log.attempt(
                action,
                lambda: stage_backward.weight_backward(deferred, run_backward=run, last_backward=last_backward),
            )

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
        for tensors in self._tensors:
            tensors.clear()
        self._forward_states.clear()
        self._deferred_weights.clear()
        self.cache.clear()

    @property
    def _tensors(self) -> tuple[dict[int, tuple[Any, ...]], ...]:
        return self._fwd_recv, self._bwd_recv, self._fwd_send, self._bwd_send, self.outputs

    @property
    def num_retained(self) -> int:
        """Tensors and autograd graphs of microbatches that are still referenced; 0 between steps."""
        graphs = len(self._forward_states) + len(self._deferred_weights)
        tensors = sum(len(values) for by_microbatch in self._tensors for values in by_microbatch.values())
        return len(self.cache) + graphs + tensors
