"""What the cases of a pipeline are registered with and measured by."""

import torch
import torch.distributed as dist

from attnres_fx import AttnResError
from attnres_fx.partition.runtime import build_pipeline
from tests.support.pipeline_model import HandPlan, HandStages, loss_fn

CASES = {"two": {}, "four": {}}
EVERY = [(s, 1) for s in ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble")]
EVERY += [(s, 2) for s in ("Interleaved1F1B", "InterleavedZeroBubble")]


def case(*suites, **options):
    def add(function):
        for suite in suites:
            CASES[suite][function.__name__ + "".join(f" {v}" for v in options.values())] = (function, options)
        return function

    return add


def every(*suites, choices):
    def add(function):
        for options in choices:
            case(*suites, **options)(function)
        return function

    return add


def build(
    model, schedule="Interleaved1F1B", virtual=2, *, ranks=None, microbatches=4, cache=True, compile=False, **options
):
    ranks = ranks or dist.get_world_size()
    stages = HandStages(model, ranks, virtual, cache=cache)
    plan = HandPlan(ranks, virtual, schedule, microbatches)
    return build_pipeline(stages, plan, loss_fn=loss_fn, compile=compile, **options)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(found, wanted):
    """Largest difference, relative to the largest number wanted."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()


def gradient_error(pipeline, reference):
    """Worst relative error over all gradients of this rank; a gradient missing on one side counts as zeros."""
    wanted = dict(reference.named_parameters(remove_duplicate=False))
    worst = 0.0
    for name, parameter in pipeline.named_parameters():
        zeros = torch.zeros_like(wanted[name])
        found = zeros if parameter.grad is None else full(parameter.grad)
        expected = zeros if wanted[name].grad is None else wanted[name].grad
        assert name == "layers.0.query" or "layers.0.key" in name or expected.abs().max() > 0, name
        worst = max(worst, difference(found, expected))
    return worst


def reference_step(reference, *batches):
    loss = loss_fn(torch.cat([reference(ids) for ids, _ in batches]), torch.cat([target for _, target in batches]))
    loss.backward()
    return loss.detach()


def compared(pipeline, reference, ids, target):
    wanted = reference_step(reference, (ids, target))
    found = pipeline.step(ids, target=target)
    return {
        "loss": difference(found, wanted),
        "gradients": gradient_error(pipeline, reference),
        "held": pipeline.num_retained,
    }


def refusal(call):
    try:
        call()
    except AttnResError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"
