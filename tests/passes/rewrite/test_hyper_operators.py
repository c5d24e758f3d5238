"""The operators of hyper-connections against their definition, and the options of their config."""

import pytest
import torch

import attnres_fx as ax
from attnres_fx.errors import ConfigError, OperatorError
from attnres_fx.passes import analyze_, topology_of
from tests.support.hyper_forward import hyper, weights_of, written
from tests.support.stream_text import captured, rows, toy

KINDS = [
    {"constrained": True, "dynamic": True},
    {"constrained": True, "dynamic": False},
    {"constrained": False, "dynamic": True},
    {"constrained": False, "dynamic": False},
]


def two_layers(m, x):
    h = x + m.attn_1(m.norm_1(x))
    h = h + m.mlp_1(m.norm_2(h))
    return m.norm_f(h)


def connection(config):
    """The second connection of a stream of two sublayers, which writes and reads, in float64."""
    found = analyze_(captured(toy(two_layers), (rows(),), "symbolic"))
    (read,) = [r for r in topology_of(config).plan(found, found.streams, config).reads if r.position == 2]
    return topology_of(config).make_read(read, config, dtype=torch.float64)


@pytest.mark.parametrize("options", KINDS, ids=lambda o: " ".join(n for n, on in o.items() if on) or "plain")
def test_the_operators_equal_the_definition_on_stacked_copies(options):
    config = hyper(**options)
    module = connection(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    copies = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    branch = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    held = module.tensors()

    def run(copies, branch):
        each = [c.contiguous() for c in copies.unbind(-2)]
        kinds = {k: [held.get(f"{k}{part}") for part in ("", "_weight", "_scale")] for k in ("pre", "post", "carry")}
        options = (config.constrained, config.sinkhorn_steps, config.eps)
        after = torch.ops.attnres_fx.hyper_write(each, branch, *kinds["post"], *kinds["carry"], *options)
        return torch.ops.attnres_fx.hyper_read(after, *kinds["pre"], config.constrained, config.eps)

    def expected(copies, branch):
        after = written(module, copies, branch, config)
        return torch.einsum("...j,...jd->...d", weights_of(module, "pre", after, config), after)

    tensors = [copies, branch, *held.values()]
    found, wanted = run(copies, branch), expected(copies, branch)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(wanted)
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((wanted * weights).sum(), tensors),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    mapped = torch.vmap(run)(copies, branch)
    torch.testing.assert_close(mapped, wanted, rtol=1e-12, atol=1e-12)


def test_the_operators_compute_in_float32_under_autocast():
    module = connection(hyper()).float()
    copies = [torch.randn(2, 5, 8).bfloat16() for _ in range(3)]
    plain = torch.ops.attnres_fx.hyper_read(copies, module.pre, module.pre_weight, module.pre_scale, True, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.ops.attnres_fx.hyper_read(copies, module.pre, module.pre_weight, module.pre_scale, True, 1e-6)
    assert plain.dtype == torch.bfloat16 and torch.equal(plain, cast)


def test_copies_without_data_have_a_shape():
    module = connection(hyper()).to("meta")
    copies = [torch.empty(2, 5, 8, device="meta", dtype=torch.float64) for _ in range(3)]
    read = torch.ops.attnres_fx.hyper_read(copies, module.pre, module.pre_weight, module.pre_scale, True, 1e-6)
    assert read.is_meta and read.shape == (2, 5, 8)


def test_shapes_that_do_not_fit_are_named():
    copies = [torch.randn(2, 8)] * 3
    with pytest.raises(OperatorError, match=r"pre is \(2,\); for these copies it is \(3,\)"):
        torch.ops.attnres_fx.hyper_read(copies, torch.ones(2), None, None, True, 1e-6)
    with pytest.raises(OperatorError, match="copy 1"):
        torch.ops.attnres_fx.hyper_read([torch.randn(2, 8), torch.randn(2, 4)], torch.ones(2), None, None, True, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": 1}, "copies must be a whole number of at least 2"),
        ({"copies": 0, "constrained": False}, "at least 1"),
        ({"constrained": 1}, "constrained must be True or False"),
        ({"sinkhorn_steps": 0}, "sinkhorn_steps"),
        ({"eps": -1}, "eps must be a finite number"),
        ({"streams": ()}, "HyperConnectionsConfig.streams"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ax.HyperConnectionsConfig(**options)
