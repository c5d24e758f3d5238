"""Small residual models that differ in one construct: what a conversion must keep, or refuse by name.

Each changes one layer's step, the whole forward, or what the model holds. `refused` is a word of the error where no
conversion can be right; everywhere else outputs, gradients and buffers must equal the original's.
"""

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8
LAYERS = 3


class Tower(nn.Module):
    """Pre-norm layers with one branch each; constructs replace `step` or `whole`."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.last = nn.LayerNorm(WIDTH)

    def branch(self, i, h):
        return self.mixes[i](self.norms[i](h)).tanh()

    def step(self, i, h):
        return h + self.branch(i, h)

    def whole(self, x):
        for i in range(LAYERS):
            x = self.step(i, x)
        return self.last(x)

    def forward(self, x):
        return self.whole(x)


@dataclass(frozen=True)
class Construct:
    """One construct: how its model is made, and the word of its refusal, if it must be refused."""

    name: str
    make: Callable[[], nn.Module]
    refused: str = ""


CONSTRUCTS: list[Construct] = []


def _add(name, refused, members, holds):
    kind = type(name.title().replace("_", ""), (Tower,), members)

    def make():
        model = kind()
        if holds is not None:
            holds(model)
        return model

    CONSTRUCTS.append(Construct(name, make, refused))


def step(refused="", holds=None):
    """The decorated function is the step of each layer: (model, i, h) -> h."""

    def add(function: Any) -> Any:
        _add(function.__name__, refused, {"step": function}, holds)
        return function

    return add


def whole(refused="", holds=None):
    """The decorated function is the whole forward: (model, x) -> outputs."""

    def add(function: Any) -> Any:
        _add(function.__name__, refused, {"whole": function}, holds)
        return function

    return add


def held(refused=""):
    """The decorated function changes a model that was just made."""

    def add(function: Any) -> Any:
        _add(function.__name__, refused, {}, function)
        return function

    return add


def buffer(name, *shape, dtype=torch.float32, persistent=True):
    """A model gets a buffer of zeros."""
    return lambda m: m.register_buffer(name, torch.zeros(shape, dtype=dtype), persistent=persistent)


# --- plain, dropout and random draws ----------------------------------------------------------------


@step()
def plain(m, i, h):
    return h + m.branch(i, h)


@step()
def functional_dropout(m, i, h):
    return h + F.dropout(m.branch(i, h), 0.5, m.training)


@step(holds=lambda m: m.add_module("drop", nn.Dropout(0.3)))
def module_dropout(m, i, h):
    return h + m.drop(m.branch(i, h))


@step()
def stochastic_depth_by_bernoulli(m, i, h):
    kept = torch.empty(h.shape[0], 1, 1).bernoulli_(0.7) / 0.7 if m.training else 1.0
    return h + m.branch(i, h) * kept


@step()
def stochastic_depth_by_rand(m, i, h):
    return h + m.branch(i, h) * torch.floor(0.7 + torch.rand((h.shape[0], 1, 1), device=h.device)) / 0.7


@step()
def noise_on_the_branch(m, i, h):
    return h + m.branch(i, h) + 0.1 * torch.randn_like(h)


@step(refused="random")
def layer_skipped_by_python_random(m, i, h):
    return h + m.branch(i, h) if random.random() < 0.5 else h


@step(refused="random")
def scale_drawn_by_python_random(m, i, h):
    return h + m.branch(i, h) * random.uniform(0.5, 1.5)


def own_generator(m):
    m.generator = torch.Generator().manual_seed(1)


@step(refused="output", holds=own_generator)
def noise_of_an_own_generator(m, i, h):
    return h + m.branch(i, h) + torch.randn(WIDTH, generator=m.generator)


@step(refused="output")
def random_state_forked(m, i, h):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return h + m.branch(i, h) + torch.randn_like(h)


# --- buffers and attributes ------------------------------------------------------------------------


@step(holds=lambda m: m.add_module("bn", nn.BatchNorm1d(WIDTH)))
def batch_norm_called_by_every_layer(m, i, h):
    return h + m.bn(m.branch(i, h).flatten(0, 1)).view_as(h)


@step(holds=buffer("mean", WIDTH))
def buffer_written_twice_in_place(m, i, h):
    m.mean.mul_(0.9).add_(h.detach().mean((0, 1)), alpha=0.1)
    return h + m.branch(i, h + m.mean)


@step(holds=buffer("mean", WIDTH))
def buffer_reassigned(m, i, h):
    m.mean = m.mean * 0.9 + h.detach().mean((0, 1)) * 0.1
    return h + m.branch(i, h + m.mean)


@step(holds=buffer("mean", WIDTH))
def buffer_copied_into(m, i, h):
    with torch.no_grad():
        m.mean.copy_(0.9 * m.mean + 0.1 * h.mean((0, 1)))
    return h + m.branch(i, h + m.mean)


@step(holds=buffer("count", dtype=torch.long))
def counter_in_a_buffer(m, i, h):
    m.count += 1
    return h + m.branch(i, h) * m.count.clone()


@step(holds=buffer("seen", LAYERS, WIDTH))
def rows_of_a_buffer_written(m, i, h):
    m.seen[i] = h.detach().mean((0, 1))
    return h + m.branch(i, h + m.seen[: i + 1].mean(0))


@step(holds=buffer("cache", LAYERS, 4, 16, WIDTH))
def key_value_cache_in_a_buffer(m, i, h):
    m.cache[i, : h.shape[0], : h.shape[1]] = h.detach()
    return h + m.branch(i, h) + m.cache[i, : h.shape[0]].mean(1, keepdim=True)


@step(holds=buffer("scratch", WIDTH, persistent=False))
def buffer_that_is_not_persistent(m, i, h):
    m.scratch.add_(1)
    return h + m.branch(i, h) * m.scratch.clone()


@step(holds=lambda m: setattr(m, "state", torch.zeros(WIDTH)))
def tensor_attribute_reassigned(m, i, h):
    m.state = 0.5 * m.state + h.detach().mean((0, 1))
    return h + m.branch(i, h + m.state)


@step(holds=lambda m: setattr(m, "kept", None))
def tensor_kept_in_an_attribute(m, i, h):
    m.kept = h
    return h + m.branch(i, h)


@step(holds=lambda m: setattr(m, "table", None))
def table_made_at_the_first_call(m, i, h):
    if m.table is None or m.table.shape[0] < h.shape[1]:
        m.table = torch.cos(torch.arange(64, dtype=torch.float32)[:, None].expand(-1, WIDTH))
    return h + m.branch(i, h * m.table[: h.shape[1]])


@step(refused="calls", holds=lambda m: setattr(m, "calls", 0))
def counter_in_python(m, i, h):
    m.calls += 1
    return h + m.branch(i, h) * (1 + 0.1 * m.calls)


@step(refused="losses", holds=lambda m: setattr(m, "losses", []))
def list_that_grows(m, i, h):
    m.losses.append(h.mean())
    return h + m.branch(i, h)


# --- gradients ---------------------------------------------------------------------------------------


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ctx.scale * (x.abs() < 2), None


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return -grad


class _TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        large = x.abs() > 0.5
        ctx.mark_non_differentiable(large)
        return x.sign(), large

    @staticmethod
    def backward(ctx, grad, _):
        return 0.3 * grad


@step()
def straight_through_rounding(m, i, h):
    return h + _Round.apply(m.branch(i, h) * 3, 0.5)


@step()
def gradient_reversal(m, i, h):
    return h + _Reverse.apply(m.branch(i, h))


@step()
def function_with_an_output_without_gradient(m, i, h):
    value, large = _TwoOutputs.apply(m.branch(i, h))
    return h + value * large


@step()
def function_on_the_stream(m, i, h):
    return _Round.apply(h + m.branch(i, h), 0.5)


@step()
def straight_through_sum(m, i, h):
    y = m.branch(i, h)
    return h + y + (y.round() - y).detach()


@step()
def hook_on_a_hidden_tensor(m, i, h):
    y = m.branch(i, h)
    if y.requires_grad:
        y.register_hook(lambda grad: 0.1 * grad)
    return h + y


@held(refused="hook")
def backward_hooks_of_modules(m):
    for mix in m.mixes:
        mix.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 0.5,))


@held()
def forward_hooks_of_modules(m):
    for mix in m.mixes:
        mix.register_forward_hook(lambda module, args, output: output * 0.5)


@held()
def forward_pre_hooks_of_modules(m):
    for mix in m.mixes:
        mix.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


@step()
def no_grad_branch(m, i, h):
    with torch.no_grad():
        y = m.branch(i, h)
    return h + m.branch(i, h) + y


@step()
def no_grad_on_the_stream(m, i, h):
    with torch.no_grad():
        h = h + m.branch(i, h)
    return h + m.branch(i, h)


@whole()
def no_grad_forward(m, x):
    with torch.no_grad():
        return Tower.whole(m, x)


@step()
def inference_mode_branch(m, i, h):
    with torch.inference_mode():
        y = m.branch(i, h)
    return h + m.branch(i, h) + y.clone()


@whole()
def inference_mode_forward(m, x):
    with torch.inference_mode():
        return Tower.whole(m, x)


@step()
def detached_stream(m, i, h):
    return h.detach() + m.branch(i, h)


@step()
def detached_branch_input(m, i, h):
    return h + m.branch(i, h.detach())


@step()
def scaled_gradient_of_a_branch(m, i, h):
    y = m.branch(i, h)
    return h + 0.2 * y + 0.8 * y.detach()


@step()
def checkpointed_branch(m, i, h):
    return h + checkpoint(m.branch, i, h, use_reentrant=False)


@step()
def checkpointed_branch_with_dropout(m, i, h):
    return h + checkpoint(lambda a: F.dropout(m.branch(i, a), 0.5, m.training), h, use_reentrant=False)


@step()
def checkpointed_layer(m, i, h):
    return checkpoint(lambda a: a + m.branch(i, a), h, use_reentrant=False)


@step()
def checkpointed_layer_with_dropout(m, i, h):
    return checkpoint(lambda a: a + F.dropout(m.branch(i, a), 0.5, m.training), h, use_reentrant=False)


@whole()
def reentrant_checkpoint(m, x):
    x = m.mixes[0](x)  # a reentrant checkpoint has gradients only where its input has one
    for i in range(LAYERS):
        x = x + checkpoint(m.branch, i, x, use_reentrant=True)
    return m.last(x)


@held()
def frozen_parameters(m):
    m.mixes[1].requires_grad_(False)


@held()
def frozen_and_tied(m):
    m.mixes[2].weight = m.mixes[0].weight
    m.norms[0].requires_grad_(False)


# --- writes in place -----------------------------------------------------------------------------------


@step()
def added_in_place(m, i, h):
    return h.clone().add_(m.branch(i, h))


@step()
def added_in_place_by_the_operator(m, i, h):
    y = m.branch(i, h)
    h = h * 1
    h += y
    return h


@step()
def written_over_whole(m, i, h):
    out = torch.empty_like(h)
    out[:] = m.branch(i, h)
    return h + out


@step()
def copied_into_a_fresh_tensor(m, i, h):
    out = torch.zeros_like(h)
    out.copy_(m.branch(i, h))
    return h + out


@step()
def slice_written(m, i, h):
    y = m.branch(i, h)
    z = y.clone()
    z[:, 1:] = y[:, 1:] * 2
    return h + z


@step()
def masked_fill_in_place(m, i, h):
    y = m.branch(i, h) * 1
    y.masked_fill_(y > 0.5, 0.25)
    return h + y


@step()
def activation_in_place(m, i, h):
    return h + F.relu(m.mixes[i](m.norms[i](h)), inplace=True)


# --- dtypes, modes and contexts ------------------------------------------------------------------------


@step()
def autocast_branch(m, i, h):
    with torch.autocast("cpu", torch.bfloat16):
        y = m.branch(i, h)
    return h + y.float()


@step()
def double_branch(m, i, h):
    return h + F.linear(m.norms[i](h).double(), m.mixes[i].weight.double()).to(h.dtype)


@step()
def attention_backend_chosen(m, i, h):
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        q = m.norms[i](h)[:, None]
        return h + m.mixes[i](F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0])


@step()
def profiled_region(m, i, h):
    with torch.profiler.record_function("layer"):
        return h + m.branch(i, h)


@step()
def null_context(m, i, h):
    with contextlib.nullcontext():
        return h + m.branch(i, h)


@step()
def print_in_forward(m, i, h):
    print("", end="")
    return h + m.branch(i, h)


@step()
def depends_on_the_mode(m, i, h):
    return h + m.branch(i, h) * (2 if m.training else 1)


@step()
def depends_on_the_length(m, i, h):
    return h + m.branch(i, h) * (2 if h.shape[1] > 6 else 1)


@step()
def depends_on_an_even_batch(m, i, h):
    return h + m.branch(i, h) * (2 if h.shape[0] % 2 == 0 else 1)


@step(refused="data-dependent")
def depends_on_the_data(m, i, h):
    return h + m.branch(i, h) if h.sum() > 0 else h - m.branch(i, h)


# --- control flow and transforms -------------------------------------------------------------------------


@step()
def vmapped_function(m, i, h):
    y = m.branch(i, h)
    return h + torch.vmap(lambda row: row * row.mean())(y)


@step()
def derivative_inside(m, i, h):
    return h + m.branch(i, h) + 0.1 * torch.func.grad(lambda a: a.sin().sum())(h)


@step()
def data_dependent_rows(m, i, h):
    y = m.branch(i, h).flatten(0, 1)
    rows = (y.sum(-1) > 0).nonzero()[:, 0]
    return h + torch.zeros_like(y).index_add(0, rows, y[rows]).view_as(h)


@step()
def function_of_another_module(m, i, h):
    return h + torch.func.functional_call(m.mixes[i], {"weight": m.mixes[i].weight * 2, "bias": m.mixes[i].bias}, (h,))


# --- what the model holds and returns ----------------------------------------------------------------------


@held()
def tied_layers(m):
    m.mixes[1] = m.mixes[0]


@held()
def weight_norm(m):
    for mix in m.mixes:
        nn.utils.parametrizations.weight_norm(mix)


@held()
def spectral_norm(m):
    for mix in m.mixes:
        nn.utils.parametrizations.spectral_norm(mix)


@held()
def orthogonal_weights(m):
    nn.utils.parametrizations.orthogonal(m.mixes[0])


@held()
def modules_in_a_plain_list(m):
    m.also = list(m.mixes)
    m.branch_of = [m.branch]


@whole(holds=lambda m: setattr(m, "scales", {"a": torch.tensor(0.5), "b": [torch.tensor(2.0)]}))
def tensors_in_plain_containers(m, x):
    for i in range(LAYERS):
        x = x + m.branch(i, x) * m.scales["a"] * m.scales["b"][0]
    return m.last(x)


@whole()
def dictionary_of_outputs(m, x):
    return {"y": Tower.whole(m, x), "number": 3, "list": [x * 2, None]}


@whole()
def sizes_among_the_outputs(m, x):
    return Tower.whole(m, x), x.shape[1]


@whole()
def input_among_the_outputs(m, x):
    return Tower.whole(m, x), x


@whole()
def parameter_among_the_outputs(m, x):
    return Tower.whole(m, x), m.mixes[0].weight


@whole()
def one_tensor_twice_among_the_outputs(m, x):
    y = Tower.whole(m, x)
    return y, {"again": y}


@whole()
def hidden_states_among_the_outputs(m, x):
    states = [x]
    for i in range(LAYERS):
        x = m.step(i, x)
        states.append(x)
    return m.last(x), tuple(states)
