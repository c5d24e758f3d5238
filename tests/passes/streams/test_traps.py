"""What is an addition to a stream, and what only looks like one (design section 4)."""

import operator

import pytest
import torch

import attnres_fx as ax
from tests.support.stream_text import check_trap, found_text, rows, tokens, toy

TWO_LAYERS = """
    stream stream from embed
      1: attn_1
      2: mlp_1
      norm_2 reads 1
      norm_f reads 2
"""


def two_layers(add):
    """A pre-norm model of one attention and one MLP whose residual additions are spelled by `add`."""

    def program(m, x):
        h = m.embed(x)
        h = add(h, m.attn_1(m.norm_1(h)))
        h = add(h, m.mlp_1(m.norm_2(h)))
        return m.head(m.norm_f(h))

    return program


ADDITIONS = {
    "h + f": lambda h, f: h + f,
    "f + h": lambda h, f: f + h,
    "h - f": lambda h, f: h - f,
    "f - h": lambda h, f: f - h,
    "torch.add": lambda h, f: torch.add(h, f),
    "torch.add by keyword": lambda h, f: torch.add(input=h, other=f),
    "torch.add alpha": lambda h, f: torch.add(h, f, alpha=0.5),
    "torch.add alpha on the state": lambda h, f: torch.add(f, h, alpha=0.5),
    "torch.sub alpha": lambda h, f: torch.sub(h, f, alpha=0.25),
    "torch.rsub": lambda h, f: torch.rsub(h, f),
    "h.add": lambda h, f: h.add(f),
    "h.sub": lambda h, f: h.sub(f),
    "iadd": lambda h, f: operator.iadd(h, f),
    "isub": lambda h, f: operator.isub(h, f),
    "add_": lambda h, f: h.add_(f),
    "add_ alpha": lambda h, f: h.add_(f, alpha=2),
    "sub_": lambda h, f: h.sub_(f),
    "add_ on the branch": lambda h, f: f.add_(h),
    "sum": lambda h, f: sum([h, f]),
    "sum, branch first": lambda h, f: sum([f, h]),
}


@pytest.mark.parametrize("spelling", ADDITIONS)
@pytest.mark.slow_after(1)
def test_every_spelling_of_an_addition_extends_the_stream(spelling):
    check_trap(two_layers(ADDITIONS[spelling]), (tokens(),), TWO_LAYERS)


def test_addmm_with_the_state_as_addend_is_a_residual():
    def program(m, x):
        h = x
        h = torch.addmm(h, m.norm_1(h), m.attn_1.weight)
        h = torch.addmm(h, m.norm_2(h), m.mlp_1.weight, beta=0.5, alpha=2.0)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from input
          1: mm
          2: mm
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (rows()[0],), expected)


def test_baddbmm_with_the_state_as_addend_is_a_residual():
    def program(m, x):
        h = x
        h = torch.baddbmm(h, m.norm_1(h), m.attn_1.weight.expand(2, -1, -1))
        h = h.baddbmm(m.norm_2(h), m.mlp_1.weight.expand(2, -1, -1), beta=1, alpha=0.5)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from input
          1: bmm
          2: bmm
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (rows(),), expected)


def test_addcmul_with_the_state_as_addend_is_a_residual():
    def program(m, x):
        h = m.embed(x)
        h = torch.addcmul(h, m.carry, m.attn_1(m.norm_1(h)))
        h = h.addcmul(m.carry, m.mlp_1(m.norm_2(h)), value=0.5)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: mul
          2: mul
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (tokens(),), expected)


def test_a_bias_as_addend_of_addmm_is_no_residual():
    def program(m, x):
        y = torch.addmm(m.attn_1.bias, x, m.attn_1.weight)
        return torch.addmm(m.mlp_1.bias, y, m.mlp_1.weight)

    check_trap(program, (rows()[0],), "no stream")


# --- what only looks like a residual -----------------------------------------------------------------


def gelu_written_out(x):
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


