"""Members of the kinds of design section 4 that no other trap has: each told apart by its rule, not by its name."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.passes import analyze_
from tests.support.stream_text import captured, check_preserved, check_trap, rows, toy


class DropPath(nn.Module):
    """One drop path that all layers share: in eval mode it is not in the graph."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1) > 0.3).to(x.dtype) / 0.7


class Dropped(nn.Module):
    def __init__(self, shared):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.drop = DropPath() if shared else None
        self.eval()

    def forward(self, x):
        for norm, mix in zip(self.norms, self.mixes, strict=False):
            y = mix(norm(x))
            if self.drop is not None:
                y = self.drop(y)
            elif self.training:
                y = y * torch.bernoulli(torch.full((x.shape[0], 1, 1), 0.7)) / 0.7
            x = x + y
        return self.norms[-1](x)


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_done_to_a_branch_in_train_mode_alone_changes_no_name(shared):
    model = Dropped(shared)
    converted = ax.convert(model, (rows(),), config=ax.AttnResConfig(variant="full"), check=False)
    assert [r.name for r in converted.attnres.reads] == ["norms.1", "norms.2"]
    for train in (False, True):
        model.train(train), converted.train(train)
        torch.manual_seed(3)
        expected = model(rows())
        torch.manual_seed(3)
        torch.testing.assert_close(converted(rows()), expected)


# --- sums over time ----------------------------------------------------------------------------------
@pytest.mark.parametrize("streams", ["main", "all"])
def test_steps_that_begin_from_their_slice_are_a_recurrence(streams):
    def program(m, x):
        h = m.head(x)
        for i in (1, 2):
            u, state, seen = getattr(m, f"attn_{i}")(getattr(m, f"norm_{i}")(h)), torch.zeros(2, 8), []
            for t in range(5):
                state = m.mlp_1(state) + u[:, t]
                seen.append(m.mlp_2(state))
            h = h + torch.stack(seen, 1)
        return m.norm_f(h)

    check_reads(program, ["norm_2", "norm_f"], streams)


def test_a_slice_that_is_added_on_the_way_into_a_step_is_the_steps():
    def program(m, x):
        h, seen = torch.zeros(2, 8), []
        for t in range(5):
            h = h + m.mlp_1(torch.relu(m.mlp_2(x[:, t]) + h))
            seen.append(m.attn_1(h))
        return torch.stack(seen, 1)

    check_trap(program, (rows(),), "no stream")


def test_steps_of_depth_over_shared_weights_are_none_of_time():
    def program(m, x):
        h = m.norm_4(x)
        for t in range(4):
            h = h + 0.25 * m.mlp_1(torch.tanh(m.mlp_2(m.norm_1(h)) + m.carry[t]))
        return m.norm_f(h)

    check_reads(program, ["norm_1", "norm_1#2", "norm_1#3", "norm_f"])


# --- what is added beside, or into, a stream ---------------------------------------------------------
def test_a_projection_that_is_held_against_its_own_start_carries_nothing():
    def program(m, x):
        y = m.attn_1(x)
        z = m.attn_2(y)
        for i in (1, 2, 3):
            z = z - 0.1 * getattr(m, f"mlp_{i}")(m.attn_3(z) - y)
        return m.norm_f(z)

    check_reads(program, ["attn_3", "attn_3#2", "norm_f"])


def test_positions_that_each_layer_refines_are_beside_a_post_norm_stream():
    def program(m, x):
        h, boxes = m.norm_4(x), m.carry
        for i in (1, 2, 3):
            q = h + m.attn_4(boxes)
            h = getattr(m, f"norm_{i}")(h + getattr(m, f"attn_{i}")(q))
            boxes = torch.sigmoid(m.mlp_4(h) + torch.logit(boxes.sigmoid()))
            h = m.norm_f(h + getattr(m, f"mlp_{i}")(h))
        return m.head(h) if m.head.out_features != 8 else h, boxes

    model = toy(program)
    for spelling in ("symbolic", "dynamo", "export"):
        (first, *_) = analyze_(captured(model, (rows(),), spelling)).select("main")
        assert first.post_norm and len(first.depth_reads) == 6, spelling


def test_values_that_lean_on_those_of_the_first_layer_are_in_its_stream():
    def program(m, x):
        h, first = m.norm_4(x), None
        for i in (1, 2, 3):
            n = getattr(m, f"norm_{i}")(h)
            v = getattr(m, f"attn_{i}")(n)
            first = v if first is None else first
            v = v + m.carry * (first - v)
            h = h + getattr(m, f"mlp_{i}")((n @ n.transpose(1, 2)).softmax(-1) @ v)
        return m.norm_f(h)

    check_reads(program, ["norm_2", "norm_3", "norm_f"])


def check_reads(program, expected, streams="main"):
    """The reads that a program should have, in every spelling."""
    model = toy(program)
    model.head = nn.Linear(8, 8)
    for spelling in ("symbolic", "dynamo", "export"):
        found = analyze_(captured(model, (rows(),), spelling)).select(streams)
        assert [r.name for s in found for r in s.depth_reads] == expected, spelling


# --- other spellings of a sum ------------------------------------------------------------------------
def test_the_mean_of_a_stack_is_half_a_sum():
    def program(m, x):
        h = m.norm_4(x)
        for i in (1, 2):
            h = torch.stack([h, h + 2 * getattr(m, f"mlp_{i}")(getattr(m, f"norm_{i}")(h))]).mean(0)
        return m.norm_f(h)

    check_reads(program, ["norm_2", "norm_f"])
    model = toy(program)
    converted = ax.convert(model, (rows(),), config=ax.AttnResConfig(variant="full"), check=False)
    check_preserved(model, converted, (rows(),))
