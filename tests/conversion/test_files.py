"""A converted model in a file that stands alone: what goes in comes out."""

import pickle

import pytest
import torch

import attnres_fx as ax
from attnres_fx.errors import ArgumentError
from attnres_fx.passes import Lowering
from tests.support.constructs import CONSTRUCTS, WIDTH
from tests.support.damaged_files import described
from tests.support.families import FAMILIES
from tests.support.saved_models import Tower, assert_same_steps, converted, loaded, saved

KEPT = [
    "module_dropout",
    "batch_norm_called_by_every_layer",
    "rows_of_a_buffer_written",
    "buffer_reassigned",
    "table_made_at_the_first_call",
    "tensor_attribute_reassigned",
    "straight_through_rounding",
    "function_with_an_output_without_gradient",
    "function_on_the_stream",
    "hook_on_a_hidden_tensor",
    "inference_mode_branch",
    "no_grad_branch",
    "checkpointed_layer_with_dropout",
    "autocast_branch",
    "attention_backend_chosen",
    "vmapped_function",
    "derivative_inside",
    "data_dependent_rows",
    "weight_norm",
    "tied_layers",
    "frozen_and_tied",
    "dictionary_of_outputs",
    "sizes_among_the_outputs",
    "hidden_states_among_the_outputs",
]


@pytest.mark.parametrize("name", KEPT)
def test_a_loaded_model_computes_outputs_gradients_and_buffers_to_the_bit(name):
    construct = next(c for c in CONSTRUCTS if c.name == name)
    torch.manual_seed(0)
    one = converted(construct.make(), torch.randn(2, 5, WIDTH))
    calls = [((torch.randn(shape),), {}) for shape in ((2, 5, WIDTH), (3, 7, WIDTH), (2, 5, WIDTH))]
    assert_same_steps(one, loaded(one), calls)


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "in place", "encoder, norm last"])
@pytest.mark.slow
def test_a_loaded_family_is_the_model_that_was_saved(name):
    model, kwargs, _ = FAMILIES[name]()
    one = converted(model, **kwargs)
    two = loaded(one)
    assert two.report == one.report
    assert list(two.state_dict()) == list(one.state_dict())
    assert type(two(**kwargs)) is type(one(**kwargs))
    for mode in one.every_program():
        assert str(two.graph_module(mode).graph) == str(one.graph_module(mode).graph)
        assert two.programs[mode].lowered.passes == one.programs[mode].lowered.passes
    assert_same_steps(one, two, [((), kwargs)])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["program", "module", "trace"])
def test_models_made_from_graphs_are_saved_with_the_checks_of_their_sizes(kind, train):
    class Halves(Tower):
        def branch(self, i, h):
            return self.mixes[i](h.view(h.shape[0], h.shape[1] // 2, 2, 8).flatten(1, 2))

    model, x = (Tower() if kind == "trace" else Halves()).train(train), torch.randn(3, 6, 8)
    if kind == "trace":
        graph = torch.fx.symbolic_trace(model)
    else:
        free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
        graph = torch.export.export(model, (x,), dynamic_shapes=(free,), strict=False)
        graph = graph.module() if kind == "module" else graph
    one = converted(graph, x)
    two = loaded(one)
    for shape in ((3, 6, 8), (2, 8, 8)):
        torch.testing.assert_close(two(torch.ones(shape)), one(torch.ones(shape)))
    if kind != "trace":
        for model in (one, two):
            with pytest.raises(ArgumentError, match="does not hold for arguments of these sizes"):
                model(torch.randn(3, 7, 8))


@pytest.mark.slow
def test_further_kinds_of_calls_are_saved_too():
    class Masked(Tower):
        def forward(self, x, mask=None):
            return super().forward(x if mask is None else x * mask)

    one, x, mask = converted(Masked().eval(), torch.randn(2, 5, 8)), torch.randn(2, 5, 8), torch.rand(2, 5, 1)
    one(x, mask)
    two = loaded(one)
    assert torch.equal(two(x), one(x))
    assert torch.equal(two(x, mask), one(x, mask))
    with pytest.raises(ArgumentError):
        two(x, mask=3.0)


@pytest.mark.slow
def test_a_loaded_model_is_saved_and_pickled_like_the_first():
    one = converted(Tower(), torch.randn(2, 5, 8))
    data = saved(one)
    assert described(saved(loaded(one))) == described(data)
    x = torch.randn(3, 4, 8)
    assert torch.equal(pickle.loads(pickle.dumps(one))(x), one(x))


def test_tensors_that_share_memory_share_it_after_loading():
    class Shared(Tower):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(4, 8))
            self.register_buffer("row", self.table[1])
            self.register_buffer("column", self.table.t()[2])
            self.register_buffer("twin", self.table, persistent=False)

        def branch(self, i, h):
            return self.mixes[i](h) + self.row + self.column.sum() + self.twin[0]

    one = converted(Shared(), torch.randn(2, 5, 8))
    two = loaded(one)
    assert two.twin is two.table
    two.table.zero_()
    assert not two.row.any()
    assert not two.column.any()
    assert two.column.stride() == one.column.stride()
    assert "twin" not in two.state_dict()


@pytest.mark.slow
def test_dtypes_devices_and_requires_grad_come_back():
    model = Tower().to(torch.bfloat16)
    model.mixes[1].weight.requires_grad_(False)
    one = converted(model, torch.randn(2, 5, 8, dtype=torch.bfloat16))
    two = loaded(one)
    for (n, a), (m, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert (n, a.dtype, a.requires_grad) == (m, b.dtype, b.requires_grad)
        assert torch.equal(a, b)
    on_meta = loaded(one, map_location="meta")
    with pytest.raises(ax.errors.SaveError, match="map_location='cudda' is no device"):
        loaded(one, map_location="cudda")
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    assert on_meta(torch.empty(2, 5, 8, dtype=torch.bfloat16, device="meta")).shape == (2, 5, 8)
    with torch.device("meta"):
        shapes = ax.convert(Tower(), (torch.empty(2, 5, 8),))
    assert loaded(shapes)(torch.empty(4, 6, 8, device="meta")).shape == (4, 6, 8)


def test_how_calls_run_comes_back():
    one = ax.convert(Tower(), (torch.randn(2, 5, 8),), check=False, lowering=Lowering(fuse_norms=False))
    assert loaded(one).lowering == one.lowering