def test_a_written_out_gelu_is_no_residual():
    check_trap(lambda m, x: m.head(gelu_written_out(m.attn_1(x))), (rows(),), "no stream")


def test_a_written_out_gelu_with_a_product_is_no_residual():
    def program(m, x):
        y = m.attn_1(x)
        return m.head(y + 0.044715 * (y * y * y))

    check_trap(program, (rows(),), "no stream")


def test_a_gelu_inside_a_sublayer_is_not_found_beside_the_stream():
    def program(m, x):
        h = m.embed(x)
        h = h + m.mlp_1(gelu_written_out(m.attn_1(m.norm_1(h))))
        h = h + m.mlp_2(gelu_written_out(m.attn_2(m.norm_2(h))))
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: mlp_1
          2: mlp_2
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (tokens(),), expected)


def test_token_and_position_embedding_are_one_root():
    def program(m, x):
        h = m.embed(x) + m.positions(torch.arange(5))
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    check_trap(program, (tokens(),), TWO_LAYERS.replace("embed", "add"))


def test_three_embeddings_are_one_root():
    def program(m, x):
        h = m.embed(x) + m.positions(x) + m.carry
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    check_trap(program, (tokens(),), TWO_LAYERS.replace("embed", "add"))


def rotated(q):
    left, right = q.chunk(2, dim=-1)
    return torch.cat([-right, left], dim=-1)


def test_rotary_embedding_is_no_residual():
    def program(m, x):
        q = m.attn_1(x)
        q = q * torch.cos(m.carry) + rotated(q) * torch.sin(m.carry)
        return m.head(q)

    check_trap(program, (rows(),), "no stream")


def test_routed_and_shared_experts_are_one_term():
    def program(m, x):
        h = m.embed(x)
        n = m.norm_1(h)
        weights = m.attn_1(n).softmax(-1)
        routed = weights[..., :1] * m.mlp_1(n) + weights[..., 1:2] * m.mlp_2(n)
        h = h + (routed + m.mlp_3(n))
        h = h + m.attn_2(m.norm_2(h))
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: add
          2: attn_2
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (tokens(),), expected)


def test_routed_and_shared_experts_alone_are_no_stream():
    check_trap(lambda m, x: m.head(m.mlp_1(x) + m.mlp_2(x)), (rows(),), "no stream")


def test_a_low_rank_adapter_beside_a_linear_is_no_stream():
    check_trap(lambda m, x: m.head(m.mlp_1(x) + 2.0 * m.mlp_3(m.mlp_2(x))), (rows(),), "no stream")


def test_an_attention_mask_added_to_scores_is_no_stream():
    def program(m, x):
        scores = m.attn_1(x) @ m.attn_2(x).transpose(-1, -2)
        mask = torch.full((5, 5), -1e9).triu(1).expand(2, 5, 5)
        return (scores + mask).softmax(-1) @ m.attn_3(x)

    check_trap(program, (rows(),), "no stream", spellings=("symbolic", "export"))


def test_a_mask_computed_from_the_input_is_no_stream():
    def program(m, x, y):
        scores = m.attn_1(x) @ m.attn_2(x).transpose(-1, -2)
        bias = (1.0 - y)[:, None, :].expand(2, 5, 5) * -1e9
        return (scores + bias).softmax(-1) @ m.attn_3(x)

    check_trap(program, (rows(), torch.ones(2, 5)), "no stream")


def test_subtracting_a_mean_is_no_residual():
    def program(m, x):
        y = m.attn_1(x)
        centred = y - y.mean(-1, keepdim=True)
        return m.head(centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6))

    check_trap(program, (rows(),), "no stream")


def test_convert_says_that_there_is_no_stream():
    model = toy(lambda m, x: m.head(gelu_written_out(m.attn_1(x))))
    with pytest.raises(ax.errors.NoStreamError, match="no residual stream"):
        ax.convert(model, (rows(),))


# --- injected addends --------------------------------------------------------------------------------


