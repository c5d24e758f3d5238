"""Reads that no kernel has (a query of each token, heads, raw keys, sigmoid and static weights), against float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from attnres_fx.config import AttnResConfig
from attnres_fx.errors import OperatorError
from attnres_fx.ops import depth_attention, depth_attention_general, depth_weights
from attnres_fx.ops.general import DEPTH_ATTENTION_GENERAL
from tests.support.operator_oracle import TOLERANCE, worst_ratio
from tests.support.read_forms import read_by_hand, weights_by_hand

COUNT, WIDTH, GAIN = 4, 12, 3.0
FORMS = {
    "all of it": {
        "query": "input",
        "heads": 3,
        "source_bias": True,
        "value_norm": True,
        "scale": 0.7,
        "weights": "sigmoid",
    },
    "input query": {"query": "input"},
    "heads": {"heads": 3},
    "no key norm": {"key_norm": False},
    "sigmoid": {"weights": "sigmoid"},
    "static": {"weights": "static"},
    "raw keys, normalised values and a query of each token": {"query": "input", "key_norm": False, "value_norm": True},
    "heads with a bias and a scale": {"heads": 4, "source_bias": True, "scale": 2.0},
}
every_form = pytest.mark.parametrize("config", [AttnResConfig(output="mean", **f) for f in FORMS.values()], ids=FORMS)


@dataclass(frozen=True)
class Read:
    """A read's tensors, the sources in one of their own; the names of the others are those of a `DepthRead`."""

    config: AttnResConfig
    sources: list[torch.Tensor]
    query: torch.Tensor | None
    key_weight: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def leaves(self):
        return [*self.sources, *(t for t in (self.query, self.key_weight, self.bias) if t is not None)]

    def on(self, leaves):
        """The same read of other tensors."""
        left = iter(leaves)
        sources = [next(left) for _ in self.sources]
        return Read(self.config, sources, *(None if t is None else next(left) for t in self._weights))

    @property
    def _weights(self):
        return self.query, self.key_weight, self.bias

    def exact(self):
        return self.on([t.detach().double().requires_grad_() for t in self.leaves])

    @property
    def options(self):
        c = self.config
        return {
            "bias": self.bias,
            "scale": c.scale,
            "key_norm": c.key_norm,
            "heads": c.heads,
            "sigmoid": c.weights == "sigmoid",
        }

    def run(self):
        more = {"gain": GAIN, "value_norm": self.config.value_norm}
        return depth_attention_general(self.sources, self.query, self.key_weight, **more, **self.options)

    def right(self):
        return read_by_hand(self.sources, self.config, self, GAIN)


def given(config, *shape, dtype=torch.float32, width=WIDTH, count=COUNT):
    generator = torch.Generator().manual_seed(3)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator)

    sources = [normal(*shape, width).mul(1 + i % 3).to(dtype).requires_grad_() for i in range(count)]
    query = normal(width, width) if config.query == "input" else normal(width)
    query, key_weight = query.div(width**0.5).requires_grad_(), normal(width).mul(0.3).add(1).requires_grad_()
    bias = normal(count).requires_grad_() if config.has_biases else None
    return Read(config, sources, *((query, key_weight) if config.has_queries else (None, None)), bias)


def compare(read, run=Read.run):
    """A read and the gradients of all its tensors, against those of float64."""
    exact = read.exact()
    found, expected = run(read), exact.right()
    forward, backward = TOLERANCE[read.sources[0].dtype]
    assert found.dtype == read.sources[0].dtype and worst_ratio(found, expected) <= forward
    seed = torch.randn(found.shape, generator=torch.Generator().manual_seed(4)).to(found.dtype)
    gradients = torch.autograd.grad(found, read.leaves, seed)
    for one, other in zip(gradients, torch.autograd.grad(expected, exact.leaves, seed.double()), strict=True):
        assert other.abs().max() > 0 and worst_ratio(one, other) <= backward


@every_form
def test_a_read_and_its_gradients_are_those_of_float64(config):
    compare(given(config, 3, 5))
    compare(given(config, 3, 5).exact())
    compare(given(config, 5))
    if config.query == "static":
        compare(given(config, 3, 5, dtype=torch.bfloat16))


def test_the_projection_of_a_query_is_a_product_in_the_dtype_of_the_sources():
    read = given(AttnResConfig(query="input"), 3, 5, dtype=torch.bfloat16)
    normed = torch.nn.functional.rms_norm(read.sources[-1].float(), (WIDTH,), None, 1e-6).bfloat16()
    query = (normed @ read.query.bfloat16().T).float()
    keys = [torch.nn.functional.rms_norm(s.float(), (WIDTH,), None, 1e-6) * read.key_weight for s in read.sources]
    weights = torch.stack([(query * k).sum(-1) for k in keys]).softmax(0)
    expected = GAIN * sum(w[..., None] * s.float() for w, s in zip(weights, read.sources, strict=True))
    plain = read.run()
    assert worst_ratio(plain, expected) <= TOLERANCE[torch.bfloat16][0]
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(read.run(), plain)


