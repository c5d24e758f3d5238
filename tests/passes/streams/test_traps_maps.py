"""What maps over a stream, and in which forms a branch is a term of it (design sections 3 and 4)."""

import operator

import pytest
import torch
from torch import nn

import attnres_fx as ax
from tests.support.stream_text import TWO_LAYERS, check_preserved, check_trap, found_text, tokens, toy

# --- factors, casts, views and slices ----------------------------------------------------------------
FACTORS = {
    "half": lambda m, h: h * 0.5,
    "half on the left": lambda m, h: 0.5 * h,
    "torch.mul": lambda m, h: torch.mul(h, 0.5),
    "method": lambda m, h: h.mul(0.5),
    "halved": lambda m, h: h / 2,
    "negative": lambda m, h: -h,
    "learned carry": lambda m, h: h * m.carry,
    "carry on the left": lambda m, h: m.carry * h,
    "divided by a carry": lambda m, h: h / m.carry,
    "padding mask": lambda m, h: h * padding()[..., None],
    "masked_fill": lambda m, h: h.masked_fill(padding()[..., None] == 0, 0.0),
    "torch.where": lambda m, h: torch.where(padding()[..., None] > 0, h, 0.0),
    "torch.where, a tensor of zeros": lambda m, h: torch.where(padding()[..., None] > 0, h, torch.zeros_like(h)),
    "torch.where, zero first": lambda m, h: torch.where(padding()[..., None] == 0, torch.zeros_like(h), h),
    "contiguous": lambda m, h: h.contiguous(),
    "clone": lambda m, h: h.clone(),
    "to its own dtype": lambda m, h: h.to(torch.float32),
    "there and back": lambda m, h: h.double().float(),
    "token shift": lambda m, h: torch.roll(h, 1, 1),
    "sequence first": lambda m, h: h.transpose(0, 1).contiguous(),
    "permuted": lambda m, h: h.permute(1, 0, 2),
    "unsqueezed": lambda m, h: h.unsqueeze(0).squeeze(0),
    "flattened": lambda m, h: h.reshape(-1, 8),
    "sliced": lambda m, h: h[:, 1:4],
    "narrowed": lambda m, h: h.narrow(1, 0, 3),
    "flipped": lambda m, h: h.flip(1),
    "gathered": lambda m, h: h.gather(1, order()[..., None].expand(-1, -1, 8)),
    "taken along a dimension": lambda m, h: torch.take_along_dim(h, order()[..., None], 1),
    "reversed order": lambda m, h: h[:, ::2],
}


def padding():
    return torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 0, 0]])


def order():
    return torch.tensor([[2, 0, 1], [4, 3, 4]])


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.slow_after(1)
def test_what_does_not_depend_on_the_stream_maps_over_it(factor):
    scale = FACTORS[factor]

    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = scale(m, h)
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    check_trap(program, (tokens(),), TWO_LAYERS, spellings=("symbolic", "export"))


def test_a_factor_on_the_root_and_one_on_the_last_state():
    def program(m, x):
        h = m.embed(x) * 8**0.5
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h * m.carry) * 0.1)

    for spelling in ("symbolic", "export", "dynamo"):
        assert "2: mlp_1" in found_text(toy(program), (tokens(),), spelling)
    text = found_text(toy(program), (tokens(),), "symbolic")
    check_trap(program, (tokens(),), text, spellings=("symbolic", "export"))


LAST_TOKENS = {
    "h[:, -1]": lambda h: h[:, -1],
    "h[:, -1:, :]": lambda h: h[:, -1:, :],
    "h[..., -1, :]": lambda h: h[..., -1, :],
    "select": lambda h: h.select(1, -1),
    "narrow": lambda h: h.narrow(1, 4, 1),
}


@pytest.mark.parametrize("slicing", LAST_TOKENS)
def test_the_last_token_may_be_taken_before_the_final_norm(slicing):
    take = LAST_TOKENS[slicing]

    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(take(h)))

    check_trap(program, (tokens(),), TWO_LAYERS)


