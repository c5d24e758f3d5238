"""Families the library does not know by name: every read found, and the function kept."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

import attnres_fx as ax
from attnres_fx.capture.capture import capture
from attnres_fx.capture.restore import A_CHECKPOINT, what_backward_holds
from attnres_fx.partition.split.chained_model import chains_of
from tests.support.cutting import assert_same, cut, evenly, spread
from tests.support.families import FAMILIES


def of_its_own(converted, mode):
    """What the graph holds of a backward of its own, which stages would lose."""
    return set(what_backward_holds(converted.graph_module(mode))) - {A_CHECKPOINT}


def assert_same_output(found, expected):
    assert type(found) is type(expected)
    for x, y in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            assert (x - y).abs().max() <= 1e-5 * x.abs().max()


def unmoved_reads(converted, kwargs):
    """The reads that the first backward from a fresh conversion moves by no more than rounding, beside the others."""
    leaves = [x for x in pytree.tree_leaves(converted(**kwargs)) if isinstance(x, torch.Tensor) and x.requires_grad]
    sum((x.double() * torch.linspace(0, 1, x.numel()).sin().view_as(x)).sum() for x in leaves).backward()
    moved = {
        r.name: max(float(p.grad.abs().max()) for p in (r.query, r.gate) if p is not None and p.grad is not None)
        for r in converted.attnres.reads
    }
    converted.zero_grad()
    return [name for name, size in moved.items() if size <= 1e-4 * max(moved.values())]


@pytest.fixture
def captured_once(monkeypatch):
    """Lets all conversions of a test but the first begin with copies of what the first has captured."""
    kept = []

    def copied(found):
        root, graphs = copy.deepcopy((found.root, {mode: graph.gm for mode, graph in found.graphs.items()}))
        return replace(found, root=root, graphs={m: replace(g, gm=graphs[m]) for m, g in found.graphs.items()})

    def captured(*args, **options):
        if kept:
            return copied(kept[0])
        found = capture(*args, **options)
        kept.append(copied(found))
        return found

    monkeypatch.setattr("attnres_fx.conversion.convert.capture", captured)


#: Families that are cut into stages too, one a kind: what the chain of units is made from is the same graph.
CUT = ["gpt2", "gpt_neox", "falcon", "granite", "mixtral", "zamba", "bart", "swin", "albert", "encoder, norm last"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow_after(1)
def test_a_family_converts_with_all_its_reads_and_computes_the_same(name, captured_once):
    model, kwargs, reads = FAMILIES[name]()
    converted = ax.convert(model, kwargs=kwargs)
    assert len(converted.attnres.reads) == reads
    with torch.no_grad():
        assert_same_output(converted(**kwargs), model(**{**converted.signature.bound_values, **kwargs}))
    assert unmoved_reads(converted, kwargs) == []
    for variant in ("full", "local"):
        other = ax.convert(model, kwargs=kwargs, config=ax.AttnResConfig(variant=variant), check=False)
        assert (len(other.attnres.reads), unmoved_reads(other, kwargs)) == (reads, []), variant
    names = set(converted.state_dict())
    assert set(model.state_dict()) <= names
    assert all(n.startswith("attnres.") for n in names - set(model.state_dict()))


@pytest.mark.slow
def test_a_family_with_a_backward_of_its_own_is_not_cut():
    model, kwargs, _ = FAMILIES["bloom"]()
    converted = ax.convert(model, kwargs=kwargs, check=False)
    with pytest.raises(ax.AttnResError, match=r"custom autograd\.Function.*stages would lose its gradients"):
        cut(converted, evenly(converted, 3))


@pytest.mark.parametrize("name", CUT)
@pytest.mark.slow
def test_a_family_computes_the_same_in_stages(name):
    model, kwargs, _ = FAMILIES[name]()
    converted = spread(ax.convert(model, kwargs=kwargs, check=False))
    stages = cut(converted, evenly(converted, 3), chains=chains_of(converted, ("eval",))).eval()
    assert_same(converted, stages, kwargs)
    held = set().union(*(dict(s.named_parameters()) for s in stages))
    assert held <= set(dict(converted.named_parameters(remove_duplicate=False)))


#: Families whose graphs differ by mode, one a kind: dropout by module and by function, on attention weights and inside
#: them; a dropped path; a layer that may be dropped; a router with a loss; a backward of its own. The train graphs of
#: the others are their eval graphs, but for the switch of a dropout.
TRAINED = ["encoder, norm first", "gpt2", "bert", "opt", "swin", "whisper", "mixtral", "bloom"]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.slow
def test_a_family_that_is_in_train_mode_drops_what_it_dropped(name):
    model, kwargs, reads = FAMILIES[name]()
    converted = ax.convert(model.train(), kwargs=kwargs)
    assert (converted.training, converted.report.deferred, len(converted.attnres.reads)) == (True, ("eval",), reads)
    torch.manual_seed(2)
    expected = model(**{**converted.signature.bound_values, **kwargs})
    torch.manual_seed(2)
    assert_same_output(converted(**kwargs), expected)
    assert bool(of_its_own(converted, "train")) == (name == "bloom")


@pytest.mark.parametrize("variant", ["full", "local"])
@pytest.mark.parametrize("name", ["opt", "mamba", "bert", "swin", "carry", "in place"])
@pytest.mark.slow
def test_other_variants_keep_the_function_too(name, variant):
    model, kwargs, reads = FAMILIES[name]()
    converted = ax.convert(model, kwargs=kwargs, config=ax.AttnResConfig(variant=variant), check=False)
    assert len(converted.attnres.reads) == reads
    assert ax.verify(model, converted, kwargs=kwargs).passed
