"""Families the library does not know by name: every read found, and the function kept."""

import pytest
import torch
from torch.utils import _pytree as pytree

import attnres_fx as ax
from attnres_fx.capture.restore import A_CHECKPOINT, what_backward_holds
from tests.support.cutting import assert_same, cut, evenly, spread
from tests.support.families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow_after(1)
def test_a_family_converts_with_all_its_reads_and_computes_the_same_whole_and_in_stages(name):
    model, kwargs, reads = FAMILIES[name]()
    converted = ax.convert(model, kwargs=kwargs)
    assert len(converted.attnres.reads) == reads
    with torch.no_grad():
        expected = model(**{**converted.signature.bound_values, **kwargs})
        found = converted(**kwargs)
    assert type(found) is type(expected)
    for x, y in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            assert (x - y).abs().max() <= 1e-5 * x.abs().max()
    names = set(converted.state_dict())
    assert set(model.state_dict()) <= names
    assert all(n.startswith("attnres.") for n in names - set(model.state_dict()))
    held = {w for mode in converted.every_program() for w in what_backward_holds(converted.graph_module(mode))}
    if held - {A_CHECKPOINT}:  # a backward of its own, which stages would lose
        with pytest.raises(ax.AttnResError, match=r"custom autograd\.Function.*stages would lose its gradients"):
            cut(spread(converted).eval(), evenly(converted, 3))
        return
    spread(converted).eval()
    stages = cut(converted, evenly(converted, 3)).eval()
    assert_same(converted, stages, kwargs)
    held = set().union(*(dict(s.named_parameters()) for s in stages))
    assert held <= set(dict(converted.named_parameters(remove_duplicate=False)))


@pytest.mark.parametrize("variant", ["full", "local"])
@pytest.mark.parametrize("name", ["opt", "mamba", "bert", "swin", "carry", "in place"])
@pytest.mark.slow_after(1)
def test_other_variants_keep_the_function_too(name, variant):
    model, kwargs, reads = FAMILIES[name]()
    converted = ax.convert(model, kwargs=kwargs, config=ax.AttnResConfig(variant=variant))
    assert len(converted.attnres.reads) == reads
    assert ax.verify(model, converted, kwargs=kwargs).passed