def test_a_slice_of_features_is_a_read():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        return h[..., :4].tanh()

    found = found_text(toy(program), (tokens(),), "symbolic").splitlines()
    assert found[:4] == ["stream stream from embed", "  1: attn_1", "  2: mlp_1", "  norm_2 reads 1"]
    assert found[4].endswith("reads 2")
    check_trap(program, (tokens(),), "\n".join(found), spellings=("symbolic",))


def test_a_fill_that_is_not_zero_is_a_read():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(h.masked_fill(padding()[..., None] == 0, 1.0))

    found = found_text(toy(program), (tokens(),), "symbolic").splitlines()
    assert found[-1] == "  stream.read_2 reads 2"
    check_trap(program, (tokens(),), "\n".join(found), spellings=("symbolic",))


# --- flattened rows, float32 residuals, scaled branches ----------------------------------------------
@pytest.mark.parametrize("how", ["reshape", "view", "flatten"])
@pytest.mark.slow_after(1)
def test_rows_flattened_around_the_mlp_stay_on_the_stream(how):
    def flat(h):
        return {"reshape": h.reshape(-1, 8), "view": h.view(-1, 8), "flatten": h.flatten(0, 1)}[how]

    def program(m, x):
        h = m.embed(x)
        for norm, attn, other, mlp in (
            (m.norm_1, m.attn_1, m.norm_2, m.mlp_1),
            (m.norm_3, m.attn_2, m.norm_4, m.mlp_2),
        ):
            h = h + attn(norm(h))
            shape = h.shape
            h = flat(h)
            kept = h
            h = (kept + mlp(other(h))).view(shape)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: attn_1
          2: mlp_1
          3: attn_2
          4: mlp_2
          norm_2 reads 1
          norm_3 reads 2
          norm_4 reads 3
          norm_f reads 4
    """
    check_trap(program, (tokens(),), expected)


def test_a_wider_residual_with_casts_is_one_stream():
    def program(m, x):
        h = m.embed(x).double()
        h = m.attn_1(m.norm_1(h.float())) + h.to(torch.float64)
        h = h.double() + m.mlp_1(m.norm_2(h.to(m.mlp_1.weight.dtype))).to(torch.float64)
        return m.head(m.norm_f(h.float()))

    for spelling in ("symbolic", "export", "dynamo"):
        lines = found_text(toy(program), (tokens(),), spelling).splitlines()
        assert sum(line.startswith("stream") for line in lines) == 1
        assert lines[-2:] == ["  norm_2 reads 1", "  norm_f reads 2"], spelling
    text = found_text(toy(program), (tokens(),), "symbolic")
    check_trap(program, (tokens(),), text, spellings=("symbolic",))


def test_half_precision_outputs_are_not_summed_in_half_precision():
    """The original adds them into a float32 stream one by one; so must a block or a partial sum."""

    def program(m, x):
        h = m.embed(x) * 1e-3
        for norm, mlp in ((m.norm_1, m.mlp_1), (m.norm_2, m.mlp_2), (m.norm_3, m.mlp_3), (m.norm_4, m.mlp_4)):
            h = h + mlp(norm(h).to(torch.bfloat16) * 0).to(torch.bfloat16) * 1.01
        return h

    model = toy(program)
    for linear in (model.mlp_1, model.mlp_2, model.mlp_3, model.mlp_4):
        linear.to(torch.bfloat16)
        nn.init.normal_(linear.bias)
    for config in (
        ax.AttnResConfig(variant="full"),
        ax.AttnResConfig(num_blocks=1),
        ax.AttnResConfig(num_blocks=2),
        ax.AttnResConfig(variant="local", num_blocks=2),
    ):
        converted = ax.convert(torch.fx.symbolic_trace(model), (tokens(),), config=config, check=False)
        expected = model(tokens())
        assert (converted(tokens()) - expected).abs().max() <= 1e-5 * expected.abs().max(), config


@pytest.mark.parametrize("scaled", ["before", "after", "alpha", "parameter"])
def test_a_scaled_branch_is_a_term(scaled):
    def program(m, x):
        h = m.embed(x)
        for norm, mlp in ((m.norm_1, m.mlp_1), (m.norm_2, m.mlp_2)):
            v = mlp(norm(h))
            if scaled == "before":
                h = h + 0.22 * v
            elif scaled == "after":
                h = v.mul(0.22) + h
            elif scaled == "alpha":
                h = operator.add(h, v / 4)
            else:
                h = h + m.carry * v
        return m.head(m.norm_f(h))

    name = "truediv" if scaled == "alpha" else "mul"
    for spelling in ("symbolic", "export", "dynamo"):
        text = found_text(toy(program), (tokens(),), spelling).replace("truediv", "div")
        wanted = TWO_LAYERS.replace("attn_1", name).replace("mlp_1", name).replace("truediv", "div")
        assert text.split() == wanted.split()
    check_trap(program, (tokens(),), found_text(toy(program), (tokens(),), "symbolic"), spellings=("symbolic",))


def test_a_normed_branch_output_is_a_term():
    def program(m, x):
        h = m.embed(x)
        h = h + m.norm_3(m.attn_1(m.norm_1(h)))
        h = h + m.norm_4(m.mlp_1(m.norm_2(h)))
        return m.head(m.norm_f(h))

    expected = TWO_LAYERS.replace("attn_1", "norm_3").replace("mlp_1", "norm_4")
    check_trap(program, (tokens(),), expected)


def test_a_broadcast_root_is_spread_over_the_states_shape():
    def program(m, x):
        h = m.positions(torch.arange(5))
        h = h + m.attn_1(m.norm_1(h)) + m.mlp_2(m.embed(x))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    model = toy(program)
    converted = ax.convert(model, (tokens(),), config=ax.AttnResConfig(variant="full"), check=False)
    torch.testing.assert_close(converted(tokens()), model(tokens()))


def test_rows_that_are_picked_by_what_was_computed_from_them_keep_their_sources():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        best = m.attn_2(m.norm_3(h)).sum(-1).topk(3, 1).indices
        h = h.gather(1, best[..., None].expand(-1, -1, 8))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    check_trap(program, (tokens(),), TWO_LAYERS.replace("norm_2", "norm_3"))


def test_a_gather_that_takes_each_feature_from_another_row_is_a_read():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = h.gather(1, (torch.arange(80) % 5).view(2, 5, 8))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    texts = found_text(toy(program), (tokens(),), "symbolic").splitlines()
    assert [t.split(" from ")[1] for t in texts if t.startswith("stream")] == ["embed", "gather"]


# --- scaled and shifted ------------------------------------------------------------------------------
SHIFTED = {
    "shifted, then scaled": lambda m, h: (h + m.norm_3.bias) * m.carry,
    "in double": lambda m, h: ((h.double() + m.norm_3.bias.double()) * m.carry).to(h.dtype),
    "scaled, then shifted": lambda m, h: m.carry * h + m.norm_3.bias,
    "shifted on the left": lambda m, h: m.norm_3.bias + h,
}


@pytest.mark.parametrize("carried", SHIFTED.values(), ids=SHIFTED.keys())
def test_a_carry_that_is_scaled_and_shifted_by_parameters_begins_a_stream(carried):
    def program(m, x):
        h = m.embed(x)
        h = m.attn_1(m.norm_1(h)) + carried(m, h)
        h = m.mlp_1(m.norm_2(h)) + carried(m, h)
        return m.head(m.norm_f(h))

    (stream,) = ax.inspect(toy(program), (tokens(),)).streams
    assert [(r.name, r.position) for r in stream.depth_reads] == [("norm_2", 1), ("norm_f", 2)]
    model = toy(program)
    check_preserved(model, ax.convert(model, (tokens(),), config=ax.AttnResConfig(variant="full")), (tokens(),))
