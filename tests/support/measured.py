"""Small models and the costs that are measured on their converted graphs."""

from functools import cache

import torch
import transformers

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.partition.costs.measure import measure_costs
from attnres_fx.partition.split.chained_model import chains_of

IDS = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def converted_graph(model, *args, variant="full", **kwargs):
    """A converted model's graph in the model's own mode, and its chain of sublayers."""
    config = ax.AttnResConfig(variant=variant, **({} if variant == "full" else {"block_size": 2}))
    converted = ax.convert(model, args, kwargs, config=config, check=False)
    mode = "train" if model.training else "eval"
    ordered = chains_of(converted, (mode,))[mode]
    return ordered.gm, ordered.chain


def measured(model, *args, **kwargs):
    return measure_costs(*converted_graph(model, *args, **kwargs))


def gpt():
    torch.manual_seed(0)
    return SmallGPT(GPTConfig(vocabulary=64, layers=2, heads=4, width=32, context=64))


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def mixtral(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).to(dtype)


@cache
def gpt_costs():
    return measured(gpt(), IDS)


@cache
def llama_costs():
    return measured(llama(), input_ids=IDS, use_cache=False)
