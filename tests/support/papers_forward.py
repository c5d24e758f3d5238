"""Small models of transformers, and the paper's forward on their own submodules."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

IDS = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def llama(layers=2):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).eval()


def gpt2(layers=2):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def gpt_neox(layers):
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ).eval()


def llama_sublayers(model):
    inner = model.model
    positions = torch.arange(IDS.shape[1])[None]
    mask = torch.full((IDS.shape[1], IDS.shape[1]), float("-inf")).triu(1)[None, None]

    def attention(layer):
        def run(h):
            rotary = inner.rotary_emb(h, positions)
            return layer.self_attn(layer.input_layernorm(h), position_embeddings=rotary, attention_mask=mask)[0]

        return run

    layers = [f for y in inner.layers for f in (attention(y), lambda h, y=y: y.mlp(y.post_attention_layernorm(h)))]
    return inner.embed_tokens(IDS), layers, lambda h: model.lm_head(inner.norm(h))


def gpt2_sublayers(model):
    inner = model.transformer
    mask = torch.full((IDS.shape[1], IDS.shape[1]), float("-inf")).triu(1)[None, None]
    layers = []
    for y in inner.h:
        layers.append(lambda h, y=y: y.attn(y.ln_1(h), attention_mask=mask)[0])
        layers.append(lambda h, y=y: y.mlp(y.ln_2(h)))
    root = inner.wte(IDS) + inner.wpe(torch.arange(IDS.shape[1]))[None]
    return root, layers, lambda h: model.lm_head(inner.ln_f(h))


def gpt_neox_sublayers(model):
    inner = model.gpt_neox
    positions = torch.arange(IDS.shape[1])[None]
    mask = torch.full((IDS.shape[1], IDS.shape[1]), float("-inf")).triu(1)[None, None]

    def parallel(layer):
        def run(h):
            rotary = inner.rotary_emb(h, positions)
            mixed = layer.attention(layer.input_layernorm(h), mask, position_embeddings=rotary)[0]
            return mixed + layer.mlp(layer.post_attention_layernorm(h))

        return run

    return inner.embed_in(IDS), list(map(parallel, inner.layers)), lambda h: model.lm_head(inner.final_layer_norm(h))


def attend(sources, read, gain):
    stacked = torch.stack(sources)
    keys = stacked / (stacked.square().mean(-1, keepdim=True) + 1e-6).sqrt() * read.key_weight
    weights = torch.einsum("d,s...d->s...", read.query, keys).softmax(0)
    return gain(len(sources)) * torch.einsum("s...,s...d->...d", weights, stacked)


def by_hand(parts, reads, variant, output, size):
    """The paper's forward, sublayer by sublayer, on the model's own submodules."""
    root, sublayers, head = parts
    gain = (lambda s: s) if output == "sum" else (lambda s: 1)
    reads = iter(reads)
    done, summary, block = [], root, []
    state = root
    for i, sublayer in enumerate(sublayers):
        block.append(sublayer(state))
        if variant == "full":
            sources = [root, *block]
        elif variant == "block":
            sources = [root, *done, sum(block[1:], block[0])]
        else:
            sources = [summary, *block]
        state = attend(sources, next(reads), gain)
        if variant != "full" and len(block) == size and i + 1 < len(sublayers):
            done.append(sum(block[1:], block[0]))
            summary, block = state, []
    return head(state)
