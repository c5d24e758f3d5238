"""Convert a Llama made from a config: `python examples/convert_huggingface.py` (needs transformers)."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_fx as ax

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 256}
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, max_position_embeddings=64, **sizes)).eval()
ids = torch.randint(0, 256, (2, 16))
converted = ax.convert(model, kwargs={"input_ids": ids}, config=ax.AttnResConfig(variant="block", num_blocks=4))
print(converted.report)
print(converted.report.reads_table())
print(ax.verify(model, converted, kwargs={"input_ids": ids}))
