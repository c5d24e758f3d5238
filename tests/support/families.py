"""Tiny random-weight models of many families, and the number of reads their own configuration implies.

One read after every sublayer: two a pre-norm or post-norm layer, one a parallel layer, three a decoder layer
with cross-attention. In Zamba one a layer, which writes its Mamba output, and one more a hybrid layer, whose norm
sees the shared attention's output as well without writing it. The numbers are never taken from what the library found.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

L = 2
ZAMBA_LAYERS = ["linear_attention", "hybrid", "hybrid"]
IDS = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS}
SHORT = {"input_ids": IDS[:, :3]}  # where one step a token is unrolled
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": L, "n_head": 4, "n_positions": 64}
SEQ2SEQ = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": L,
    "decoder_layers": L,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": L, "num_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

Built = tuple[nn.Module, dict[str, Any], int]


def widened(model: nn.Module) -> nn.Module:
    """In eval mode, with matrices drawn wide enough that every sublayer moves the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def family(kind: str, kwargs: dict[str, Any], reads: int, head: str = "AutoModelForCausalLM", **options: Any) -> Built:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **options)
    return widened(getattr(transformers, head).from_config(config)), kwargs, reads


def encoder(norm_first: bool) -> Built:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, norm_first=norm_first, batch_first=True, dropout=0.1)
    model = nn.TransformerEncoder(layer, L, enable_nested_tensor=False)
    return widened(model), {"src": torch.randn(2, 6, 32)}, 2 * L


class InPlace(nn.Module):
    """Residual adds and activations that write where they read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(5))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True)) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for i, layer in enumerate(self.layers):
            if i % 2:
                h += layer(self.norms[i](h))
            else:
                h.add_(layer(self.norms[i](h)).relu_())
        return self.norms[-1](h)


class Carry(nn.Module):
    """A learned factor a channel on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.carries = nn.ParameterList(nn.Parameter(torch.rand(16)) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for norm, layer, carry in zip(self.norms, self.layers, self.carries, strict=False):
            h = h * carry + layer(norm(h))
        return self.norms[-1](h)


FAMILIES: dict[str, Callable[[], Built]] = {
    "llama": lambda: family("llama", TEXT, 2 * L, **GROUPED),
    "qwen3": lambda: family("qwen3", TEXT, 2 * L, head_dim=8, **GROUPED),
    "mistral": lambda: family("mistral", TEXT, 2 * L, **GROUPED),
    "gpt2": lambda: family("gpt2", TEXT, 2 * L, **GPT),
    "gpt_neox": lambda: family("gpt_neox", TEXT, L, **SMALL),
    "gptj": lambda: family("gptj", TEXT, L, rotary_dim=4, **GPT),
    "opt": lambda: family(
        "opt",
        TEXT,
        2 * L,
        vocab_size=96,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=L,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "bloom": lambda: family("bloom", TEXT, 2 * L, vocab_size=96, hidden_size=32, n_layer=L, n_head=4),
    "falcon": lambda: family(
        "falcon", TEXT, L, vocab_size=96, hidden_size=32, num_hidden_layers=L, num_attention_heads=4
    ),
    "phi": lambda: family("phi", TEXT, L, **SMALL),
    "cohere": lambda: family("cohere", TEXT, L, **GROUPED),
    "gemma2": lambda: family("gemma2", TEXT, 2 * L, head_dim=8, **GROUPED),
    "granite": lambda: family("granite", TEXT, 2 * L, residual_multiplier=0.5, **GROUPED),
    "mixtral": lambda: family("mixtral", TEXT, 2 * L, num_local_experts=4, **GROUPED),
    "mamba": lambda: family("mamba", SHORT, L, vocab_size=96, hidden_size=32, num_hidden_layers=L, state_size=4),
    "zamba": lambda: family(
        "zamba",
        SHORT,
        len(ZAMBA_LAYERS) + ZAMBA_LAYERS.count("hybrid"),
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=len(ZAMBA_LAYERS),
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        mamba_d_state=4,
        mamba_dt_rank=4,
        layers_block_type=ZAMBA_LAYERS,
        use_mamba_kernels=False,
    ),
    "bert": lambda: family("bert", TEXT, 2 * L, "AutoModel", **SMALL),
    "roberta": lambda: family("roberta", TEXT, 2 * L, "AutoModel", **SMALL),
    "t5": lambda: family(
        "t5",
        PAIR,
        5 * L,
        "AutoModelForSeq2SeqLM",
        **T5,
    ),
    "bart": lambda: family("bart", PAIR, 5 * L, "AutoModelForSeq2SeqLM", max_position_embeddings=64, **SEQ2SEQ),
    "vit": lambda: family(
        "vit",
        {"pixel_values": torch.randn(2, 3, 16, 16)},
        2 * L,
        "AutoModel",
        hidden_size=32,
        num_hidden_layers=L,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
    ),
    "swin": lambda: family(
        "swin",
        {"pixel_values": torch.randn(2, 3, 32, 32)},
        2 * (L + L),
        "AutoModel",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[L, L],
        num_heads=[2, 4],
        window_size=4,
    ),
    "whisper": lambda: family(
        "whisper",
        {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": IDS[:, :5]},
        5 * L,
        "AutoModelForSpeechSeq2Seq",
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        **TOKENS,
        **SEQ2SEQ,
    ),
    "albert": lambda: family("albert", TEXT, 2 * L, "AutoModel", embedding_size=16, **SMALL),
    "encoder, norm first": lambda: encoder(True),
    "encoder, norm last": lambda: encoder(False),
    "in place": lambda: (widened(InPlace()), {"ids": IDS}, 4),
    "carry": lambda: (widened(Carry()), {"ids": IDS}, 3),
}
