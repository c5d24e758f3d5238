"""torch.func on converted models: per-sample gradients, ensembles of query sets, Jacobians."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

import attnres_fx as ax
from tests.support.families import FAMILIES, IDS


@pytest.fixture(scope="module")
def converted():
    model, kwargs, _ = FAMILIES["gpt2"]()
    made = ax.convert(model.double(), kwargs=kwargs, config=ax.AttnResConfig(variant="block", num_blocks=2))
    for read in made.attnres.reads:
        torch.nn.init.normal_(read.query, std=0.5)
    return made


def queries_of(model):
    return {n: p.detach() for n, p in model.named_parameters() if n.startswith("attnres.")}


def loss(model, parameters, ids):
    return functional_call(model, parameters, (ids,)).logits.square().mean()


@pytest.mark.slow
def test_functional_call_and_grad_give_what_backward_gives(converted):
    found = grad(lambda p: loss(converted, p, IDS))(queries_of(converted))
    converted.zero_grad()
    converted(IDS).logits.square().mean().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, converted.get_parameter(name).grad)


@pytest.mark.slow
def test_per_sample_gradients_of_the_queries_are_those_of_one_sample_at_a_time(converted):
    parameters = queries_of(converted)
    one = grad(lambda p, ids: loss(converted, p, ids[None]))
    found = vmap(one, in_dims=(None, 0), randomness="different")(parameters, IDS)
    for name, gradients in found.items():
        assert gradients.shape == (2, *parameters[name].shape)
        for i, gradient in enumerate(gradients):
            torch.testing.assert_close(gradient, one(parameters, IDS[i])[name])


def test_an_ensemble_of_query_sets_over_one_model_is_the_loop_over_them(converted):
    sets = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        sets.append({n: torch.randn(p.shape, generator=generator).to(p) for n, p in queries_of(converted).items()})
    stacked = {n: torch.stack([s[n] for s in sets]) for n in sets[0]}
    found = vmap(lambda p: functional_call(converted, p, (IDS,)).logits)(stacked)
    for one, logits in zip(sets, found, strict=True):
        torch.testing.assert_close(logits, functional_call(converted, one, (IDS,)).logits)


def test_jacobians_of_an_output_in_a_query_match_finite_differences(converted):
    name = next(iter(queries_of(converted)))
    query = converted.get_parameter(name).detach()

    def output(q):
        return functional_call(converted, {name: q}, (IDS,)).logits[0, -1, :3]

    jacobian = jacrev(output)(query)
    assert jacobian.shape == (3, *query.shape)
    step = torch.zeros_like(query)
    step[5] = 1e-6
    difference = (output(query + step) - output(query - step)) / 2e-6
    torch.testing.assert_close(jacobian[:, 5], difference, rtol=1e-5, atol=1e-8)


def test_states_of_several_converted_models_stack(converted):
    import copy

    others = [copy.deepcopy(converted) for _ in range(2)]
    parameters, buffers = stack_module_state(others)
    found = vmap(lambda p, b: functional_call(converted, (p, b), (IDS,)).logits)(parameters, buffers)
    torch.testing.assert_close(found[0], converted(IDS).logits)
