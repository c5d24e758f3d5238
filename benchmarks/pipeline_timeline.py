"""Traffic and timeline of plans at internet scale, no model and no device: `python benchmarks/pipeline_timeline.py`.

The model is Kimi-K3-like: 93 layers of width 7168, each an attention and an expert sublayer, blocks of 12 layers (24
sublayers), bfloat16. Its sizes below are assumptions in the manner of its published relatives; what they come to is
0.5 billion active parameters a layer, 46 billion in all layers. Operations are 2 a parameter and token, and causal
attention over the microbatch as one sequence; the backward is twice the forward and once more the forward, as every
sublayer is recomputed from the value it read, which is all that is saved. A rank is one device with the microbatch to
itself; exchange between experts is not counted.

Stages end where blocks of 24 end, and inside a block are as even as can be, head counted. All variants run on the same
stages. Kept and sent values are those of `attnres_fx.partition.traffic`; times are of the model in
`attnres_fx.partition.timeline` at the speeds of `DeviceSpeed`.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, environment, write_json
from tabulate import tabulate

from attnres_fx.config import AttnResConfig
from attnres_fx.partition import DeviceSpeed, ModelCosts, StreamCost, SublayerCost
from attnres_fx.partition.costs.stage_loads import stage_loads
from attnres_fx.partition.costs.traffic import Traffic, count_traffic, stage_values
from attnres_fx.partition.simulate.timeline import simulate
from attnres_fx.passes.schedule import DepthSchedule, plan_schedule

LAYERS, WIDTH, BLOCK = 93, 7168, 24
VOCABULARY = 163_840
HEADS, QUERY_RANK, KEY_RANK = 64, 1536, 512
PLAIN_HEAD, ROTARY_HEAD, VALUE_HEAD = 128, 64, 128
EXPERT_HIDDEN, ACTIVE_EXPERTS = 2048, 9  # the shared one counted
ITEMSIZE = 2

ATTENTION_PARAMETERS = (
    WIDTH * QUERY_RANK
    + QUERY_RANK * HEADS * (PLAIN_HEAD + ROTARY_HEAD)
    + WIDTH * (KEY_RANK + ROTARY_HEAD)
    + KEY_RANK * HEADS * (PLAIN_HEAD + VALUE_HEAD)
    + HEADS * VALUE_HEAD * WIDTH
)
EXPERT_PARAMETERS = ACTIVE_EXPERTS * 3 * WIDTH * EXPERT_HIDDEN

PLANS = ((8, 4), (16, 2))
SCHEDULES = ("Interleaved1F1B", "InterleavedZeroBubble")
#: "local" has the blocks of 24, which span stages; "local, aligned" one block a stage.
VARIANTS = ("plain", "block", "full", "local", "local, aligned")


def model_costs(tokens: int) -> ModelCosts:
    """The model's costs at so many tokens a microbatch."""
    value = tokens * WIDTH * ITEMSIZE
    # Each query sees half of the sequence on average, once for its logits and once for its values.
    core = tokens * tokens * HEADS * (PLAIN_HEAD + ROTARY_HEAD + VALUE_HEAD)
    flops = (2 * tokens * ATTENTION_PARAMETERS + core, 2 * tokens * EXPERT_PARAMETERS)
    names = ("self_attn", "mlp")
    sublayers = tuple(
        SublayerCost(f"model.layers.{i // 2}.{names[i % 2]}", flops[i % 2], 3 * flops[i % 2], 0, value)
        for i in range(2 * LAYERS)
    )
    head = 2 * tokens * WIDTH * VOCABULARY
    return ModelCosts(
        sublayers,
        before=SublayerCost("model.embed_tokens", 0, 0, 0, 0),
        after=SublayerCost("lm_head", head, 3 * head, 0, value),
        streams=(StreamCost("main", 0, 2 * LAYERS, value),),
    )


def stage_starts(costs: ModelCosts, stages: int) -> tuple[int, ...]:
    """As many stages in every block, each block cut where its slowest stage is fastest, the later cuts the later."""
    flops = [s.forward_flops for s in costs.sublayers]
    flops[-1] += costs.after.forward_flops
    edges = [*range(0, len(flops), BLOCK), len(flops)]
    in_block = stages // (len(edges) - 1)
    starts: list[int] = []
    for first, stop in pairwise(edges):
        starts.append(first)
        starts += min(
            combinations(range(first + 1, stop), in_block - 1),
            key=lambda cuts, first=first, stop=stop: sorted(  # type: ignore[misc]
                (sum(flops[a:b]) for a, b in zip((first, *cuts), (*cuts, stop), strict=True)), reverse=True
            ),
        )
    return tuple(starts)


