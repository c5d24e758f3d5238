"""What an operator may know of who is looking: this thread's tracers, and no other's."""

import threading

import torch
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified

from attnres_fx.ops.dispatch import is_traced


class Asks(nn.Module):
    def forward(self, x):
        return x + 1 if is_traced() else x


def test_a_thread_is_not_traced_because_another_one_is():
    answers = []

    def backend(gm, _):
        thread = threading.Thread(target=lambda: answers.append((torch.compiler.is_compiling(), is_traced())))
        thread.start()
        thread.join()
        return gm

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert answers == [(True, False)]
    assert not is_traced()


def test_every_tracer_of_this_thread_is_seen():
    x = torch.ones(2)
    assert torch.equal(torch.compile(Asks(), backend="eager")(x), x + 1)
    for strict in (True, False):
        assert torch.equal(torch.export.export(Asks(), (x,), strict=strict).module()(x), x + 1)

    answers = []

    def backend(gm, inputs):
        def inner(traced, _):
            answers.append(is_traced())
            return traced

        return aot_module_simplified(gm, inputs, fw_compiler=inner)

    torch.compile(lambda x: x + 1, backend=backend)(x)
    assert answers == [True]
