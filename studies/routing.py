"""Where do reads look: by layer, by kind of token, how far back, and how much does it depend on the input?"""

import statistics
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import attnres_fx as ax
from attnres_fx.demo.text import Text
from attnres_fx.shown import table
from studies.core.command import Study, main
from studies.core.drawing import panels
from studies.core.results import Results
from studies.core.runs import Run
from studies.core.sizes import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("full", "block")


def plan(size: Size, results: Results) -> Iterator[Run]:
    """Both methods with each seed, seed by seed, at one learning rate."""
    for seed in size.seeds:
        yield from (Run(method=m, seed=seed, lr=size.rate, steps=size.steps) for m in METHODS)


def kinds(ids: Tensor) -> dict[str, Tensor]:
    """Which tokens are of which kind.

    Args:
        ids: Bytes, [batch, length].

    Returns:
        Masks of names (letters and underscores), digits, whitespace and the rest.
    """
    text = ids.flatten().tolist()
    tests = {
        "names": lambda c: c.isalpha() or c == "_",
        "digits": str.isdigit,
        "whitespace": str.isspace,
    }
    masks = {name: torch.tensor([test(chr(b)) for b in text]).view(ids.shape) for name, test in tests.items()}
    return masks | {"other": ~torch.stack(list(masks.values())).any(0)}


def routes(model: nn.Module, text: Text) -> list[dict[str, Any]]:
    """The weights of every read on one validation batch.

    Args:
        model: A trained model.
        text: Whose first validation batch is looked at.

    Returns:
        For each read its name, `sources`, `back` (sublayers), `mean` [S], `deviation` over tokens [S], and `kinds`: the
        mean for each kind of token that is there.
    """
    ids = text.validation[0][0]
    masks = kinds(ids)
    weights = ax.depth_weights(model, (ids.to(next(model.parameters()).device),), per_token=True)
    found = []
    for read in weights:
        of_tokens = read.weights.cpu()
        by_kind = {name: of_tokens[:, mask].mean(1) for name, mask in masks.items() if mask.any()}
        found.append(
            {
                "read": read.name,
                "sources": list(read.sources),
                "back": list(read.back),
                "mean": rounded(of_tokens.flatten(1).mean(1)),
                "deviation": rounded(of_tokens.flatten(1).std(1)),
                "kinds": {name: rounded(values) for name, values in by_kind.items()},
            }
        )
    return found


def rounded(values: Tensor) -> list[float]:
    """Four digits are enough, and keep the file small."""
    return [round(v, 4) for v in values.tolist()]


def reach(read: dict[str, Any], weights: list[float]) -> float:
    """How many sublayers back a read looks with these weights."""
    return sum(w * b for w, b in zip(weights, read["back"], strict=True))


def jumps(read: dict[str, Any]) -> bool:
    """Whether a read weighs most what is further back than it would look with all weights alike."""
    most = max(range(len(read["mean"])), key=read["mean"].__getitem__)
    return read["back"][most] > statistics.fmean(read["back"])


def layer_kind(read: str) -> str:
    """What a read feeds: attention, an MLP, or the output."""
    return next((kind for kind in ("attention", "mlp") if f"{kind}_norm" in read), "output")


def summary(reads: list[dict[str, Any]]) -> dict[str, str]:
    """Numbers of some reads, averaged: those of three sources or more, where there is something to choose."""
    chosen = [r for r in reads if len(r["sources"]) > 2]
    if not chosen:
        return {}
    mean = statistics.fmean
    newest = [r["mean"][min(range(len(r["back"])), key=r["back"].__getitem__)] for r in chosen]
    return {
        "reads": str(len(chosen)),
        "even weight": f"{mean(1 / len(r['sources']) for r in chosen):.3f}",
        "on newest": f"{mean(newest):.3f}",
        "on embedding": f"{mean(r['mean'][0] for r in chosen):.3f}",
        "reach over even": f"{mean(reach(r, r['mean']) / mean(r['back']) for r in chosen):.2f}",
        "long jumps": str(sum(map(jumps, chosen))),
        "largest / smallest": f"{max(max(r['mean']) / max(min(r['mean']), 1e-4) for r in chosen):.1f}",
        "deviation over tokens": f"{mean(mean(r['deviation']) for r in chosen):.3f}",
    }


def tables(results: Results) -> str:
    """Locality, embedding, jumps and dependence on the input, by layer kind; reach by kind of token."""
    rows, tokens = [], []
    for record in results.runs.values():
        run, reads = record["run"], record["end"]
        head = {"method": run["method"], "seed": run["seed"]}
        for kind in ("attention", "mlp", "output"):
            numbers = summary([r for r in reads if layer_kind(r["read"]) == kind])
            if numbers:
                rows.append(head | {"before": kind} | numbers)
        names = dict.fromkeys(name for r in reads for name in r["kinds"])
        tokens.append(head | {n: _reach_of_kind(reads, n) for n in names})
    return f"{table(rows)}\n\nReach in sublayers, by kind of token:\n\n{table(tokens)}"


def _reach_of_kind(reads: list[dict[str, Any]], kind: str) -> str:
    return f"{statistics.fmean(reach(r, r['kinds'][kind]) for r in reads if kind in r['kinds']):.2f}"


def draw(results: Results) -> "Figure":
    """A map a run: a row a read, a colour the weight over the largest of the read."""
    figure, axes = panels([f"{r['run']['method']}, seed {r['run']['seed']}" for r in results.runs.values()])
    for each, record in zip(axes, results.runs.values(), strict=True):
        names = list(dict.fromkeys(s.split("[")[0] for r in record["end"] for s in r["sources"]))
        grid = []
        for read in record["end"]:
            weights = {s.split("[")[0]: w for s, w in zip(read["sources"], read["mean"], strict=True)}
            grid.append([weights.get(n, float("nan")) / max(read["mean"]) for n in names])
        each.imshow(grid, cmap="magma", aspect="auto", interpolation="nearest", vmin=0, vmax=1)
        each.set_xlabel("source", fontsize=8)
        each.set_ylabel("read", fontsize=8)
    return figure


STUDY = Study(name="routing", question=__doc__, plan=plan, tables=tables, draw=draw, at_end=routes)

if __name__ == "__main__":
    sys.exit(main(STUDY))
