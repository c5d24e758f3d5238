"""Models of long sequences: recurrences over time, speech, series, sets, latents."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.public_models.parts import WIDTH, Attention, Example, FeedForward, Layer, ids, values


def shifted(x: Tensor) -> Tensor:
    """The token before each."""
    return F.pad(x, (0, 0, 1, -1))


class TimeMix(nn.Module):
    """Token shift, a state updated once a token by decay, removal and addition, and the first layer's value."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(4, WIDTH))
        self.r, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.decay, self.rate, self.value_gate = (
            nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH)) for _ in range(3)
        )
        self.bonus, self.norm = nn.Parameter(torch.zeros(WIDTH)), nn.GroupNorm(2, WIDTH)

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        change = shifted(x) - x
        xr, xw, xk, xv = (x + change * mix for mix in self.mix.unbind(0))
        r, k, v = self.r(xr), self.k(xk), self.v(xv)
        decay, rate = torch.exp(-0.6 * torch.sigmoid(self.decay(xw).tanh())), torch.sigmoid(self.rate(xk))
        if first is not None:
            v = v + (first - v) * torch.sigmoid(self.value_gate(xv))
        key = F.normalize(k, dim=-1)
        state, rows = x.new_zeros(batch, width, width), []
        for t in range(length):
            removed = state @ -key[:, t, :, None] @ (key * rate)[:, t, None, :]
            state = state * decay[:, t, None, :] + removed + v[:, t, :, None] @ k[:, t, None, :]
            rows.append((state @ r[:, t, :, None]).squeeze(-1))
        y = self.norm(torch.stack(rows, 1).flatten(0, 1)).view(batch, length, width)
        y = y + (r * k * self.bonus).sum(-1, keepdim=True) * v
        return self.out(y), v if first is None else first


class ChannelMix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.key = nn.Parameter(torch.zeros(WIDTH)), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.value = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(F.relu(self.key(x + (shifted(x) - x) * self.mix)).square())


class RWKVBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2, self.att, self.ffn = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), TimeMix(), ChannelMix()

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        y, first = self.att(self.ln1(x), first)
        x = x + y
        return x + self.ffn(self.ln2(x)), first


class RWKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.ln0 = nn.Embedding(11, WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(RWKVBlock() for _ in range(2))
        self.ln_out, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x, first = self.ln0(self.embed(tokens)), None
        for block in self.blocks:
            x, first = block(x, first)
        return self.head(self.ln_out(x))


class SelectiveScan(nn.Module):
    """Causal convolution, a scan whose steps depend on the token, a skip past the scan, a gate."""

    def __init__(self, states: int = 3) -> None:
        super().__init__()
        self.states, self.into, self.out = states, nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)
        self.select, self.step = nn.Linear(WIDTH, 1 + 2 * states), nn.Linear(1, WIDTH)
        self.log_a, self.skip = nn.Parameter(torch.zeros(WIDTH, states)), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        x, gate = self.into(x).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., :length].transpose(1, 2))
        step, b, c = self.select(x).split([1, self.states, self.states], -1)
        step = F.softplus(self.step(step))
        decay = torch.exp(step[..., None] * -self.log_a.exp())
        driven = step[..., None] * b[:, :, None] * x[..., None]
        state, rows = torch.zeros_like(driven[:, 0]), []
        for t in range(length):
            state = decay[:, t] * state + driven[:, t]
            rows.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(rows, 1) + x * self.skip
        return self.out(y * F.silu(gate))


