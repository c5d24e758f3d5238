"""What ranks must have alike, and which arguments of a batch its rows share."""

import re

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import PipelineError
from attnres_fx.partition.runtime.agreement import facts_of, require_same
from attnres_fx.partition.runtime.microbatches import split_batch

CONFIG = {"variant": "block", "block_size": 2}


class Looking(nn.Module):
    """Layers that look at a memory [K, D] and may add a mask [T, T]; all rows share both."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))

    def forward(self, memory, ids, mask):
        x = self.embed(ids)
        for norm in self.norms:
            h = norm(x)
            x = x + torch.softmax(h @ memory.t(), -1) @ memory + torch.softmax(h @ h.mT + mask, -1) @ h
        return x


@pytest.fixture(scope="module")
def planned():
    model = Looking()
    example = {"memory": torch.randn(5, 8), "ids": torch.randint(0, 20, (2, 6)), "mask": torch.randn(6, 6)}
    plan = ax.plan(model, kwargs=example, num_stages=2, num_microbatches=4, config=ax.AttnResConfig(**CONFIG))
    return plan, ax.build_stages(model, plan)


def test_what_all_rows_share_is_told_by_the_graph_and_not_by_a_length_that_happens_to_be_the_batch_s(planned):
    _, stages = planned
    memory, ids, mask = torch.randn(8, 8), torch.randint(0, 20, (8, 8)), torch.randn(8, 8)
    shared = stages.shared((memory,), {"ids": ids, "mask": mask})
    assert shared == {id(memory), id(mask)}
    parts = split_batch((memory, ids, mask), {}, ids, 4, ignore_index=-100, device=memory.device, shared=shared)
    for i, ((first, rows, last), _) in enumerate(parts.arguments):
        assert first is memory and last is mask and torch.equal(rows, ids[2 * i : 2 * i + 2])


def test_rows_that_are_not_the_batch_s_are_refused_by_the_name_of_their_argument():
    device, x = torch.device("cpu"), torch.ones(4, 2)
    for args, kwargs, target, said in (
        ((x,), {"mask": x[:3]}, None, "the argument mask of shape (3, 2) was given in a batch of 4 rows"),
        ((x, {"m": x[:3]}), {}, None, "the argument 1['m'] of shape (3, 2)"),
        ((x,), {}, x[:3], "the target of shape (3, 2)"),
    ):
        with pytest.raises(PipelineError, match=re.escape(said)):
            split_batch(args, kwargs, target, 2, ignore_index=-100, device=device)


def test_ranks_that_differ_are_told_in_what(planned):
    plan, stages = planned
    facts = facts_of(stages, plan, compile=None)
    assert (facts["output"], facts["num_microbatches"], facts["compile"]) == ("sum", "4", "None")
    require_same([facts, dict(facts)], "")
    with pytest.raises(PipelineError, match=r"differ in output \(rank 0: sum, rank 2: mean\)\. Give every rank"):
        require_same([facts, facts, {**facts, "output": "mean"}], "Give every rank the same plan.")
    with pytest.raises(PipelineError, match=r"differ in compile \(rank 0: None, rank 1: nothing\)"):
        require_same([facts, {n: v for n, v in facts.items() if n != "compile"}], "")
