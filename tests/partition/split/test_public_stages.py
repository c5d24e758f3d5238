"""Public models cut into stages: outputs and every gradient as of the whole model, with queries away from zero."""

import pytest
import torch

import attnres_fx as ax
from tests.support.cutting import assert_same, cut, evenly, spread
from tests.support.public_models import EXAMPLES, drawn

#: Modulated by one chunk of a condition; two streams of two inputs; lambdas and skips; a decoder that reads an encoder.
NAMES = ("dit", "mmdit", "modded-nanogpt", "encoder-decoder")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow_after(1)
def test_a_public_model_is_cut_into_stages_that_compute_the_same(name):
    model, args = EXAMPLES[name]()
    config = ax.AttnResConfig(block_size=2)
    converted = spread(ax.convert(drawn(model).eval().double(), doubled(args), config=config, check=False))
    names = converted.signature.args
    kwargs = dict(zip(names, doubled(args), strict=True))
    assert_same(converted, cut(converted, evenly(converted, 3)), kwargs, tolerance=1e-11)


def doubled(args):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
