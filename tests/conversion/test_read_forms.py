"""Reads in the forms that the paper tried and production uses, on a converted model, against float64 by hand."""

import copy
import functools

import pytest
import torch
from torch.func import functional_call, grad, vmap

import attnres_fx as ax
from attnres_fx.conversion.adapter import adapter_config
from attnres_fx.errors import ConfigError
from attnres_fx.passes import Lowering, lower_
from tests.support.read_forms import FORMS, IDS, by_hand, decoder, form, randomized

every_form = pytest.mark.parametrize("name", FORMS)
EXACT = 1e-11
#: What the kernels and the lowering passes take; the rest is its definition.
HAVE_KERNELS = ("source bias", "value norm", "scale", "window", "window without the root")


@functools.cache
def fresh(name):
    original = decoder()
    return original, ax.convert(original, (IDS,), config=form(name))


@functools.cache
def converted(name):
    original, model = fresh(name)
    original = copy.deepcopy(original)
    return original, randomized(copy.deepcopy(model))


def close(found, expected, tolerance=EXACT):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@every_form
def test_it_equals_the_paper_s_forward_by_hand_and_so_do_its_gradients(name):
    original, model = converted(name)
    reads = copy.deepcopy(model.attnres.reads)
    found, expected = model(IDS), by_hand(original, reads, form(name))
    close(found, expected)
    seed = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    wanted = dict(original.named_parameters()) | {f"attnres.reads.{n}": p for n, p in reads.named_parameters()}
    own = dict(model.named_parameters())
    assert own.keys() == wanted.keys()
    gradients = torch.autograd.grad(found, [own[n] for n in wanted], seed)
    for n, one, other in zip(
        wanted, gradients, torch.autograd.grad(expected, list(wanted.values()), seed), strict=True
    ):
        assert other.abs().max() > 0, n
        close(one, other, 1e-9)


@every_form
def test_a_fresh_conversion_in_mode_sum_is_the_original(name):
    original, model = fresh(name)
    if form(name).output == "sum":
        close(model(IDS), original(IDS), 1e-13)
        assert model.report.difference <= 1e-13
    else:
        assert (model(IDS) - original(IDS)).abs().max() > 1e-3
    assert model.report.num_parameters == sum(p.numel() for p in model.attnres.parameters())


@every_form
def test_a_fresh_conversion_can_be_trained(name):
    model = fresh(name)[1]
    model = copy.deepcopy(model)
    loss = torch.nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
    loss.backward()
    first = {n: p.grad for n, p in model.attnres.named_parameters() if not n.endswith("key_weight")}
    assert all(g is not None and g.abs().max() > 0 for g in first.values())


@every_form
def test_a_file_an_export_and_an_adapter_compute_the_same(name, tmp_path):
    _, model = converted(name)
    expected = model(IDS)
    model.save(tmp_path / "model.ax")
    loaded = ax.load(tmp_path / "model.ax")
    assert loaded.attnres.config == form(name)
    assert all(n in str(loaded.report) for n in FORMS[name])
    assert torch.equal(loaded(IDS), expected)
    exported = torch.export.export(model, (IDS,), strict=False)
    assert torch.equal(exported.module()(IDS), expected)
    ax.save_adapter(model, tmp_path / "adapter")
    assert adapter_config(tmp_path / "adapter") == form(name)
    other = copy.deepcopy(fresh(name)[1])
    ax.load_adapter(other, tmp_path / "adapter")
    close(other(IDS), expected, 1e-14)


@every_form
def test_a_state_of_another_form_is_refused_by_name(name):
    _, model = converted(name)
    other = copy.deepcopy(fresh("scale" if name != "scale" else "heads")[1])
    with pytest.raises(ConfigError, match=next(n for n in FORMS[name] if n != "output")):
        other.load_state_dict(model.state_dict(), strict=False)


@every_form
def test_stages_of_a_plan_compute_the_same_and_hand_on_what_the_schedule_says(name):
    _, model = converted(name)
    plan = ax.plan(model, (IDS,), num_stages=2)
    stages = ax.build_stages(model, plan)
    found, expected = stages.run(IDS), model(IDS)
    close(found, expected)
    gradients, wanted = (torch.autograd.grad(o.sin().sum(), list(model.parameters())) for o in (found, expected))
    for one, other in zip(gradients, wanted, strict=True):
        close(one, other, 1e-9)
    (layout,) = plan.block_layouts.values()
    (cut,) = plan.partition.starts[1:]
    assert {v.label for v in plan.values} >= {str(s) for s in layout.carried(cut)}
    assert len(plan.values) == len(layout.carried(cut))
    assert sum(s.parameter_bytes for s in (*plan.costs.sublayers, plan.costs.before, plan.costs.after)) == 8 * sum(
        p.numel() for p in model.parameters()
    )


@every_form
def test_the_backend_computes_the_same(name):
    original, model = converted(name)
    attached = copy.deepcopy(original)
    ax.compile(attached, (IDS,), config=form(name), inner="eager")
    attached.attnres.load_state_dict(model.attnres.state_dict())
    seed = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = attached(IDS), model(IDS)
    close(found, expected)
    names = dict(attached.named_parameters())
    gradients = torch.autograd.grad(found, list(names.values()), seed)
    wanted = torch.autograd.grad(expected, [dict(model.named_parameters())[n] for n in names], seed)
    for one, other in zip(gradients, wanted, strict=True):
        close(one, other, 1e-9)
    kernels = "no kernel has this form" in ax.explain(attached).graphs[0].kernels
    assert kernels == (name not in HAVE_KERNELS)


@every_form
def test_lowering_passes_take_a_form_or_leave_it(name):
    _, model = converted(name)
    leaves = model.flatten_arguments(IDS)
    for two_phase in (False, True):
        gm = copy.deepcopy(model.graph_module(lowered=False))
        results = lower_(gm, Lowering(two_phase=two_phase, thread_gradients=True))
        found, expected = gm(*leaves)[0], model.graph_module(lowered=False)(*leaves)[0]
        close(found, expected, 1e-12)
        own = [gm.get_parameter(n) for n, _ in gm.named_parameters()]
        right = [model.get_parameter(n) for n, _ in gm.named_parameters()]
        pairs = zip(
            *(torch.autograd.grad(o.sin().sum(), p) for o, p in ((found, own), (model(IDS), right))), strict=True
        )
        for one, other in pairs:
            close(one, other, 1e-9)
        assert any(r.modified for r in results) == (name in HAVE_KERNELS)


@every_form
def test_gradients_of_every_sample_come_from_torch_func(name):
    _, model = converted(name)
    parameters = {n: p.detach() for n, p in model.named_parameters() if "attnres" in n}

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, IDS)
    named = dict(model.named_parameters())
    for row in range(len(IDS)):
        expected = torch.autograd.grad(loss(named, IDS[row]), [named[n] for n in parameters])
        for n, gradient in zip(parameters, expected, strict=True):
            close(found[n][row], gradient, 1e-9)


@every_form
def test_depth_weights_are_those_that_it_mixes_with(name):
    original, model = converted(name)
    expected = []
    by_hand(original, model.attnres.reads, form(name), looked_at=expected)
    weights = ax.depth_weights(model, (IDS,))
    assert len(weights) == len(expected)
    for found, right in zip(weights, expected, strict=True):
        right = (right / right.sum(0)).flatten(1).mean(1)
        close(found.weights, right)
    (stream,) = ax.profile_depth(model, (IDS,)).streams
    # What the sources bring to the last state adds up to it, if they are weighed as the read weighs them.
    assert abs(sum(share for _, share in stream.source_shares) - 1) <= 1e-6
