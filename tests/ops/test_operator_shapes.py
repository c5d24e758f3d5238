"""Depth attention of tensors without data: the same shapes as the definition's, without its operations."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

import attnres_fx.ops.operator as operator
from attnres_fx.ops.read_tensors import read_of
from attnres_fx.ops.reference import definition

SHAPES = [(2, 3, 8), (1, 3, 8), (2, 1, 8), (2, 0, 8), (8,), (2, 2, 3, 4, 8)]


def looks(tensor):
    sizes = [int(s) for s in (*tensor.shape, *tensor.stride())]
    return sizes, tensor.dtype, tensor.device, tensor.requires_grad, type(tensor)


def read_of_fakes(shape, dtypes, mode, context=None, transposed=False):
    def fake(*sizes, dtype=torch.float32, free=None):
        made = torch.randn(*sizes, dtype=dtype)
        made = made.transpose(0, 1).contiguous().transpose(0, 1) if transposed and len(sizes) > 1 else made
        return mode.from_tensor(made.requires_grad_(), symbolic_context=free)

    return [fake(*shape, dtype=d, free=context) for d in dtypes], fake(shape[-1]), fake(shape[-1])


def both(sources, query, key_weight):
    """Results and gradients of the operator and of the definition."""
    for run in (operator.DEPTH_ATTENTION, lambda *read: definition(*read_of(*read))):
        result = run(sources, query, key_weight, 1e-6, 2.0)
        gradients = torch.autograd.grad(result.sum(), [*sources, query, key_weight])
        yield [looks(t) for t in (result, *gradients)]


@pytest.fixture
def never_run(monkeypatch):
    monkeypatch.setattr(operator, "definition", lambda *a: pytest.fail("the definition was run"))


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32), (torch.bfloat16,)])
@pytest.mark.slow_after(6)
def test_a_read_without_data_has_the_shapes_of_the_definition(never_run, dtypes, free):
    for shape in SHAPES:
        mode = FakeTensorMode(shape_env=ShapeEnv() if free else None)
        sizes = [DimDynamic.DYNAMIC] * (len(shape) - 1) + [DimDynamic.STATIC]
        context = StatelessSymbolicContext(dynamic_sizes=sizes) if free else None
        with mode:
            found, wanted = both(*read_of_fakes(shape, dtypes, mode, context))
        assert found == wanted, shape


def test_sources_of_another_layout_take_the_definition():
    mode = FakeTensorMode()
    with mode:
        found, wanted = both(*read_of_fakes((2, 3, 8), (torch.float32,) * 2, mode, transposed=True))
    assert found == wanted
    assert found[0][0][3:] != [24, 8, 1]


def test_gradients_of_gradients_have_shapes_too(never_run):
    mode = FakeTensorMode()
    with mode:
        sources, query, key_weight = read_of_fakes((2, 3, 8), (torch.float32,) * 2, mode)
        result = operator.DEPTH_ATTENTION(sources, query, key_weight, 1e-6, 1.0)
        (first,) = torch.autograd.grad(result.sum(), query, create_graph=True)
        second = torch.autograd.grad(first.sum(), sources)
    assert [s.shape for s in second] == [s.shape for s in sources]


def test_a_mode_that_watches_sees_every_operation():
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    mode = FakeTensorMode()
    with mode:
        read = read_of_fakes((2, 3, 8), (torch.float32,) * 2, mode)
        with Watching():
            operator.DEPTH_ATTENTION(*read, 1e-6, 1.0)
    assert torch.ops.aten.rsqrt.default in seen
