"""Parts of small models as they were before a conversion, and traced functions: what costs are compared with."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attnres_fx.passes.normalize.inline_regions import inline_regions_pass
from tests.support.measured import IDS


def gpt_parts(model):
    """Embedding, sublayers and head of the original, each a function of a tensor."""
    before = lambda ids: model.token(ids) + model.position(torch.arange(ids.shape[1]))  # noqa: E731
    layers = []
    for block in model.blocks:
        layers.append(lambda h, b=block: b.attention(b.attention_norm(h)))
        layers.append(lambda h, b=block: b.mlp(b.mlp_norm(h)))
    return before, layers, lambda h: model.head(model.norm(h)), ()


def decoder_parts(model):
    inner, length = model.model, IDS.shape[1]
    rotary = inner.rotary_emb(torch.empty(1, length, 32), torch.arange(length)[None])
    mask = torch.full((2, 1, length, length), float("-inf")).triu(1)  # as numbers: attention would make them of a bool
    layers = []
    for layer in inner.layers:
        attend = {"position_embeddings": rotary, "attention_mask": mask}
        layers.append(lambda h, y=layer, a=attend: y.self_attn(y.input_layernorm(h), **a)[0])
        layers.append(lambda h, y=layer: y.mlp(y.post_attention_layernorm(h)))
    return inner.embed_tokens, layers, lambda h: model.lm_head(inner.norm(h)), (mask, *rotary)


def counted(function, given):
    """Forward and backward operations of a real run. Attention runs as its definition: two products, four back."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            out = function(given)
        with FlopCounterMode(display=False) as backward:
            out.backward(torch.ones_like(out))
    return out.detach().requires_grad_(), forward.get_total_flops(), backward.get_total_flops()


def traced(function, *args):
    gm = torch.export.export(function, args, strict=False).module()
    inline_regions_pass(gm)
    return gm, list(gm.graph.nodes)
