"""Saves that are killed, or run out of room, at a hundred moments: the old file or the new one loads, always."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SAVES = """
import os, pathlib, random, resource, signal, sys, time, torch
import attnres_fx as ax
from tests.conversion.test_adapter import Tower, converted

way, kind, folder = sys.argv[1:]
place = pathlib.Path(folder) / kind
model, found = (converted(Tower(layers=1).eval(), ax.AttnResConfig()) for _ in range(2))
draw = random.Random(8)

def save(value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    ax.save_adapter(model, place) if kind == "adapter" else model.save(place)

def loaded():
    held = b"".join(p.read_bytes() for p in sorted(place.iterdir())) if place.is_dir() else place.read_bytes()
    if held not in seen:  # bytes that loaded once load again
        seen[held] = values_of()
    return set(seen[held])

def values_of():
    if kind == "adapter":
        return {float(v) for p in ax.load_adapter(found, place).parameters() for v in p.detach().unique()}
    return {float(v) for p in ax.load(place).parameters() for v in p.detach().unique()}

def killed(value, most, how=signal.SIGKILL):
    child = os.fork()
    if not child:
        save(value)
        os._exit(0)
    time.sleep(draw.uniform(0, most))
    os.kill(child, how)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def without_room(value, size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randrange(size), limits[1]))
    try:
        save(value)
    except ax.errors.SaveError:
        return 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return 0

seen = {}
save(0)
start = time.perf_counter()
killed(0, 0, signal.SIGCONT)
most = (time.perf_counter() - start) * 1.2
size = int(max(p.stat().st_size for p in (place.iterdir() if place.is_dir() else [place])) * 1.1)
old, codes, news = 0.0, set(), 0
for i in range(1, 101):
    codes.add(killed(i, most) if way == "killed" else without_room(i, size))
    values = loaded()
    assert values in ({old}, {float(i)}), (i, old, values)
    news += values == {float(i)}
    old = values.pop()
save(1000)
assert loaded() == {1000.0}
print(sorted(codes), news)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("way", ["killed", "without room"])
def test_a_hundred_saves_that_are_cut_short(way, kind, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SAVES, way, kind, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    codes, _, news = done.stdout.rpartition(" ")
    assert codes == ("[-9, 0]" if way == "killed" else "[0, 1]")
    assert 0 < int(news) < 100
