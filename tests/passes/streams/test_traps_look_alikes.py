"""What only looks like a residual: no stream is found, or none beside the real one (design section 4)."""

import pytest
import torch
from torch.nn import functional as F

import attnres_fx as ax
from tests.support.stream_text import TWO_LAYERS, Toy, check_trap, rows, tokens, toy


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
    assert "refused (injected): y" in str(report) and "the sublayers of 'stream'" in str(report)


def test_a_table_made_of_parameters_alone_is_no_stream():
    def program(m, x):
        table = m.positions.weight
        grid = F.interpolate(table.t()[None], size=16, mode="linear")[0].t()
        h = m.embed(x) + torch.cat([table[:1], grid[1:]])[:5]  # the first row is kept, the others are replaced
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    check_trap(program, (tokens(),), TWO_LAYERS.replace("embed", "add"))


def test_learned_latents_that_read_an_input_are_a_stream():
    def program(m, x):
        h = m.carry.expand(2, 5, -1)
        h = h + m.attn_1(m.norm_1(h) * m.embed(x))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    check_trap(program, (tokens(),), TWO_LAYERS.replace("embed", "expand"))


def test_a_model_without_inputs_has_streams():
    def program(m):
        h = m.positions.weight
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    (stream,) = ax.inspect(Toy(program), ()).streams
    assert [r.name for r in stream.depth_reads] == ["norm_2", "norm_f"]
