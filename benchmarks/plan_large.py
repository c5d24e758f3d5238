"""Time and memory of planning a model that fits nowhere: `python benchmarks/plan_large.py`.

A DeepSeek-V3-like mixture of experts, 93 layers of width 7168 with 896 experts by default, built on `meta`: no weights.
"""

import argparse
import resource
import time

import torch
from _measure import RESULTS, environment, write_json
from tabulate import tabulate

import attnres_fx as ax


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=93)
    parser.add_argument("--experts", type=int, default=896)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--virtual-stages", type=int, default=4)
    options = parser.parse_args()
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.set_num_threads(1)
    before = peak_gigabytes()
    start = time.perf_counter()
    sizes = {"hidden_size": 7168, "n_routed_experts": options.experts, "vocab_size": 160_000}
    with torch.device("meta"):
        config = DeepseekV3Config(num_hidden_layers=options.layers, first_k_dense_replace=1, **sizes)
        model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
        ids = torch.zeros(1, options.tokens, dtype=torch.long)
    plan = ax.plan(
        model,
        kwargs={"input_ids": ids},
        num_stages=options.stages,
        virtual_stages=options.virtual_stages,
        num_microbatches=8 * options.stages,
    )
    seconds = time.perf_counter() - start
    found = {
        "sublayers": len(plan.costs.sublayers),
        "parameters": sum(p.numel() for p in model.parameters()),
        "virtual_stages": len(plan.starts),
        "seconds": round(seconds, 1),
        "peak_gigabytes": round(peak_gigabytes(), 2),
        "gigabytes_of_imports": round(before, 2),
    }
    print(plan)
    print()
    print(tabulate([found], headers="keys"))
    write_json(RESULTS / "plan_large.json", {**environment(torch.device("cpu")), "result": found})


if __name__ == "__main__":
    main()
