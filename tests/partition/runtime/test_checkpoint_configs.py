"""A checkpoint of a pipeline or a model says which config it was made with; another one is refused, nothing changed."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import ConfigError
from attnres_fx.partition.checkpoint import load_checkpoint, save_checkpoint
from attnres_fx.partition.runtime import build_pipeline


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=True):
            x = x + mix(norm(x))
        return x


X = torch.randn(2, 2, 4)
MADE = {"variant": "block", "block_size": 2}
OTHERS = {
    "variant": {"variant": "local", "block_size": 2},
    "block_size": {"variant": "block", "block_size": 1},
    "output": {**MADE, "output": "mean"},
    "eps": {**MADE, "eps": 1e-3},
}


@functools.cache
def converted(**options):
    return ax.convert(Tower(), (X,), config=ax.AttnResConfig(**options), check=False, dynamic_shapes={})


@pytest.fixture
def pipelines(tmp_path):
    """What builds a pipeline of one rank for a config."""

    def build(**options):
        model = converted(**options)
        plan = ax.plan(model, (X,), num_stages=1, num_microbatches=1)
        stages = ax.build_stages(model, plan)
        return build_pipeline(stages, plan, loss_fn=lambda x, _: x.sum(), compile=False)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield build
    finally:
        dist.destroy_process_group()


def values(holder):
    return {n: v.clone() for n, v in holder.state_dict().items()}


def changed_(holder, by):
    with torch.no_grad():
        for p in holder.parameters():
            p.add_(by)
    return values(holder)


def same(found, wanted):
    assert wanted.keys() == found.keys()
    return all(torch.equal(v, wanted[n]) for n, v in found.items())


@pytest.mark.slow
def test_a_model_takes_no_checkpoint_of_a_pipeline_of_another_config(pipelines, tmp_path):
    pipeline = pipelines(**MADE)
    changed_(pipeline, 0.1)
    pipeline.save(tmp_path / "c")
    for said, options in OTHERS.items():
        other = converted(**options)
        before = values(other)
        with pytest.raises(ConfigError, match=rf"another function \({said}\).*Nothing was changed"):
            load_checkpoint(tmp_path / "c", other)
        assert same(values(other), before)


@pytest.mark.slow
def test_a_pipeline_takes_checkpoints_of_its_own_config_alone_and_of_what_means_the_same(pipelines, tmp_path):
    one_each, full = pipelines(variant="block", block_size=1), pipelines(variant="full")
    wanted = changed_(one_each, 0.2)
    save_checkpoint(tmp_path / "other", converted(**MADE))
    with pytest.raises(ConfigError, match=r"block_size=2.*block_size=1"):
        one_each.load(tmp_path / "other")
    assert same(values(one_each), wanted)
    one_each.save(tmp_path / "own")
    changed_(one_each, 0.3)
    for pipeline in (one_each, full):
        pipeline.load(tmp_path / "own")
        assert same(values(pipeline), wanted)


def test_a_checkpoint_that_says_no_config_is_warned_of(tmp_path):
    model = converted(**MADE)
    bare = nn.Module()
    for name, value in model.state_dict().items():
        *path, last = name.split(".")
        holder = bare
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder._modules[part]
        if last != "_extra_state":
            holder.register_buffer(last, value.detach() + 1)
    wanted = values(bare)
    save_checkpoint(tmp_path / "c", bare)
    with pytest.warns(UserWarning, match="does not say which config") as told:
        load_checkpoint(tmp_path / "c", model)
    assert told[0].filename == __file__
    assert all(torch.equal(model.state_dict()[n], v) for n, v in wanted.items())


def test_a_checkpoint_of_its_own_config_mends_a_model_that_another_state_was_written_into(tmp_path):
    model = converted(**MADE)
    save_checkpoint(tmp_path / "c", model)
    wanted = values(model)
    with torch.no_grad():
        for name, value in converted(variant="full").state_dict().items():
            model.state_dict()[name].copy_(value)
    with pytest.raises(ConfigError, match="variant"):
        model(X)
    load_checkpoint(tmp_path / "c", model)
    assert same(values(model), wanted)
    model(X)
