"""One model through every way in, compared with the original over steps and sizes: outputs, gradients, state."""

import copy

import torch
from torch import nn

import attnres_fx as ax

WIDTH = 8
WAYS = ("module", "symbolic trace", "export", "backend")


class Program(nn.Module):
    """Layers, and tensors that a forward may write to; what it computes is `program(module, x)`."""

    def __init__(self, program):
        super().__init__()
        self.program = program
        self.inp, self.extra = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.mixes = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("ema", torch.zeros(WIDTH))
        self.register_buffer("decay", torch.ones(WIDTH) * 0.9)
        self.register_buffer("table", torch.zeros(4, WIDTH))
        self.register_buffer("memory", torch.linspace(-0.1, 0.1, WIDTH).reshape(1, 1, WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.slow = nn.Parameter(torch.ones(WIDTH) * 0.5)
        self.plain = torch.ones(WIDTH)

    def branch(self, i, x):
        return self.mixes[i](self.norms[i](x))

    def forward(self, x):
        return self.program(self, x)


def converted(model, way, config):
    """The model to compare with (a symbolic trace may hold less than its module) and what came out of a way in."""
    x = torch.randn(2, 5, WIDTH)
    if way == "backend":
        original = copy.deepcopy(model)
        ax.compile(model, (x,), config=config, inner="eager")
        return original, model
    if way == "symbolic trace":
        model = torch.fx.symbolic_trace(model)
    original = copy.deepcopy(model)
    if way == "export":
        sizes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
        model = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=False)
        return original, ax.convert(model, (x,), config=config, check=False)
    # The library's own comparison is off: this one stands in its place.
    return original, ax.convert(model, (x,), config=config, check=False).train()


def differences(program, way, variant="full"):
    """The largest relative differences of outputs, gradients and buffers over three steps, and the converted model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    original, found = converted(Program(program).train(), way, ax.AttnResConfig(variant=variant))
    worst = {}
    for step, (batch, length) in enumerate([(2, 5), (3, 4), (2, 5)]):
        x = torch.randn(batch, length, WIDTH)
        expected, got = _step(original, x, step), _step(found, x, step)
        for kind, values in expected.items():
            scale = max((v.abs().max() for v in values.values() if v.numel()), default=torch.ones(())) + 1e-9
            for name, value in values.items():
                other = got[kind].get(name, torch.zeros(()))
                off = ((value - other).abs().max() / scale).item()
                worst[kind] = max(worst.get(kind, (0.0, "")), (off, name))
    return worst, found


def _step(model, x, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    (output * torch.arange(1.0, WIDTH + 1)).square().sum().backward()
    names = [n for n, _ in model.named_parameters() if not n.startswith("attnres.")]
    parameters = dict(model.named_parameters())
    gradients = {n: torch.zeros(()) if parameters[n].grad is None else parameters[n].grad.clone() for n in names}
    buffers = {n: b.detach().double() for n, b in model.named_buffers()}
    return {
        "output": {"": output.detach()},
        "gradient": {**gradients, "x": torch.zeros(()) if x.grad is None else x.grad},
        "buffer": buffers,
    }


def check_same(program, way, variant="full"):
    """Outputs to 1e-5, gradients to 1e-4 and buffers to 1e-6 as the original's; returns the converted model."""
    worst, found = differences(program, way, variant)
    allowed = {"output": 1e-5, "gradient": 1e-4, "buffer": 1e-6}
    assert all(worst[kind][0] <= allowed[kind] for kind in worst), worst
    return found
