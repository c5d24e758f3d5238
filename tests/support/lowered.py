"""Graphs with and without the lowering passes: what is in them, and what they compute."""

import functools

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from attnres_fx.demo.small_gpt import GPTConfig, SmallGPT
from attnres_fx.passes import Lowering
from attnres_fx.passes.graph.operations import op_name
from tests.support.families import GPT, GROUPED, IDS, TEXT


def names(gm: GraphModule) -> list[str]:
    return [op_name(n) for n in gm.graph.nodes]


def count(gm: GraphModule, name: str) -> int:
    return names(gm).count(f"attnres_fx::{name}")


def assert_same(found, expected, tolerance=1e-6):
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = a.detach().double(), b.detach().double()
        scale = max(float(b.abs().max()), 1e-3) if b.numel() else 1.0
        worst = float((a - b).abs().max()) if b.numel() else 0.0
        assert worst <= tolerance * scale, f"value {i} differs by {worst:.3g} of {scale:.3g}"


def with_queries(converted):
    generator = torch.Generator().manual_seed(1)
    for read in converted.attnres.reads:
        nn.init.normal_(read.query, std=read.query.shape[0] ** -0.5, generator=generator)
    return converted


def run_both(converted, kwargs):
    """Outputs and gradients of the lowered and of the plain form."""
    leaves = converted.flatten_arguments(**kwargs)
    results = []
    for is_lowered in (True, False):
        converted.zero_grad()
        gm = converted.graph_module(lowered=is_lowered)
        outputs = [o for o in pytree.tree_leaves(gm(*leaves)) if isinstance(o, Tensor) and o.is_floating_point()]
        sum(o.double().sin().mean() for o in outputs).backward()
        results.append([*outputs, *(p.grad for p in converted.parameters() if p.grad is not None)])
    return results


def transformers_model(name, **options):
    """With the weights its own initialisation gives: wide ones make more of rounding than the norms undo."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(config).eval()


def fresh_gpt(layers):
    """With small weights, as those of `transformers_model`."""
    torch.manual_seed(0)
    model = SmallGPT(GPTConfig(vocabulary=96, layers=layers, heads=2, width=32, context=16)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


MODELS = {
    "llama": lambda layers=4: (transformers_model("Llama", **{**GROUPED, "num_hidden_layers": layers}), TEXT),
    "gpt2": lambda layers=4: (transformers_model("GPT2", **{**GPT, "n_layer": layers}), TEXT),
    "example": lambda layers=4: (fresh_gpt(layers), {"ids": IDS}),
}


@functools.cache
def exported(kind):
    """One of MODELS as a program with free sizes, exported once a process: that is most of what a conversion takes."""
    model, kwargs = MODELS[kind]()
    kwargs = dict(kwargs) if kind == "example" else {**kwargs, "use_cache": False}
    free = {name: {0: Dim.AUTO, 1: Dim.AUTO} if isinstance(value, Tensor) else None for name, value in kwargs.items()}
    return torch.export.export(model, (), kwargs, dynamic_shapes=free, strict=False), kwargs


D = 16
NORMS_ONLY = Lowering(fuse_partial_sums=False, two_phase=False)


def example(dtype=torch.float32):
    return torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0)).to(dtype)