def schedules_of(variant: str, starts: Sequence[int]) -> dict[str, DepthSchedule] | None:
    configs = {
        "block": AttnResConfig(variant="block", block_size=BLOCK),
        "full": AttnResConfig(variant="full"),
        "local": AttnResConfig(variant="local", block_size=BLOCK),
        "local, aligned": AttnResConfig(variant="local", boundaries=starts[1:]),
    }
    return {"main": plan_schedule(2 * LAYERS, configs[variant])} if variant in configs else None


def report(traffic: Traffic, costs: ModelCosts, starts: Sequence[int], variant: str, **how: Any) -> dict[str, Any]:
    loads = stage_loads(costs, starts, schedules_of(variant, starts), num_stages=traffic.num_stages)
    timeline = simulate(loads, num_stages=traffic.num_stages, virtual_stages=traffic.virtual_stages, **how)
    return {
        "num_stages": traffic.num_stages,
        "virtual_stages": traffic.virtual_stages,
        **how,
        "variant": variant,
        "naive_bytes": traffic.naive.total,
        "cached_bytes": traffic.cached.total,
        "exact_bytes": traffic.exact.total,
        "naive_peak_hop_bytes": traffic.naive.peak,
        "exact_peak_hop_bytes": traffic.exact.peak,
        "cache_bytes": max(traffic.cache_bytes),
        "peak_cache_bytes": max(timeline.peak_cache_bytes),
        "receive_buffer_bytes": max(traffic.receive_buffer_bytes(how["num_microbatches"])),
        "peak_activation_bytes": max(timeline.peak_activation_bytes),
        "step_seconds": timeline.step_seconds,
        "bubble": timeline.bubble,
    }


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 9.95e9 else f"{count / 1e9:.2f}"


def place(row: Mapping[str, Any]) -> str:
    return f"P={row['num_stages']}, V={row['virtual_stages']}"


def traffic_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Gigabytes of 10^9 bytes a microbatch: of all hops both ways, of the fullest hop one way, of the fullest rank."""
    columns = {
        "naive_bytes": "naive",
        "cached_bytes": "paper's cache",
        "exact_bytes": "exact",
        "naive_peak_hop_bytes": "fullest hop, naive",
        "exact_peak_hop_bytes": "fullest hop, exact",
        "cache_bytes": "kept on a rank",
    }
    # Schedules send the same.
    lines = [
        [place(r), r["variant"], *(gigabytes(r[c]) for c in columns)] for r in rows if r["schedule"] == SCHEDULES[0]
    ]
    return tabulate(lines, headers=["plan", "variant", *columns.values()], tablefmt="github", disable_numparse=True)


def time_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Steps, and gigabytes of the fullest rank at the worst time."""
    plain = {(place(r), r["schedule"]): r["step_seconds"] for r in rows if r["variant"] == "plain"}
    lines = [
        [
            place(r),
            r["schedule"],
            r["variant"],
            f"{r['step_seconds']:.1f}",
            f"{r['step_seconds'] / plain[place(r), r['schedule']]:.3f}",
            f"{r['bubble']:.1%}",
            gigabytes(r["peak_cache_bytes"]),
            gigabytes(r["peak_activation_bytes"]),
            gigabytes(r["receive_buffer_bytes"]),
        ]
        for r in rows
    ]
    headers = ["plan", "schedule", "variant", "step s", "of plain", "bubble", "kept", "activations", "receive buffers"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens a microbatch")
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS / "pipeline_timeline.json")
    options = parser.parse_args(arguments)
    costs = model_costs(options.tokens)
    rows = []
    starts: tuple[int, ...] = ()
    for num_stages, virtual_stages in PLANS:
        starts = stage_starts(costs, num_stages * virtual_stages)
        for schedule in SCHEDULES:
            for variant in VARIANTS:
                values = stage_values(costs.streams, schedules_of(variant, starts), starts)
                traffic = count_traffic(values, num_stages=num_stages, virtual_stages=virtual_stages)
                rows.append(
                    report(traffic, costs, starts, variant, schedule=schedule, num_microbatches=options.microbatches)
                )
    print(f"{options.tokens} tokens a microbatch, {options.microbatches} microbatches a step, {DeviceSpeed()}")
    print(f"first sublayer of each virtual stage: {starts}\n")
    print(f"{traffic_table(rows)}\n\n{time_table(rows)}")
    write_json(
        options.output,
        {
            "benchmark": "pipeline_timeline",
            **environment(torch.device("cpu")),
            "tokens": options.tokens,
            "device_speed": asdict(DeviceSpeed()),
            "starts": starts,
            "plans": rows,
        },
    )
    return options.output


if __name__ == "__main__":
    main()