def test_an_addend_from_outside_joins_the_stream_once_it_has_two_terms():
    def program(m, x, y):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        n = m.norm_2(h)
        h = h + m.positions(y)
        h = h + m.mlp_1(n)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: attn_1
          2: positions + mlp_1
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (tokens(), tokens()), expected)


def test_an_addend_between_two_reads_is_a_sublayer_of_its_own():
    def program(m, x, y):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        first = m.norm_2(h)
        h = m.positions(y) + h
        h = h + m.mlp_1(m.norm_3(h)) + m.mlp_2(first)
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: attn_1
          2: positions
          3: mlp_1 + mlp_2
          norm_2 reads 1
          norm_3 reads 2
          norm_f reads 3
    """
    check_trap(program, (tokens(), tokens()), expected)


def test_an_addend_from_outside_on_the_root_makes_a_new_root():
    def program(m, x, y):
        h = m.embed(x)
        skipped = m.mlp_2(m.norm_3(h))
        h = h + m.positions(y)
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h)) + m.head(skipped)

    check_trap(program, (tokens(), tokens()), TWO_LAYERS.replace("embed", "add"))


def test_the_root_added_again_is_a_term():
    def program(m, x):
        first = m.embed(x)
        h = first + m.attn_1(m.norm_1(first))
        h = h + m.mlp_1(m.norm_2(h))
        h = h + first
        h = h + m.mlp_2(m.norm_3(h))
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: attn_1
          2: mlp_1 + embed
          3: mlp_2
          norm_2 reads 1
          norm_3 reads 2
          norm_f reads 3
    """
    check_trap(program, (tokens(),), expected)


# --- parallel sublayers ------------------------------------------------------------------------------

ORDERS = {
    "(h + a) + b": lambda h, a, b: (h + a) + b,
    "(a + h) + b": lambda h, a, b: (a + h) + b,
    "(h + b) + a": lambda h, a, b: (h + b) + a,
    "(b + h) + a": lambda h, a, b: (b + h) + a,
    "b + (h + a)": lambda h, a, b: b + (h + a),
    "a + (b + h)": lambda h, a, b: a + (b + h),
    "(a + b) + h": lambda h, a, b: (a + b) + h,
    "h + (a + b)": lambda h, a, b: h + (a + b),
    "(b + a) + h": lambda h, a, b: (b + a) + h,
    "h += a; h += b": lambda h, a, b: operator.iadd(operator.iadd(h, a), b),
    "h += a + b": lambda h, a, b: operator.iadd(h, a + b),
    "sum": lambda h, a, b: sum([h, a, b]),
    "sum, state last": lambda h, a, b: sum([a, b, h]),
}


