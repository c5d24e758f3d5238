"""A script of `tests.support` as a group of processes: what rank 0 printed last."""

import json
import os
import subprocess
import sys

from tests.support.paths import ROOT


def found_by_processes(script, folder, count=2, *, seconds=400):
    """Run `python -m tests.support.SCRIPT rank count file` for every rank; rank 0's last line, as JSON."""
    command = [sys.executable, "-m", f"tests.support.{script}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen([*command, str(rank), str(count), str(folder / "group")], cwd=ROOT, env=environment, **pipes)
        for rank in range(count)
    ]
    try:
        results = [worker.communicate(timeout=seconds) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(w.returncode == 0 for w in workers), "".join(errors[-2000:] for _, errors in results)
    return json.loads(results[0][0].splitlines()[-1])
