"""Train a converted GPT over a pipeline, on the sources of Python's standard library.

    attnres-fx plan examples.pipeline_train:model --stages 2 --microbatches 4 --save plan.json \
        --flops 50e9 --memory-bandwidth 10GB --link-bandwidth 1GB
    torchrun --nproc_per_node=2 examples/pipeline_train.py --plan plan.json

The speeds are those of a laptop, whose processes are the ranks. A checkpoint can be read again by any number of stages:
plan for another number and give `--resume`.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import attnres_fx as ax
from attnres_fx.partition.runtime import build_pipeline

try:
    from examples.small_gpt import GPTConfig, SmallGPT, next_byte_loss
    from examples.stdlib_text import stdlib_rows
except ImportError:  # as torchrun starts it, with this folder as the path
    from small_gpt import GPTConfig, SmallGPT, next_byte_loss
    from stdlib_text import stdlib_rows

ROWS, LENGTH = 2, 64  # of one microbatch


def model() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and an example of one microbatch, as `attnres-fx plan` takes them."""
    torch.manual_seed(0)
    return SmallGPT(GPTConfig(layers=4, width=64, heads=4)), {"ids": torch.randint(0, 256, (ROWS, LENGTH))}


def batches(rows: int) -> Tensor:
    """Real text in order, [step, rows, LENGTH + 1]."""
    text = stdlib_rows(LENGTH + 1)
    count = len(text) // rows
    return text[: count * rows].view(count, rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data-parallel", choices=("fsdp2", "ddp"))
    parser.add_argument("--no-compile", action="store_true", help="run stages as they are")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="written after every --every steps")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds until a lost process is noticed")
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=options.timeout))
    try:
        train(options, "cuda" if gpu else "cpu")
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def train(options: argparse.Namespace, device: str) -> None:
    plan = ax.load_plan(options.plan)
    original, _ = model()
    replicas = dist.get_world_size() // plan.num_stages
    shape = {"mesh_dim_names": ("dp", "pp")}
    mesh = init_device_mesh(device, (replicas, plan.num_stages), **shape) if options.data_parallel else None
    pipeline = build_pipeline(
        ax.build_stages(original, plan),
        plan,
        loss_fn=next_byte_loss,
        mesh=mesh,
        data_parallel=options.data_parallel,
        compile=False if options.no_compile else None,
    )
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=1e-3)
    first = 0
    saved = sorted(options.checkpoint.glob("step-*")) if options.checkpoint and options.resume else []
    complete = [folder for folder in saved if (folder / ".metadata").exists()]
    if complete:
        first = pipeline.load(complete[-1], optimizer, random=True).step or 0
    data = batches(ROWS * plan.num_microbatches * replicas)
    mine = dist.get_rank() // plan.num_stages if mesh is not None else 0
    for step in range(first, options.steps):
        rows = data[step % len(data)].chunk(replicas)[mine].long().to(device)
        loss = pipeline.step(ids=rows[:, :-1], target=rows[:, 1:])
        pipeline.clip_grad_norm_(1.0)
        optimizer.step()
        pipeline.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.6f}", flush=True)
        if options.checkpoint and (step + 1) % options.every == 0:
            pipeline.save(options.checkpoint / f"step-{step + 1:06d}", optimizer, step=step + 1)


if __name__ == "__main__":
    main()
