"""What is compared: a name, and the config that a fresh residual model is converted with. A new method is a line."""

from torch import nn

import attnres_fx as ax
from attnres_fx.demo.text import Text

RESIDUAL = "residual"

#: Methods that have blocks of so many sublayers.
BLOCKS = {f"block of {n}": ax.AttnResConfig(variant="block", block_size=n) for n in (1, 2, 4, 6, 8, 12, 24)}

#: One thing at a time that reads of blocks of 4 do otherwise, and a window over the outputs of all sublayers.
ABLATIONS = {
    "no key norm": ax.AttnResConfig(block_size=4, key_norm=False),
    "input query": ax.AttnResConfig(block_size=4, query="input"),
    "4 heads": ax.AttnResConfig(block_size=4, heads=4),
    "sigmoid": ax.AttnResConfig(block_size=4, weights="sigmoid"),
    "source bias": ax.AttnResConfig(block_size=4, source_bias=True),
    "window of 8": ax.AttnResConfig(block_size=1, window=8, output="mean"),
}

#: None: the model as it is. By default a block has an eighth of the sublayers.
METHODS: dict[str, ax.AttnResConfig | ax.HyperConnectionsConfig | None] = {
    RESIDUAL: None,
    "block": ax.AttnResConfig(variant="block"),
    "full": ax.AttnResConfig(variant="full"),
    "local": ax.AttnResConfig(variant="local"),
    "static": ax.AttnResConfig(variant="block", weights="static"),
    "mhc": ax.HyperConnectionsConfig(),
    **BLOCKS,
    **ABLATIONS,
}


def with_method(model: nn.Module, method: str, text: Text) -> nn.Module:
    """A model that reads its depth as a method says, with the same weights.

    Args:
        model: The residual model.
        method: A name of the table.
        text: Whose batches are the example.

    Returns:
        The model itself for "residual", else a conversion of it; compared with it before it is trained.
    """
    config = METHODS[method]
    if config is None:
        return model
    example = text.validation[0][0].to(next(model.parameters()).device)
    return ax.convert(model, (example,), config=config, check="outputs", dynamic_shapes={})
