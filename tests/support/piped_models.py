"""Small models as pipelines run them: original, converted, their batches and losses."""

import torch
import torch.nn.functional as F
from torch import nn

import attnres_fx as ax
from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.partition.split.chained_model import chains_of, stages_of

VOCABULARY = 40
LENGTH = 6
ROWS = 8


def gpt():
    torch.manual_seed(0)
    return SmallGPT(GPTConfig(vocabulary=VOCABULARY, layers=4, heads=2, width=16, context=16, tied=True))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **sizes))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, **sizes))


class SharedLayer(nn.Module):
    """One layer again and again."""

    def __init__(self, sublayers=6):
        super().__init__()
        self.sublayers = sublayers
        self.embed, self.norm = nn.Embedding(VOCABULARY, 16), nn.LayerNorm(16)
        self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for _ in range(self.sublayers):
            x = x + self.layer(self.norm(x)).tanh()
        return self.head(x)


def shared():
    torch.manual_seed(0)
    return SharedLayer()


def brief():
    torch.manual_seed(0)
    return SharedLayer(2)


def batch(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    target = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    target[:3, 2:] = -100
    if isinstance(model, SmallGPT):
        return {"ids": ids}, target
    names = ("input_ids", "decoder_input_ids") if type(model).__name__.startswith("T5") else ("input_ids",)
    return {name: ids.roll(i, 1) for i, name in enumerate(names)}, target


def loss_fn(output, target):
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


_converted = {}


def convert(kind, **config):
    """A converted model with queries away from zero; the same in every process, and made once in each."""
    key = (kind, *config.items())
    if key not in _converted:
        model = globals()[kind]()
        kwargs, _ = batch(model)
        example = {n: t[:2] for n, t in kwargs.items()}
        converted = ax.convert(model, kwargs=example, config=ax.AttnResConfig(**config), check=False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in converted.attnres.named_parameters():
                if not name.endswith("key_weight"):
                    parameter.normal_(std=0.5, generator=generator)
        _converted[key] = converted.train(), kwargs, batch(model)[1]
    converted, kwargs, target = _converted[key]
    converted.zero_grad()
    return converted, kwargs, target


_chains = {}


def chains(converted, modes=("train",)):
    """`chains_of` a model that `convert` made, each mode's once in each process."""
    for mode in modes:
        if (id(converted), mode) not in _chains:
            _chains[id(converted), mode] = chains_of(converted, (mode,))[mode]
    return {mode: _chains[id(converted), mode] for mode in modes}


def cut(converted, ranks, virtual, *, cache=True, starts=None, recompute=False, modes=("train",)):
    """Stages of a model that `convert` made, with parameters of their own."""
    by_mode = chains(converted, modes)
    total = next(iter(by_mode.values())).chain.num_sublayers
    count = ranks * virtual
    stages = stages_of(
        converted,
        starts or tuple(total * c // count for c in range(count)),
        num_stages=ranks,
        virtual_stages=virtual,
        cache=cache,
        lowering=None,
        recompute=recompute,
        chains=by_mode,
    )
    return with_new_parameters(stages)


def with_new_parameters(stages):
    """The stages share the converted model's parameters: the reference must not see what a pipeline does to them."""
    copies = {}
    for stage in stages:
        for module in stage.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter not in copies:
                    copies[parameter] = nn.Parameter(parameter.detach().clone())
                    copies[copies[parameter]] = copies[parameter]  # of a module in two stages
                module._parameters[name] = copies.get(parameter)
    return stages


_cut = {}


def cut_once(converted, ranks, virtual, *, cache):
    """The same stages for every schedule, each time with new parameters: for what neither trains nor wraps them."""
    key = (id(converted), ranks, virtual, cache)
    if key not in _cut:
        _cut[key] = cut(converted, ranks, virtual, cache=cache)
    return with_new_parameters(_cut[key])
