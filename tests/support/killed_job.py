"""A pipeline job that is killed at random moments and started again, against the same job left alone.

python -m tests.support.killed_job FOLDER --kills 50

Two ranks train with dropout, AdamW and a scheduler, and save after every step, every other time in the background. A
killed rank takes the other one with it. Printed at the end: kills, restarts, and the steps whose losses differ.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import attnres_fx as ax
from attnres_fx.partition.runtime import build_pipeline

RANKS, ROWS = 2, 4


class Net(nn.Module):
    def __init__(self, width=16, layers=4):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))
        self.mixes = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2)) for _ in range(layers))

    def forward(self, ids):
        x = self.embed(ids)
        for norm, mix in zip(self.norms, self.mixes, strict=False):
            x = x + mix(norm(x))
        return self.norms[-1](x)


def loss_of(output, target):
    return (output.sum(-1) - target).square().mean()


def batch_of(step):
    draw = torch.Generator().manual_seed(step)
    return torch.randint(0, 20, (ROWS, 6), generator=draw), torch.randn(ROWS, 6, generator=draw)


def run(rank, port, stages, plan, folder, steps):
    """One rank, from the checkpoint in the folder to the end; rank 0 writes losses, a line a step."""
    torch.manual_seed(100 + rank)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=20))
    pipeline = build_pipeline(stages, plan, loss_fn=loss_of, compile=False)
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps + 1)
    others, first = {"scheduler": scheduler}, 0
    if (folder / "checkpoint" / ".metadata").exists():
        first = pipeline.load(folder / "checkpoint", optimizer, others=others, random=True).step
    for step in range(first, steps):
        ids, target = batch_of(step)
        loss = pipeline.step(ids, target=target)
        optimizer.step()
        scheduler.step()
        pipeline.zero_grad()
        if rank == 0:
            with (folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps([step, loss.item()]) + "\n")
        save = pipeline.async_save if step % 2 else pipeline.save
        save(folder / "checkpoint", optimizer, step=step + 1, others=others)
    pipeline.save(folder / "checkpoint", optimizer, step=steps, others=others)
    (folder / f"done.{rank}").touch()


def start(stages, plan, folder, steps):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            out = os.open(folder / f"output.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            try:
                run(rank, port, stages, plan, folder, steps)
            finally:
                os._exit(0)
        children.append(child)
    return children


def job(folder, steps, kills, seed):
    """The losses by step, how often it was killed, and how many steps were computed."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    plan = ax.plan(
        Net(), (batch_of(0)[0],), num_stages=RANKS, num_microbatches=2, config=ax.AttnResConfig(block_size=2)
    )
    stages, draw, done = ax.build_stages(Net(), plan), random.Random(seed), 0
    while not all((folder / f"done.{rank}").exists() for rank in range(RANKS)):
        children = start(stages, plan, folder, steps)
        if done < kills:
            before = _lines(folder)
            while _lines(folder) == before:  # at least one step is computed, whatever the machine
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.4))
            os.kill(children[draw.randrange(RANKS)], signal.SIGKILL)
            done += 1
            time.sleep(draw.uniform(0, 0.2))
            for child in children:
                os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
    losses = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return dict(map(tuple, losses)), done, len(losses)


def _lines(folder):
    file = folder / "losses.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def compared(folder, kills, steps, seed=0):
    """What a killed job and one left alone found, and where they differ."""
    alone, _, _ = job(folder / "alone", steps, 0, seed)
    killed, done, computed = job(folder / "killed", steps, kills, seed)
    differ = [step for step in range(steps) if alone.get(step) != killed.get(step)]
    return {"kills": done, "steps": steps, "computed": computed, "differ": differ}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    found = compared(options.folder, options.kills, options.steps or 12 * options.kills)
    print(json.dumps(found))
    return bool(found["differ"])


if __name__ == "__main__":
    sys.exit(main())
