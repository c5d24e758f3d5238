"""Pipelines over converted models: processes that run the cases of a suite and write what they found, a line a case.

The models are converted and cut once, before the processes of both suites are forked.

python -m tests.support.model_pipeline_workers FOLDER
"""

import json
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from attnres_fx.partition.costs.stage_loads import StageLoad
from attnres_fx.partition.runtime import build_pipeline
from attnres_fx.partition.simulate.timeline import simulate
from tests.support.piped_models import chains, convert, cut, cut_once, loss_fn
from tests.support.pipeline_cases.tools import full
from tests.support.pipeline_worlds import in_processes

CASES = {"two": {}, "four": {}}
RANKS = {"two": 2, "four": 4}
ZERO_BUBBLE = "InterleavedZeroBubble"
EVERY = (("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 1), ("Interleaved1F1B", 2), (ZERO_BUBBLE, 1), (ZERO_BUBBLE, 2))


@dataclass(frozen=True)
class Ask:
    num_stages: int
    virtual_stages: int
    schedule: str
    num_microbatches: int = 4


def case(suite):
    def add(function):
        CASES[suite][function.__name__] = function
        return function

    return add


def pipeline_of(
    converted,
    schedule,
    virtual,
    *,
    ranks=None,
    cache=True,
    starts=None,
    recompute=False,
    compile=False,
    modes=("train",),
    **options,
):
    ranks = ranks or dist.get_world_size()
    stages = cut(converted, ranks, virtual, cache=cache, starts=starts, recompute=recompute, modes=modes)
    return build_pipeline(stages, Ask(ranks, virtual, schedule), loss_fn=loss_fn, compile=compile, **options), stages


def difference(found, wanted, least=1e-4):
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=least))


def gradient_error(pipeline, wanted):
    worst = 0.0
    for name, parameter in pipeline.named_parameters():
        found = torch.zeros_like(wanted[name]) if parameter.grad is None else full(parameter.grad)
        worst = max(worst, difference(found, wanted[name]))
    return worst


_one_process = {}


def one_process(converted, kwargs, target):
    """Loss and gradients of the whole model, once in each process: no case leaves it with other weights."""
    if converted not in _one_process:
        converted.zero_grad()
        loss = loss_fn(converted(**kwargs), target)
        loss.backward()
        named = converted.named_parameters(remove_duplicate=False)
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}
        _one_process[converted] = loss.detach(), gradients
    return _one_process[converted]


def compared(pipeline, converted, kwargs, target):
    loss, gradients = one_process(converted, kwargs, target)
    return {
        "loss": difference(pipeline.step(**kwargs, target=target), loss),
        "gradients": gradient_error(pipeline, gradients),
        "held": pipeline.num_retained,
    }


def bytes_as_routed(pipeline, stages):
    """Whether what was sent is what the routes say, to the byte."""
    sizes = {v.name: v for v in stages.values}
    wanted = {}
    for stage in pipeline.stages:
        route = stages[stage.stage_index].route
        wanted.setdefault(stage.stage_index, [0, 0])[0] += 4 * sum(sizes[n].bytes for n in route.sent)
        back = sum(sizes[n].bytes for n in route.received if sizes[n].differentiable)
        wanted.setdefault(stage.stage_index - 1, [0, 0])[1] += 4 * back
    sent = {hop: [b.forward, b.backward] for hop, b in pipeline.bytes_sent.items()}
    return sent == {hop: b for hop, b in wanted.items() if any(b)}


def simulated_order(schedule, virtual):
    """What the timeline says this rank does, in order."""
    ranks = dist.get_world_size()
    loads = [StageLoad(1.0, 1.0, 1.0, 0.1, 0.1)] * (ranks * virtual)
    timeline = simulate(loads, schedule=schedule, num_stages=ranks, virtual_stages=virtual, num_microbatches=4)
    return timeline.order(dist.get_rank())


def with_and_without_cache(choices):
    """(schedule, virtual, cache): without it for the first and the last choice."""
    for choice in choices:
        yield from ((*choice, cache) for cache in ((True, False) if choice in (choices[0], choices[-1]) else (True,)))


def against_one_process(kind, choices, config):
    converted, kwargs, target = convert(kind, **config)
    found = {}
    for schedule, virtual, cache in with_and_without_cache(choices):
        ranks = dist.get_world_size()
        stages = cut_once(converted, ranks, virtual, cache=cache)
        pipeline = build_pipeline(stages, Ask(ranks, virtual, schedule), loss_fn=loss_fn, compile=False)
        key = f"{schedule} {virtual} {'cache' if cache else 'no cache'}"
        found[key] = compared(pipeline, converted, kwargs, target)
        found[key]["bytes"] = bytes_as_routed(pipeline, stages)
        found[key]["order"] = pipeline.actions == simulated_order(schedule, virtual)
    return found


CONFIGS = {
    "full": {"variant": "full"},
    "aligned": {"variant": "block", "boundaries": (2, 4, 6)},
    "spanning": {"variant": "block", "boundaries": (3,)},
    "local": {"variant": "local", "boundaries": (3, 5)},
}
SOME = (EVERY[1], EVERY[3], EVERY[5])
#: What is held against one process: kind, config and choices, by suite and case.
HELD = {
    "two": {f"gpt {name}": ("gpt", EVERY, config) for name, config in CONFIGS.items()},
    "four": {f"gpt {name}": ("gpt", EVERY[1:], config) for name, config in CONFIGS.items()},
}
#: Reads that no kernel has, a window that sources leave, and weights that are no function of the input.
FORMS = {
    "window": {
        "variant": "full",
        "window": 2,
        "query": "input",
        "heads": 4,
        "source_bias": True,
        "value_norm": True,
        "weights": "sigmoid",
        "output": "mean",
    },
    "static": {"weights": "static", "num_blocks": 2},
}
HELD["two"] |= {f"shared {name}": ("shared", SOME, config) for name, config in FORMS.items()}
for suite, kinds in {"two": ("llama", "t5", "shared"), "four": ("llama", "t5")}.items():
    HELD[suite] |= {kind: (kind, SOME, {"num_blocks": 2}) for kind in kinds}
    CASES[suite] |= {name: partial(against_one_process, *held) for name, held in HELD[suite].items()}


