"""Converted models cut into stages, and compared with themselves whole."""

from weakref import WeakKeyDictionary

import torch
from torch.utils import _pytree as pytree

from attnres_fx.partition.split.chained_model import chains_of, stages_of


def spread(converted):
    """Queries away from zero, so that a source in the wrong place shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for read in converted.attnres.reads:
            read.query.normal_(std=0.5, generator=generator)
            if read.gate is not None:
                read.gate.fill_(0.7)
    return converted


def evenly(converted, count):
    total = sum(s.stream.num_sublayers for s in converted.report.streams if s.stream.is_main)
    count = min(count, total)
    return tuple(total * c // count for c in range(count))


_chains = WeakKeyDictionary()


def chained(converted, modes):
    """`chains_of` a model, once for all the ways it is cut."""
    kept = _chains.setdefault(converted, {})
    if modes not in kept:
        kept[modes] = chains_of(converted, modes)
    return kept[modes]


def cut(converted, starts, ranks=None, modes=None, **options):
    """Stages in these modes, by default in the one the model is in."""
    ranks = ranks or len(starts)
    chains = chained(converted, modes or ("train" if converted.training else "eval",))
    options = {"cache": True, "lowering": None, "chains": chains, **options}
    return stages_of(converted, starts, num_stages=ranks, virtual_stages=len(starts) // ranks, **options)


def tensors(output):
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def assert_same(model, stages, kwargs, tolerance=1e-5):
    """Outputs, and the gradient of every parameter that is in some stage."""
    for each in (model, stages):
        results = tensors(each(**kwargs) if each is model else each.run(**kwargs))
        model.zero_grad()
        weights = [torch.randn(r.shape, generator=torch.Generator().manual_seed(1)) for r in results]
        sum((r * w).sum() for r, w in zip(results, weights, strict=True)).backward()
        found = [r.detach() for r in results] + [
            p.grad.clone() if p.grad is not None else torch.zeros(1) for p in model.parameters()
        ]
        if each is model:
            expected = found
    for x, y in zip(expected, found, strict=True):
        assert (x - y).abs().max() <= tolerance * max(float(x.abs().max()), 1e-3)