@pytest.mark.parametrize("norms", ["one norm", "two norms"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.slow_after(1)
def test_parallel_attention_and_mlp_are_one_sublayer_in_any_order(order, norms):
    add = ORDERS[order]

    def program(m, x):
        h = m.embed(x)
        for norm, other, attn, mlp in (
            (m.norm_1, m.norm_2, m.attn_1, m.mlp_1),
            (m.norm_3, m.norm_4, m.attn_2, m.mlp_2),
        ):
            a = attn(norm(h))
            h = add(h, a, mlp(other(h) if norms == "two norms" else norm(h)))
        return m.head(m.norm_f(h))

    model = toy(program)
    for spelling in ("symbolic", "export", "dynamo"):
        lines = found_text(model, (tokens(),), spelling).splitlines()
        assert len([line for line in lines if line.startswith("stream")]) == 1, (spelling, lines)
        assert [line for line in lines if "reads" in line] == ["  norm_3 reads 1", "  norm_f reads 2"], spelling
    text = found_text(model, (tokens(),), "symbolic")
    check_trap(program, (tokens(),), text, spellings=("symbolic",))


# --- additions in other words ------------------------------------------------------------------------


OTHER_WORDS = {
    "sum of a stack": lambda h, f: torch.stack([h, f]).sum(0),
    "sum of a stack along another dimension": lambda h, f: torch.stack((f, h), dim=2).sum(dim=2),
    "lerp with a constant weight": lambda h, f: torch.lerp(h, f, 0.3),
    "lerp by method": lambda h, f: h.lerp(f, 0.5),
}


@pytest.mark.parametrize("words", OTHER_WORDS)
def test_an_addition_in_other_words_extends_the_stream(words):
    def program(m, x):
        h = m.embed(x)
        h = OTHER_WORDS[words](h, m.attn_1(m.norm_1(h)))
        h = OTHER_WORDS[words](h, m.mlp_1(m.norm_2(h)))
        return m.head(m.norm_f(h))

    for spelling in ("symbolic", "export", "dynamo"):
        text = found_text(toy(program), (tokens(),), spelling)
        assert "norm_2 reads 1" in text and "norm_f reads 2" in text, spelling
    assert ax.verify(toy(program), ax.convert(toy(program), (tokens(),)), (tokens(),)).passed


SCATTERED = {
    "index_add": lambda h, i, f: h.index_add(1, i[0, :, 0], f),
    "scatter_add": lambda h, i, f: h.scatter_add(1, i, f),
    "index_add_": lambda h, i, f: h.clone().index_add_(1, i[0, :, 0], f),
}


@pytest.mark.parametrize("how", SCATTERED)
def test_what_is_scattered_into_the_stream_is_a_term(how):
    index = torch.tensor([0, 2, 3])[None, :, None].expand(2, 3, 8)

    def program(m, x):
        h = m.embed(x)
        h = SCATTERED[how](h, index, m.attn_1(m.norm_1(h).gather(1, index)))
        h = SCATTERED[how](h, index, m.mlp_1(m.norm_2(h).gather(1, index)))
        return m.head(m.norm_f(h))

    model = toy(program)
    converted = ax.convert(model, (tokens(),), config=ax.AttnResConfig(variant="full"))
    assert [r.name for r in converted.attnres.reads] == ["norm_2", "norm_f"]
    assert ax.verify(model, converted, (tokens(),)).passed


def test_the_root_injected_again_from_the_first_layer_on_stays_one_stream():
    def program(m, x):
        h = x0 = m.embed(x)
        for norm, layer in ((m.norm_1, m.attn_1), (m.norm_2, m.mlp_1), (m.norm_3, m.attn_2)):
            h = m.carry[0] * h + m.carry[1] * x0
            h = h + layer(norm(h))
        return m.head(m.norm_f(h))

    model = toy(program)
    text = found_text(model, (tokens(),), "export")
    assert text.count("\nstream") == 0 and text.count("reads") == 3, text
    assert "norm_f reads 3" in text
    assert ax.verify(model, ax.convert(model, (tokens(),)), (tokens(),)).passed


@pytest.mark.parametrize("sizes", ["static", "free"])
def test_a_mask_that_all_layers_share_is_no_stream(sizes):
    def program(m, x, mask):
        h = x
        for i in (1, 2, 3):
            n = getattr(m, f"norm_{i}")(h)
            scores = n @ n.transpose(1, 2) + mask
            h = h + getattr(m, f"attn_{i}")(scores.softmax(-1) @ n)
        return m.head(m.norm_f(h))

    model, args = toy(program, 2), (rows(), torch.zeros(2, 5, 5))
    shapes = {"x": None, "y": None} if sizes == "static" else None
    report = ax.inspect(model, args, dynamic_shapes=shapes)
    assert [len(s.depth_reads) for s in report.streams] == [3]
    assert "refused (injected): y" in str(report)


def test_a_layer_that_reads_the_state_with_an_embedding_added_is_still_a_layer():
    def program(m, x, time):
        h = x
        for i in (1, 2, 3):
            h = h + getattr(m, f"attn_{i}")(getattr(m, f"norm_{i}")(h + time))
        return m.head(m.norm_f(h))

    report = ax.inspect(toy(program, 2), (rows(), rows(1)))
    assert [len(s.depth_reads) for s in report.streams] == [3]