@case("two")
def compiled():
    found = {}
    for kind, config, schedule, virtual, backend in (
        ("brief", CONFIGS["full"], "1F1B", 1, "inductor"),
        ("shared", {"num_blocks": 2}, "Interleaved1F1B", 2, "aot_eager"),
    ):
        torch._dynamo.reset()
        converted, kwargs, target = convert(kind, **config)
        pipeline, _ = pipeline_of(converted, schedule, virtual, compile=backend)
        found[schedule] = compared(pipeline, converted, kwargs, target)
    return found


@case("two")
def recomputing():
    found = {}
    for kind, config, schedule, virtual, backend in (
        ("gpt", CONFIGS["spanning"], "1F1B", 1, False),
        ("gpt", CONFIGS["spanning"], "Interleaved1F1B", 2, False),
        ("gpt", CONFIGS["spanning"], ZERO_BUBBLE, 2, False),
        ("shared", {"num_blocks": 2}, "1F1B", 1, "aot_eager"),
    ):
        torch._dynamo.reset()
        converted, kwargs, target = convert(kind, **config)
        pipeline, stages = pipeline_of(converted, schedule, virtual, recompute=True, compile=backend)
        assert all(s.programs[s.mode].parts for s in stages)
        found[f"{schedule} {backend}"] = compared(pipeline, converted, kwargs, target)
    return found


@case("two")
def evaluation():
    """Eval graphs have other nodes than train graphs; their values travel under their own names."""
    converted, kwargs, target = convert("t5", num_blocks=2)
    pipeline, _ = pipeline_of(converted, "Interleaved1F1B", 2, modes=("train", "eval"))
    found = pipeline.evaluate(**kwargs, target=target)
    converted.eval()
    with torch.no_grad():
        wanted = converted(**kwargs)
    converted.train()
    result = {"loss": difference(found.loss, loss_fn(wanted, target))}
    if found.outputs is not None:
        result["logits"] = difference(found.outputs.logits, wanted.logits)
    result["after"] = compared(pipeline, converted, kwargs, target)
    return result


@case("two")
def five_steps():
    """The same losses as one process, AdamW and clipping included, with weights tied over two ranks."""
    found = {}
    for schedule, virtual in (("1F1B", 1), (ZERO_BUBBLE, 2)):
        converted, kwargs, target = convert("gpt", **CONFIGS["aligned"])
        pipeline, _ = pipeline_of(converted, schedule, virtual)
        saved = {n: p.detach().clone() for n, p in converted.named_parameters()}
        mine = torch.optim.AdamW(pipeline.parameters(), lr=0.01)
        theirs = torch.optim.AdamW(converted.parameters(), lr=0.01)
        losses, norms = [], []
        for _ in range(5):
            theirs.zero_grad()
            wanted = loss_fn(converted(**kwargs), target)
            wanted.backward()
            norm = nn.utils.clip_grad_norm_(converted.parameters(), 0.5)
            theirs.step()
            pipeline.zero_grad()
            loss = pipeline.step(**kwargs, target=target)
            norms.append(difference(pipeline.clip_grad_norm_(0.5), norm))
            mine.step()
            losses.append(difference(loss, wanted.detach()))
        with torch.no_grad():
            for name, parameter in converted.named_parameters():
                parameter.copy_(saved[name])
        found[schedule] = {"loss": max(losses), "norm": max(norms)}
    return found


@case("four")
def sharded():
    """FSDP2 on every stage over a mesh of two pipelines of two, every schedule."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    found = {}
    for schedule, virtual in EVERY:
        converted, kwargs, target = convert("gpt", **CONFIGS["spanning"])
        pipeline, _ = pipeline_of(converted, schedule, virtual, ranks=2, mesh=mesh, data_parallel="fsdp2")
        found[f"{schedule} {virtual}"] = compared(pipeline, converted, kwargs, target)
    return found


def main(folder):
    """Convert and cut what the cases need, and run each suite in as many forked processes as it has ranks."""
    torch.set_num_threads(1)
    for suite, held in HELD.items():
        for kind, choices, config in held.values():
            for _, virtual, cache in with_and_without_cache(choices):
                cut_once(convert(kind, **config)[0], RANKS[suite], virtual, cache=cache)
    chains(convert("t5", num_blocks=2)[0], ("train", "eval"))
    chains(convert("brief", **CONFIGS["full"])[0])
    for suite, world in RANKS.items():
        in_processes(world, lambda rank, suite=suite, world=world: run_rank(suite, rank, world, folder))


def run_rank(suite, rank, world, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{suite}.store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    with (Path(folder) / f"{suite}.{rank}.jsonl").open("w") as out:
        for name, run in CASES[suite].items():
            begin = time.time()
            try:
                result = run()
            except Exception:
                result = {"error": traceback.format_exc()}
            out.write(json.dumps([name, result, time.time() - begin]) + "\n")
            out.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