@every_form
def test_the_weights_over_depth_are_those_of_float64(config):
    read = given(config, 5)
    found = depth_weights(read.sources, read.query, read.key_weight, **read.options)
    expected = weights_by_hand(read.exact().sources, config, read.exact())
    assert worst_ratio(found, expected.squeeze(-1) if config.heads == 1 else expected) <= 1e-5


@every_form
def test_gradients_of_gradients_are_those_of_float64(config):
    read = given(config, 2, count=2).exact()
    assert torch.autograd.gradgradcheck(lambda *leaves: read.on(leaves).run(), read.leaves, fast_mode=True)


@every_form
def test_it_runs_under_the_transforms_of_torch_func(config):
    read, other = given(config, 3, 5).exact(), given(config, 5).exact()

    def one(*sources):
        return other.on([*sources, *read.leaves[COUNT:]]).run()

    assert worst_ratio(torch.vmap(one)(*read.sources), read.run()) <= 1e-14
    loss = torch.func.grad(lambda *leaves: read.on(leaves).run().square().sum(), tuple(range(len(read.leaves))))
    expected = torch.autograd.grad(read.right().square().sum(), read.leaves)
    for found, right in zip(loss(*(t.detach() for t in read.leaves)), expected, strict=True):
        assert worst_ratio(found, right) <= 1e-11
    values = tuple(t.detach() for t in read.leaves)
    tangents = tuple(torch.ones_like(t) for t in values)
    _, found = torch.func.jvp(lambda *leaves: read.on(leaves).run(), values, tangents)
    _, right = torch.func.jvp(lambda *leaves: read.on(leaves).right(), values, tangents)
    assert worst_ratio(found, right) <= 1e-11


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["all of it", "static", "heads with a bias and a scale"])
@pytest.mark.slow_after(1)
def test_a_compiled_read_is_that_of_float64(name, backend):
    read = given(AttnResConfig(output="mean", **FORMS[name]), 3, 5)
    compiled = torch.compile(lambda *leaves: read.on(leaves).run(), backend=backend, fullgraph=True)
    compare(read, lambda r: compiled(*r.leaves))


class Reader(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.read = read
        self.weights = nn.ParameterList([t.detach() for t in read.leaves[COUNT:]])

    def forward(self, *sources):
        return self.read.on([*sources, *self.weights]).run()


@every_form
def test_an_exported_read_is_one_node_and_computes_the_same(config):
    read = given(config, 3, 5)
    sources = tuple(s.detach() for s in read.sources)
    program = torch.export.export(Reader(read), sources)
    assert [n.target for n in program.graph.nodes].count(DEPTH_ATTENTION_GENERAL) == 1
    assert torch.equal(program.module()(*sources), Reader(read)(*sources))


def test_the_plain_form_is_depth_attention():
    config = AttnResConfig(output="mean", source_bias=True, scale=0.4, value_norm=True)
    read = given(config, 3, 5).exact()
    more = {"bias": read.bias, "scale": 0.4, "value_norm": True, "gain": GAIN}
    assert worst_ratio(read.run(), depth_attention(read.sources, read.query, read.key_weight, **more)) <= 1e-14


def test_backward_keeps_the_sources_and_nothing_of_their_size():
    read = given(AttnResConfig(query="input", heads=3), 64, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        read.run()
    large = {t.data_ptr() for t in kept if t.numel() >= read.sources[0].numel()}
    assert large <= {s.data_ptr() for s in read.sources}


WRONG = {
    "heads that do not divide": ({"heads": 5}, "the width 12 cannot be cut into 5 equal heads"),
    "no query": ({"query": None}, "without a query the weights are the softmax of a bias"),
    "no bias either": ({"query": None, "key_weight": None, "bias": None}, "which must be given"),
    "heads without a query": ({"query": None, "key_weight": None, "heads": 2}, "heads and sigmoid mean nothing"),
    "a query of another width": ({"query": torch.ones(12, 5)}, "query is torch.float32 \\(12, 5\\)"),
    "a query of whole numbers": ({"query": torch.ones(12, dtype=torch.long)}, "must be floating point"),
    "a gain of another width": ({"key_weight": torch.ones(5)}, "key_weight is torch.float32 \\(5,\\)"),
    "a query elsewhere": ({"query": torch.ones(12, device="meta")}, "query is on meta"),
    "a bias of another length": ({"bias": torch.ones(3)}, "bias is torch.float32 \\(3,\\)"),
    "sources of two shapes": ({"sources": [torch.ones(2, 12), torch.ones(12)]}, "source 1 has shape"),
    "one tensor": ({"sources": torch.ones(3, 12)}, "sources is one tensor"),
    "no sources": ({"sources": []}, "empty list of sources"),
    "a negative eps": ({"eps": -1.0}, "eps is -1.0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_refused(name):
    changes, message = WRONG[name]
    read = replace(given(AttnResConfig(source_bias=True), 5))
    arguments = {"sources": read.sources, "query": read.query, "key_weight": read.key_weight, "bias": read.bias}
    with pytest.raises(OperatorError, match=message):
        depth_attention_general(**{**arguments, **changes})
