"""States know the config that they were made with: on every way into a model another one is refused by name."""

import copy
import functools
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import attnres_fx as ax
from attnres_fx.errors import ConfigError, SaveError
from attnres_fx.partition.checkpoint import load_checkpoint, save_checkpoint
from attnres_fx.state_config import MadeFor, StreamBlocks, shown_config
from tests.conversion.test_adapter import CONFIG, Tower, X, attached, converted, parameters, trained

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

OTHERS = [
    ax.AttnResConfig(variant="full"),
    ax.AttnResConfig(variant="local", block_size=2),
    ax.AttnResConfig(block_size=1),
    ax.AttnResConfig(block_size=2, eps=1e-4),
    ax.AttnResConfig(block_size=2, output="mean"),
]
OTHER = ax.AttnResConfig(block_size=3)
SAME_BLOCKS = [ax.AttnResConfig(num_blocks=2), ax.AttnResConfig(boundaries=[2])]


@functools.cache
def state_of(config):
    return trained(converted(config=config)).state_dict()


@functools.cache
def unchanged(make):
    return make()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("make", [converted, attached])
@pytest.mark.parametrize("config", OTHERS, ids=str)
def test_a_state_of_another_config_is_refused_and_leaves_the_model_as_it_was(config, make, strict):
    state, model = state_of(config), unchanged(make)
    before, about = parameters(model), getattr(model.attnres, "abouts", None)
    with pytest.raises(ConfigError) as caught:
        model.load_state_dict(state, strict=strict)
    assert f"made with {shown_config(config)}, and this model with {shown_config(CONFIG)}" in str(caught.value)
    torch.testing.assert_close(parameters(model), before, rtol=0, atol=0)
    assert model.attnres.config == CONFIG
    assert getattr(model.attnres, "abouts", None) == about


@pytest.mark.parametrize("make", [converted, attached])
def test_a_state_of_the_same_config_loads_also_where_the_model_is_a_part(make):
    one, two = trained(make()), make()
    whole = nn.ModuleDict({"first": nn.Linear(2, 2), "model": two})
    state = {f"model.{n}": t for n, t in one.state_dict().items()}
    assert set(whole.load_state_dict(state, strict=False).missing_keys) == {"first.weight", "first.bias"}
    torch.testing.assert_close(parameters(two), parameters(one), rtol=0, atol=0)
    other = {f"model.{n}": t for n, t in state_of(OTHERS[0]).items()}
    with pytest.raises(ConfigError, match="variant='full'"):
        whole.load_state_dict(other, strict=False)


class Lit(nn.Module):
    """What Lightning's `load_from_checkpoint` does: it makes the module anew, and loads with `strict`."""

    def __init__(self):
        super().__init__()
        self.model = copy.deepcopy(unchanged(converted))

    @classmethod
    def load_from_checkpoint(cls, path, strict):
        made = cls()
        made.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=strict)
        return made


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoints_of_trainers_that_wrap_the_model(tmp_path, strict):
    for config, says in ((OTHER, "block_size=3"), (CONFIG, None)):
        torch.save({"state_dict": {f"model.{n}": t for n, t in state_of(config).items()}}, tmp_path / "last.ckpt")
        if says is None:
            assert torch.equal(Lit.load_from_checkpoint(tmp_path / "last.ckpt", strict).model(X), answer_of_lit())
            continue
        with pytest.raises(ConfigError, match=says):
            Lit.load_from_checkpoint(tmp_path / "last.ckpt", strict)


def answer_of_lit():
    model = copy.deepcopy(unchanged(converted))
    model.load_state_dict(state_of(CONFIG))
    return model(X)


def test_wrappers_of_torch_compare_too():
    model = copy.deepcopy(unchanged(converted))
    compiled = torch.compile(model)
    with pytest.raises(ConfigError, match="block_size=3"):
        compiled.load_state_dict({f"_orig_mod.{n}": t for n, t in state_of(OTHER).items()}, strict=False)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    with pytest.raises(ConfigError, match="block_size=3"):
        averaged.load_state_dict({f"module.{n}": t for n, t in state_of(OTHER).items()}, strict=False)
    with pytest.raises(ConfigError, match="block_size=3"):
        model.load_state_dict(state_of(OTHER), strict=False, assign=True)
    with pytest.raises(ConfigError, match="block_size=3"):
        set_model_state_dict(model, get_model_state_dict(trained(converted(config=OTHER))))


# --- torch.distributed.checkpoint, which writes into the tensors of state_dict() ---------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("dcp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config in (("other", OTHER), ("same", CONFIG), ("equal", SAME_BLOCKS[0])):
            dcp.save(state_of(config), checkpoint_id=place / name)
    return place


