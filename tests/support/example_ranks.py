"""Ranks of a distributed example as torchrun starts them, forked of one process that has imported torch once."""

import multiprocessing
import os
import runpy
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining

import attnres_fx.partition.runtime  # noqa: F401
from tests.support.paths import ROOT


@dataclass(frozen=True)
class Rank:
    process: multiprocessing.Process
    out: Path
    errors: Path

    def finish(self, timeout: float) -> int | None:
        """Its exit code."""
        self.process.join(timeout)
        return self.process.exitcode


def start(script: str, arguments: list[str], ranks: int, folder: Path) -> list[Rank]:
    """Run a script in that many processes; what each writes is in files of the folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(ranks):
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "RANK": str(rank)}
        out, errors = folder / f"{rank}.out", folder / f"{rank}.err"
        given = (script, arguments, {**world, "LOCAL_RANK": str(rank)}, out, errors)
        started.append(Rank(context.Process(target=_run, args=given), out, errors))
        started[-1].process.start()
    return started


def _run(script: str, arguments: list[str], world: dict[str, str], out: Path, errors: Path) -> None:
    for path, stream in ((out, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(world)
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")
