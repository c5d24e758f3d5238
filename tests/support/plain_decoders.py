"""Plain decoders that are converted and attached for checkpoints of other libraries, and compared with references."""

import torch

import attnres_fx as ax
from tests.support.checkpoint_models import TOKENS

#: Tokens [rows, positions] of a call, and of a longer one.
X = torch.randint(0, TOKENS, (2, 7), generator=torch.Generator().manual_seed(1))
LONGER = torch.randint(0, TOKENS, (3, 9), generator=torch.Generator().manual_seed(2))


def converted(plain, config=None):
    return ax.convert(plain, (X,), config=config, check=False)


def compiled(plain, config=None):
    ax.attach(plain, (X,), config=config)
    plain.compile(backend="attnres", fullgraph=True, dynamic=True, options={"inner": "eager"})
    return plain


def apart(model, reference, tokens=X):
    """Largest difference of outputs over the largest output."""
    with torch.no_grad():
        right = reference(tokens)
        return float((model(tokens) - right).abs().max() / right.abs().max())


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}
