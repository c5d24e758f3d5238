"""Small decoders that read their depth as Kimi K3 and flash-linear-attention do, written by hand, and a plain one.

Each reference goes over its layers in the way of its library, with the projections and norms that its checkpoints hold.
Nothing of attnres_fx is used.
"""

import json

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH, TOKENS = 16, 40


class Mixer(nn.Module):
    """A causal mean over positions between two projections, in the place of attention."""

    def __init__(self):
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).unsqueeze(-1)
        return self.o_proj(torch.tanh(self.v_proj(x)).cumsum(1) / counts)


class Layer(nn.Module):
    def __init__(self, eps: float):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH, eps), nn.RMSNorm(WIDTH, eps)
        self.self_attn = Mixer()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    def __init__(self, layers: int, eps: float):
        super().__init__()
        self.embed_tokens = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Layer(eps) for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH, eps)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class PlainModel(nn.Module):
    """The decoder with residual connections: what a conversion is given."""

    def __init__(self, layers: int = 3, eps: float = 1e-5):
        super().__init__()
        self.model, self.lm_head = Trunk(layers, eps), nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens))


def _add_site(module: nn.Module, name: str, eps: float) -> None:
    module.add_module(f"{name}_proj", nn.Linear(WIDTH, 1, bias=False))
    module.add_module(f"{name}_norm", nn.RMSNorm(WIDTH, eps))


class _Reference(PlainModel):
    first: str
    last: str
    setting: str
    eps_setting: str

    def __init__(self, layers: int = 3, eps: float = 1e-5, block: int = 2):
        super().__init__(layers, eps)
        self.eps, self.block = eps, block
        for layer in self.model.layers:
            _add_site(layer, self.first, eps)
            _add_site(layer, "mlp_res", eps)
        _add_site(self.model, self.last, eps)

    @classmethod
    def random(cls, seed: int = 5, **options):
        """With every projection and norm away from its start; logits over depth are about 2."""
        torch.manual_seed(seed)
        model = cls(**options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "_res_" in name or "res_" in name.split(".")[-2]:
                    parameter.normal_(0, 0.5) if "_proj" in name else parameter.normal_(1, 0.3)
                elif "layernorm" in name or name.endswith("norm.weight"):
                    parameter.normal_(1, 0.2)
        return model.eval()

    def save(self, folder, *, prefix: str = "", shards: int = 1, nested: bool = False) -> None:
        """The checkpoint as a Hugging Face folder has it."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {self.setting: self.block, self.eps_setting: self.eps, "hidden_size": WIDTH}
        settings = {"model_type": "some", "text_config": settings} if nested else settings
        (folder / "config.json").write_text(json.dumps(settings))
        state = {prefix + n: t.contiguous() for n, t in self.state_dict().items()}
        names = sorted(state)
        for shard in range(shards):
            part = {n: state[n] for n in names[shard::shards]}
            save_file(part, folder / f"model-{shard + 1:05}-of-{shards:05}.safetensors")

    def plain(self) -> PlainModel:
        """The decoder without its reads, on the same weights."""
        plain = PlainModel(len(self.model.layers), self.eps).eval()
        plain.load_state_dict(self.state_dict(), strict=False)
        return plain


class KimiReference(_Reference):
    """A running sum, and a tensor of completed blocks [rows, blocks, D] that grows at every `block`-th layer."""

    first, last, setting, eps_setting = "self_attention_res", "output_attn_res", "attn_res_block_size", "rms_norm_eps"

    def forward(self, tokens: Tensor) -> Tensor:
        running = self.model.embed_tokens(tokens)
        shape = running.shape
        blocks = running.new_zeros(shape[0] * shape[1], 0, WIDTH)
        for index, layer in enumerate(self.model.layers):
            hidden = running
            if blocks.shape[1]:
                hidden = self.read(running, blocks, layer.self_attention_res_proj, layer.self_attention_res_norm)
            if index % self.block == 0:
                blocks, running = torch.cat([blocks, running.reshape(-1, 1, WIDTH)], 1), None
            written = layer.self_attn(layer.input_layernorm(hidden))
            running = written if running is None else running + written
            hidden = self.read(running, blocks, layer.mlp_res_proj, layer.mlp_res_norm)
            running = running + layer.mlp(layer.post_attention_layernorm(hidden))
        last = self.read(running, blocks, self.model.output_attn_res_proj, self.model.output_attn_res_norm)
        return self.lm_head(self.model.norm(last))

    @staticmethod
    def read(running: Tensor, blocks: Tensor, proj: nn.Module, norm: nn.Module) -> Tensor:
        values = torch.cat([blocks, running.reshape(-1, 1, WIDTH)], 1)
        weights = proj(norm(values)).transpose(1, 2).softmax(-1)
        return (weights @ values).reshape(running.shape)


class FlaReference(_Reference):
    """A list of states; whether a sublayer ends a block is counted in sublayers."""

    first, last, setting, eps_setting = "attn_res", "res", "attnres_block_size", "norm_eps"

    def forward(self, tokens: Tensor) -> Tensor:
        states, running = None, self.model.embed_tokens(tokens)
        for index, layer in enumerate(self.model.layers):
            if states is None:
                hidden, states, running = running, [running], None
            else:
                hidden, states, running = self.step(
                    states, running, 2 * index, layer.attn_res_proj, layer.attn_res_norm
                )
            written = layer.self_attn(layer.input_layernorm(hidden))
            running = written if running is None else running + written
            hidden, states, running = self.step(states, running, 2 * index + 1, layer.mlp_res_proj, layer.mlp_res_norm)
            written = layer.mlp(layer.post_attention_layernorm(hidden))
            running = written if running is None else running + written
        last = self.read([*states, running], self.model.res_proj, self.model.res_norm)
        return self.lm_head(self.model.norm(last))

    def step(self, states, running, sublayer, proj, norm):
        seen = [*states, running]
        hidden = self.read(seen, proj, norm)
        return (hidden, seen, None) if sublayer % self.block == 0 else (hidden, states, running)

    @staticmethod
    def read(states: list[Tensor], proj: nn.Module, norm: nn.Module) -> Tensor:
        values = torch.stack(states)
        return torch.einsum("sbt,sbtd->btd", proj(norm(values)).squeeze(-1).softmax(0), values)