@pytest.mark.parametrize("make", [converted, attached])
def test_values_that_were_loaded_in_place_are_noticed_by_all_that_uses_them(folders, tmp_path, make):
    model = make()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folders / "other")
    if make is attached:
        ax.compile(model, (X,), config=CONFIG, inner="eager")
    uses = [lambda: model(X), lambda: ax.save_adapter(copy.deepcopy(model), tmp_path / "a")]
    if make is converted:
        uses += [lambda: copy.deepcopy(model)(X), lambda: model.save(tmp_path / "model")]
    for use in (*uses, lambda: model.load_state_dict(state)):
        with pytest.raises(ConfigError, match=r"block_size=3.*block_size=2"):
            use()
    assert not list(tmp_path.iterdir())
    dcp.load(state, checkpoint_id=folders / "equal")
    model.load_state_dict(state)
    for use in uses:
        use()


def test_a_model_given_as_a_whole_is_compared_when_it_is_loaded(folders):
    model = copy.deepcopy(unchanged(converted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": trained(converted(config=OTHER))}, checkpoint_id=folders / "whole")
    with pytest.raises(ConfigError, match="block_size=3"):
        dcp.load({"model": model}, checkpoint_id=folders / "whole")


def test_a_checkpoint_of_a_whole_model_is_compared(tmp_path):
    save_checkpoint(tmp_path / "c", trained(converted(config=OTHER)))
    with pytest.raises(ConfigError, match="block_size=3"):
        load_checkpoint(tmp_path / "c", copy.deepcopy(unchanged(converted)))


def test_averages_of_states_leave_a_model_its_config():
    model = copy.deepcopy(unchanged(converted))
    for value in model.state_dict().values():  # as many EMA loops do
        value.copy_(value * 0.9998 + value * 0.0001)
    assert model(X).shape == X.shape
    model.load_state_dict(model.state_dict())
    assert MadeFor.from_tensor(model.state_dict()["attnres._extra_state"]) == model.attnres.made_for


# --- what means the same -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", SAME_BLOCKS, ids=str)
def test_equal_blocks_are_equal_however_they_were_asked_for(config, tmp_path):
    one, two = trained(converted(config=config)), copy.deepcopy(unchanged(converted))
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(X), one(X))
    assert two.attnres.config == CONFIG
    three = attached()
    ax.save_adapter(one, tmp_path)
    ax.load_adapter(three, tmp_path)
    assert torch.equal(three.attnres.reads[0].query, one.attnres.reads[0].query)


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("config", [ax.AttnResConfig(block_size=1), ax.AttnResConfig(variant="local", num_blocks=1)])
def test_a_variant_that_means_the_same_is_converted_by_one_call(config, post):
    base = Tower(post=post).eval()
    one, full = trained(converted(base, config)), converted(base, ax.AttnResConfig(variant="full"))
    with pytest.raises(ConfigError, match=r"convert_state\(state, model\)"):
        full.load_state_dict(one.state_dict())
    full.load_state_dict(ax.convert_state(one.state_dict(), full))
    torch.testing.assert_close(full(X), one(X))
    one.load_state_dict(ax.convert_state(full.state_dict(), one))
    wrapped = nn.ModuleDict({"model": one})
    wrapped.load_state_dict(ax.convert_state({f"model.{n}": t for n, t in full.state_dict().items()}, wrapped))


def test_what_cannot_be_converted_is_named():
    model = unchanged(converted)
    for config in OTHERS:
        with pytest.raises(ConfigError, match="no state of the one"):
            ax.convert_state(state_of(config), model)
    with pytest.raises(ConfigError, match="says what it was made for"):
        ax.convert_state({}, model)
    with pytest.raises(ConfigError, match="no attnres parameters"):
        ax.convert_state({}, Tower())


def test_the_default_blocks_of_a_longer_model_are_other_blocks():
    """ceil(L / 8) sublayers each: the options are the same, and the sources of the reads are not."""
    config = ax.AttnResConfig()
    short = MadeFor(config, (StreamBlocks("stream", tuple(range(8)), 8),))
    long = MadeFor(config, (StreamBlocks("stream", tuple(range(0, 16, 2)), 16),))
    assert short.differences(long) == ["blocks"]
    assert not short.differences(MadeFor(config, (StreamBlocks("stream", tuple(range(9)), 9),)))


def test_a_state_without_its_config_gets_a_warning():
    state = {n: t for n, t in state_of(CONFIG).items() if not n.endswith("_extra_state")}
    with pytest.warns(UserWarning, match="the config they were made with"):
        copy.deepcopy(unchanged(converted)).load_state_dict(state, strict=False)


def test_the_tensors_of_an_adapter_carry_the_config(tmp_path):
    from safetensors.torch import load_file

    ax.save_adapter(trained(converted(config=OTHER)), tmp_path)
    with pytest.raises(ConfigError, match="block_size=3"):
        attached().load_state_dict(load_file(tmp_path / "attnres.safetensors"), strict=False)
    with pytest.raises(SaveError, match="block_size differs"):
        ax.load_adapter(attached(), tmp_path)