class Mamba(nn.Module):
    """The weights are in half precision, the stream is kept in float32; a layer adds what the one before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.mixers = nn.ModuleList(SelectiveScan() for _ in range(2))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 11)
        self.bfloat16()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, residual = self.embed(tokens), None
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            residual = hidden.float() if residual is None else hidden + residual
            hidden = mixer(norm(residual.to(norm.weight.dtype)))
        residual = hidden + residual
        return self.head(self.norm(residual.to(self.norm.weight.dtype)))


class ConvolutionModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, 2 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)
        self.spread, self.batch_norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.up(self.norm(x).transpose(1, 2)), 1)
        return self.down(F.silu(self.batch_norm(self.spread(y)))).transpose(1, 2)


class ConformerBlock(nn.Module):
    """Two half feed-forwards around attention and convolution; the block ends in a norm that is carried on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.last = (nn.LayerNorm(WIDTH) for _ in range(4))
        self.feed1, self.attention, self.conv, self.feed2 = (
            FeedForward(),
            Attention(),
            ConvolutionModule(),
            FeedForward(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.feed1(self.norm1(x))
        x = x + self.attention(self.norm2(x))
        x = x + self.conv(x)
        return self.last(x + 0.5 * self.feed2(self.norm3(x)))


class Conformer(nn.Module):
    """Convolutions shorten the spectrogram before the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.shorten, self.project = nn.Conv2d(1, 2, 3, 2, 1), nn.Linear(8, WIDTH)
        self.blocks, self.head = nn.ModuleList(ConformerBlock() for _ in range(2)), nn.Linear(WIDTH, 11)

    def forward(self, spectrogram: Tensor) -> Tensor:
        x = F.relu(self.shorten(spectrogram[:, None])).transpose(1, 2).flatten(2)
        x = self.project(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).log_softmax(-1)


class BatchNormOfFeatures(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class PatchLayer(nn.Module):
    """Post-norm by batch norms; the scores of a layer are added to those of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.feed = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), FeedForward()
        self.norm1, self.norm2 = BatchNormOfFeatures(WIDTH), BatchNormOfFeatures(WIDTH)

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / WIDTH**0.5
        scores = scores if before is None else scores + before
        x = self.norm1(x + self.out(scores.softmax(-1) @ v))
        return self.norm2(x + self.feed(x)), scores


class PatchTST(nn.Module):
    """A series is normalised, cut into patches, and the forecast is put back to the series' mean and scale (RevIN)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.embed, self.positions = nn.Linear(4, WIDTH), nn.Parameter(torch.zeros(5, WIDTH))
        self.layers, self.head = nn.ModuleList(PatchLayer() for _ in range(2)), nn.Linear(5 * WIDTH, 6)

    def forward(self, series: Tensor) -> Tensor:
        batch, _, channels = series.shape
        mean, scale = series.mean(1, keepdim=True), torch.sqrt(series.var(1, keepdim=True, unbiased=False) + 1e-5)
        x = (series - mean) / scale * self.gain + self.offset
        x = x.transpose(1, 2).unfold(-1, 4, 2)
        x, scores = self.embed(x.flatten(0, 1)) + self.positions, None
        for layer in self.layers:
            x, scores = layer(x, scores)
        y = self.head(x.flatten(1)).view(batch, channels, -1).transpose(1, 2)
        return (y - self.offset) / (self.gain + 1e-10) * scale + mean


class CrossLayer(nn.Module):
    """Latents look at the inputs, a feed-forward, and a plain layer among the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inputs_norm, self.feed_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.cross, self.feed, self.layer = Attention(), FeedForward(), Layer()

    def forward(self, x: Tensor, inputs: Tensor) -> Tensor:
        x = x + self.cross(self.norm(x), self.inputs_norm(inputs))
        x = x + self.feed(self.feed_norm(x))
        return self.layer(x)


class Perceiver(nn.Module):
    """Learned latents look at the inputs again and again; learned queries look at the latents at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.queries = nn.Parameter(torch.zeros(3, WIDTH)), nn.Parameter(torch.zeros(2, WIDTH))
        self.project, self.layers = nn.Linear(6, WIDTH), nn.ModuleList(CrossLayer() for _ in range(2))
        self.norm, self.decode = nn.LayerNorm(WIDTH), Attention()

    def forward(self, pixels: Tensor) -> Tensor:
        batch, count = pixels.shape[:2]
        places = torch.linspace(-1, 1, count).expand(batch, count)
        inputs = self.project(torch.cat([pixels, places[..., None].sin(), places[..., None].cos()], -1))
        x = self.latents.expand(batch, -1, -1)
        for layer in self.layers:
            x = layer(x, inputs)
        return self.decode(self.queries.expand(batch, -1, -1), self.norm(x))


class MAB(nn.Module):
    """`h = norm(x + attention(x, y)); norm(h + feed(h))`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = Attention(), FeedForward()
        self.norm0, self.norm1 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.norm0(x + self.attention(x, y))
        return self.norm1(h + self.feed(h))


class ISAB(nn.Module):
    """Inducing points look at the set, the set looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.points, self.gather, self.spread = nn.Parameter(torch.zeros(1, 2, WIDTH)), MAB(), MAB()

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(x, self.gather(self.points.repeat(x.shape[0], 1, 1), x))


class SetTransformer(nn.Module):
    """Two such blocks, then learned seeds look at the set."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(3, WIDTH), nn.ModuleList(ISAB() for _ in range(2))
        self.seeds, self.before, self.pool = nn.Parameter(torch.zeros(1, 2, WIDTH)), FeedForward(), MAB()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, points: Tensor) -> Tensor:
        x = self.embed(points)
        for block in self.blocks:
            x = block(x)
        return self.head(self.pool(self.seeds.repeat(x.shape[0], 1, 1), self.before(x)))


EXAMPLES: dict[str, Example] = {
    "rwkv-7": lambda: (RWKV(), (ids(2, 3),)),
    "mamba": lambda: (Mamba(), (ids(2, 3),)),
    "conformer": lambda: (Conformer(), (values(2, 8, 8),)),
    "patchtst": lambda: (PatchTST(), (values(2, 12, 3),)),
    "perceiver": lambda: (Perceiver(), (values(2, 7, 4),)),
    "set transformer": lambda: (SetTransformer(), (values(2, 6, 3),)),
}
