"""A small model over depth attention, whole and cut by hand into stages as `build_pipeline` takes them.

Between its stages travel, besides the sources: integers, a value nobody sends a gradient for, two names for one
tensor, a stage's own input given on, and a value that depends on no earlier stage. Every sublayer returns a view.
All is float64, so that what is wrong stands out from rounding.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn

from attnres_fx.config import AttnResConfig
from attnres_fx.ops import depth_attention
from attnres_fx.partition.split.routes import StageValue, route_values
from attnres_fx.state_config import MadeFor

WIDTH, TOKENS, VOCABULARY = 8, 5, 11


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key_weight = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, sources):
        read = sources[0] if len(sources) == 1 else depth_attention(sources, self.query, self.key_weight)
        return self.down(torch.tanh(self.up(read))).view(-1, WIDTH).view(read.shape)


class Whole(nn.Module):
    def __init__(self, layers=8, tied=False):
        super().__init__()
        self.embed, self.side = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.mix, self.norm = Layer(), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def first(self, ids):
        root = self.embed(ids)
        return root, ids.remainder(2), root.sum(-1, keepdim=True)

    def last(self, sources, mask, hint, side, again, twin, scale):
        read = self.mix(sources) + side * mask.unsqueeze(-1) + hint.detach() * again + twin.sin()
        return self.head(self.norm(read)) * scale

    def forward(self, ids, scale=1.0):
        root, mask, hint = self.first(ids)
        sources = [root]
        for layer in self.layers:
            sources.append(layer(sources))
        return self.last(sources, mask, hint, self.side(ids), root, root, scale)


class HandStage(nn.Module):
    """Virtual stage `index` of `count`, with its share of the layers."""

    def __init__(self, model, index, count, routes):
        super().__init__()
        size = len(model.layers) // count
        self.routes, self.inputs, self.is_last = routes, (0, 1) if index == count - 1 else (0,), index == count - 1
        self.mine, self.index, self.count = range(index * size, (index + 1) * size), index, count
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in self.mine})
        if index == 0:
            self.embed = model.embed
        if index == count // 2:
            self.side = model.side
        if self.is_last:
            self.mix, self.norm, self.head = model.mix, model.norm, model.head
        self.fail_at = None

    first, last = Whole.first, Whole.last

    @property
    def route(self):
        return self.routes[self.training]

    def forward(self, *inputs):
        values = {n.rstrip("!"): v for n, v in zip(self.route.takes, inputs, strict=False)}
        ids, *scale = inputs[len(self.route.takes) :]
        if self.index == 0:
            values["v0"], values["mask"], values["hint"] = self.first(ids)
            values["twin"] = values["v0"]
        if self.index == self.count // 2:
            values["side"] = self.side(ids)
        if self.index == 1:
            values["again"] = values["v0"]
        for i in self.mine:
            values[f"v{i + 1}"] = self.layers[str(i)]([values[f"v{j}"] for j in range(i + 1)])
        if self.fail_at is not None and self.fail_at():
            raise ZeroDivisionError("on purpose")
        if not self.is_last:
            return tuple(values[name.rstrip("!")] for name in self.route.produced)
        sources = [values[f"v{j}"] for j in range(self.mine.stop + 1)]
        return [self.last(sources, *(values[n] for n in ("mask", "hint", "side", "again", "twin")), *scale)]


class HandStages:
    """All stages of a model, as the runtime's contract wants them."""

    def __init__(self, model, num_stages, virtual_stages, *, cache=True):
        model = copy.deepcopy(model)
        count, size = num_stages * virtual_stages, len(model.layers) // (num_stages * virtual_stages)
        last = count - 1
        later = [(f"v{i + 1}", i // size, range(i // size + 1, count)) for i in range(len(model.layers))]
        extra = [("hint", 0, [last]), ("twin", 0, [last]), ("side", count // 2, [last]), ("again", 1, [last])]
        made = [("v0", 0, range(1, count)), ("mask", 0, [last]), *extra, *later]
        values = [
            StageValue(
                name,
                produced,
                tuple(u for u in used if u > produced),
                self.bytes_of(name),
                differentiable=name != "mask",
            )
            for name, produced, used in made
            if any(u > produced for u in used)
        ]
        # The eval graph has other names, in another order.
        self.by_mode = {True: values, False: [replace(v, name=v.name + "!") for v in reversed(values)]}
        self.num_stages, self.virtual_stages, self.made_for = num_stages, virtual_stages, MadeFor(AttnResConfig())
        routes = {
            mode: route_values(values, num_stages=num_stages, virtual_stages=virtual_stages, cache=cache)
            for mode, values in self.by_mode.items()
        }
        self.stages = [HandStage(model, c, count, {m: r[c] for m, r in routes.items()}) for c in range(count)]
        self.tied = (((0, "embed.weight"), (last, "head.weight")),) if model.head.weight is model.embed.weight else ()

    @property
    def values(self):
        return self.by_mode[self.stages[0].training]

    def bytes_of(self, name, rows=2, tokens=TOKENS):
        return rows * tokens * {"mask": 8, "hint": 8}.get(name, 8 * WIDTH)

    def __iter__(self):
        return iter(self.stages)

    def train(self, mode=True):
        for stage in self.stages:
            stage.train(mode)

    def shared(self, args, kwargs):
        return set()

    def flatten(self, args, kwargs):
        return [args[0], kwargs.get("scale", 1.0)]

    def unflatten(self, outputs):
        return outputs[0]

    def shapes(self, flat):
        rows = tuple(flat[0].shape)
        special = {"mask": (rows, torch.int64), "hint": ((*rows, 1), torch.float64)}
        return {v.name: special.get(v.name.rstrip("!"), ((*rows, WIDTH), torch.float64)) for v in self.values}


@dataclass(frozen=True)
class HandPlan:
    num_stages: int
    virtual_stages: int
    schedule: str
    num_microbatches: int


def loss_fn(logits, target):
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def batch(rows, seed=0, ignored=0.3, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    target = torch.randint(0, VOCABULARY, (rows, tokens), generator=generator)
    return ids, target.masked_fill(torch.rand(rows, tokens, generator=generator) < ignored, -100)


def whole(layers=8, tied=False):
    torch.manual_seed(3)
    return Whole(layers, tied).double()
