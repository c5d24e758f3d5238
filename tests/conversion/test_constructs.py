"""Constructs of real code: a conversion keeps outputs, gradients and state, or refuses by name."""

import copy
import random

import pytest
import torch

import attnres_fx as ax
from tests.support.constructs import CONSTRUCTS, WIDTH

NAMES = [c.name for c in CONSTRUCTS]
BY_NAME = {c.name: c for c in CONSTRUCTS}


def example(batch, length, seed=0):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(model, x, seed):
    """Tensors of the outputs, and gradients by name, of one call from one random state."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    random.seed(seed)
    leaves = [t for t in torch.utils._pytree.tree_leaves(model(x)) if isinstance(t, torch.Tensor)]
    floating = [t for t in leaves if t.is_floating_point() and t.requires_grad]
    if floating:
        sum((t * torch.linspace(0.3, 1.7, t.shape[-1])).square().sum() for t in floating).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if not n.startswith("attnres.")}
    return leaves, gradients, bool(floating)


def assert_close(found, expected, what):
    assert found.shape == expected.shape, what
    scale = expected.detach().abs().max().clamp(min=1.0) if expected.numel() else 1.0
    off = (found.detach().double() - expected.detach().double()).abs().max() if expected.numel() else 0.0
    assert off <= 1e-5 * scale, f"{what} is off by {off:.1e}"


def assert_same_step(original, converted, x, seed):
    expected, gradients, trained = run(original, x.clone(), seed)
    found, converted_gradients, converted_trained = run(converted, x.clone(), seed)
    assert trained == converted_trained
    assert len(expected) == len(found)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert_close(a, b, f"output {i}")
    for name, grad in gradients.items():
        other = converted_gradients[name]
        if grad is not None and other is not None:
            assert_close(other, grad, f"gradient of {name}")
        else:
            assert all(g is None or not g.any() for g in (grad, other)), f"gradient of {name}: {grad} and {other}"
    buffers = dict(converted.named_buffers())
    for name, buffer in original.named_buffers():
        assert_close(buffers[name], buffer, f"buffer {name}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow_after(6)
def test_a_construct_is_kept_or_refused_by_name(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    construct = BY_NAME[name]
    model = construct.make()
    original = copy.deepcopy(model)
    config = ax.AttnResConfig(variant="block", block_size=2)
    try:
        converted = ax.convert(model, (example(2, 5),), config=config)
        for training in (True, False):
            original.train(training)
            converted.train(training)
            if not training and any("no gradients" in note for note in converted.report.notes):
                assert construct.refused and construct.refused in str(converted.report)
                assert not run(converted, example(2, 5), 0)[2]  # loudly: no output has a gradient
                return
            for step, x in enumerate((example(2, 5, 1), example(3, 7, 2), example(1, 3, 3))):
                assert_same_step(original, converted, x, step)
        assert not construct.refused
    except ax.AttnResError as error:
        assert construct.refused, f"{name} is refused: {error}"
        assert construct.refused in str(error), error
