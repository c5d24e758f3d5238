"""Layers that a model checkpoints are recomputed in the converted model too, with the same dropout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnres_fx as ax

WIDTH, LAYERS = 16, 4


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.up, self.down = (nn.Linear(a, b) for a, b in ((WIDTH, WIDTH), (WIDTH, 128), (128, WIDTH)))

    def forward(self, x):
        x = x + F.dropout(self.mix(self.norm_1(x).transpose(0, 1)).transpose(0, 1), 0.2, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), 0.2, self.training)


class UnderAutocast(Layer):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = x + F.dropout(self.mix(self.norm_1(x)), 0.2, self.training)
            return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), 0.2, self.training)


class WithStatistics(Layer):
    def forward(self, x):
        with torch.no_grad():
            scale = x.abs().mean()
        return super().forward(x) * (1 + 0 * scale)


class Halves(Layer):
    """Each branch checkpointed by itself, inside a layer that is checkpointed."""

    def forward(self, x):
        x = x + checkpoint(lambda y: F.dropout(self.mix(self.norm_1(y)), 0.2, self.training), x, use_reentrant=False)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), 0.2, self.training)


class WithBatchNorm(Layer):
    """Its statistics are written in the region, once more when it is recomputed."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        x = x + self.mix(self.norm_1(x.transpose(1, 2)).transpose(1, 2))
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), 0.2, self.training)


class WithCounter(Layer):
    """What it multiplies with is counted after the layer read it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x):
        x = super().forward(x * torch.ones_like(self.calls))
        self.calls.add_(1)
        return x


class Net(nn.Module):
    def __init__(self, layer, every=1, checkpointed=True):
        super().__init__()
        self.every, self.checkpointed = every, checkpointed
        self.inp, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))

    def forward(self, x):
        x = self.inp(x)
        for i, layer in enumerate(self.layers):
            again = self.checkpointed and self.training and i % self.every == 0
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        return self.norm(x)


def step(model, x, seed):
    """Numbers saved for backward, outputs and gradients of one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    held = {}

    def pack(tensor):
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = sum(t.untyped_storage().nbytes() // 4 for at, t in held.items() if at not in own)
    output.square().sum().backward()
    return saved, output.detach(), {n: p.grad for n, p in model.named_parameters() if not n.startswith("attnres.")}


def pair(layer, variant="full", **options):
    torch.manual_seed(0)
    model = Net(layer, **options).train()
    original = copy.deepcopy(model)
    x = torch.randn(4, 6, WIDTH)
    return original, ax.convert(model, (x,), config=ax.AttnResConfig(variant=variant), check=False).train()


@pytest.mark.parametrize(
    ("layer", "variant", "every"),
    [
        (Layer, "full", 1),
        (Layer, "block", 2),
        (Layer, "local", 1),
        (UnderAutocast, "full", 1),
        (WithStatistics, "block", 1),
        (Halves, "full", 1),
        (WithBatchNorm, "full", 1),
        (WithCounter, "block", 1),
    ],
)
def test_gradients_with_dropout_are_the_originals(layer, variant, every):
    original, converted = pair(layer, variant, every=every)
    for seed, sizes in enumerate([(4, 6), (3, 9)]):
        x = torch.randn(*sizes, WIDTH)
        _, expected, gradients = step(original, x, seed)
        _, output, found = step(converted, x, seed)
        exact = layer is not UnderAutocast
        torch.testing.assert_close(output, expected, rtol=1e-5 if exact else 2e-2, atol=1e-5 if exact else 2e-2)
        scale = max(g.abs().max() for g in gradients.values())
        for name, gradient in gradients.items():
            assert (found[name] - gradient).abs().max() / scale < (1e-4 if exact else 3e-2), name
        for (name, buffer), own in zip(original.named_buffers(), converted.buffers(), strict=False):
            torch.testing.assert_close(own, buffer, msg=name)


@pytest.mark.parametrize("layer", [Layer, UnderAutocast, Halves])
@pytest.mark.slow
def test_what_is_recomputed_is_not_saved(layer):
    x = torch.randn(16, 32, WIDTH)
    unit = x.numel()
    original, converted = pair(layer)
    _, plain = pair(layer, checkpointed=False)
    saved, without = step(converted, x, 0)[0], step(plain, x, 0)[0]
    # A source for each sublayer and what each read gives; the original's own; a few numbers a row.
    assert saved <= step(original, x, 0)[0] + (4 * LAYERS + 1 + 2 * LAYERS) * unit
    assert saved < 0.5 * without


def test_reads_stay_where_the_library_looks_for_them():
    _, converted = pair(Layer)
    names = {n.name for n in converted.graph_module("train").graph.nodes}
    assert {r.node for r in converted.replacements("train")} <= names
    weights = ax.depth_weights(converted, (torch.randn(4, 6, WIDTH),))
    assert len(weights.reads if hasattr(weights, "reads") else list(weights)) == 2 * LAYERS


@pytest.mark.slow
def test_an_eval_program_has_no_checkpoints():
    _, converted = pair(Layer)
    assert not any(n.target is checkpoint for n in converted.graph_module("eval").graph.nodes)
    assert any(n.target is checkpoint for n in converted.graph_module("train").graph.nodes)


def test_a_model_without_checkpoints_gets_none():
    _, converted = pair(Layer, checkpointed=False)
    assert not any(n.target is checkpoint for n in converted.graph_module("train").graph.nodes)


@pytest.mark.parametrize("layer", [Layer])
@pytest.mark.slow
def test_the_compile_backend_recomputes_by_tags(layer):
    torch.manual_seed(0)
    model = Net(layer).train()
    original, x = copy.deepcopy(model), torch.randn(4, 6, WIDTH)
    ax.compile(model, (x,), config=ax.AttnResConfig(variant="full"), inner="aot_eager", dynamic=False)
    _, expected, gradients = step(original, x, 1)
    _, output, found = step(model, x, 1)
    torch.testing.assert_close(output, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4)
