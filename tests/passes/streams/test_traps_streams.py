"""Several streams, nested ones, repeated modules, post-norm (design section 4)."""

import pytest
import torch
from torch import nn

import attnres_fx as ax
from tests.support.stream_text import (
    VARIANTS,
    check_preserved,
    check_trap,
    found_text,
    tokens,
    toy,
)


# --- nested ------------------------------------------------------------------------------------------
class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(8, 4)
        self.up = nn.Linear(4, 8)

    def forward(self, y):
        return y + self.up(torch.relu(self.down(y)))


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.toy = toy(lambda m, x: x)
        self.adapter_1, self.adapter_2 = Adapter(), Adapter()
        self.eval()

    def forward(self, x):
        m = self.toy
        h = m.embed(x)
        h = h + self.adapter_1(m.attn_1(m.norm_1(h)))
        h = h + self.adapter_2(m.mlp_1(m.norm_2(h)))
        return m.head(m.norm_f(h))


def test_a_residual_inside_a_sublayer_is_a_nested_stream():
    for source in (torch.fx.symbolic_trace(Adapted()), Adapted()):
        found = ax.inspect(source, (tokens(),)).streams
        main = [s for s in found if s.nested_in is None]
        nested = [s for s in found if s.nested_in is not None]
        assert [[r.name for r in s.depth_reads] for s in main] == [["toy.norm_2", "toy.norm_f"]]
        assert [s.nested_in for s in nested] == [main[0].name] * 2
        assert [s.num_sublayers for s in nested] == [1, 1]


def test_a_nested_stream_that_begins_first_in_the_graph_leaves_the_plain_name_to_the_main_one():
    def program(m, x):
        latents = m.carry.expand(2, 5, -1)
        h = m.embed(x)
        latents = latents + m.attn_3(m.norm_3(latents) * m.attn_4(h))
        latents = latents + m.mlp_3(m.norm_4(latents))
        h = h + m.attn_1(m.norm_1(latents))
        h = h + m.mlp_1(m.norm_2(h))
        return m.head(m.norm_f(h))

    expected = """
        stream stream#2 from expand, nested in stream
          1: attn_3
          2: mlp_3
          norm_4 reads 1
          norm_1 reads 2
        stream stream from embed
          1: attn_1
          2: mlp_1
          norm_2 reads 1
          norm_f reads 2
    """
    check_trap(program, (tokens(),), expected)


@pytest.mark.parametrize("source", ["symbolic", "module"])
@pytest.mark.slow
def test_streams_are_chosen_by_main_all_or_name(source):
    model = Adapted()
    graph = torch.fx.symbolic_trace(model) if source == "symbolic" else model
    found = ax.inspect(graph, (tokens(),)).streams
    main = next(s.name for s in found if s.nested_in is None)
    nested = [s.name for s in found if s.nested_in is not None]
    wanted = {"main": 2, "all": 4, main: 2, nested[1]: 1, (main, nested[0]): 3}
    for streams, count in wanted.items():
        for variant in ("full", "block", "local"):
            config = ax.AttnResConfig(variant=variant, streams=streams)
            converted = ax.convert(graph, (tokens(),), config=config, check=False)
            assert len(converted.attnres.reads) == count, streams
            assert len(set(converted.attnres.reads.names)) == count
            check_preserved(model, converted, (tokens(),), where=f"{streams} {variant}")


def test_a_stream_left_alone_is_named_in_the_report_with_the_reason():
    converted = ax.convert(torch.fx.symbolic_trace(Adapted()), (tokens(),))
    names = [s.name for s in ax.inspect(Adapted(), (tokens(),)).streams if s.nested_in is not None]
    assert [s.name for s, _ in converted.report.left] == names
    for name, (_, why) in zip(names, converted.report.left, strict=True):
        assert why and name in str(converted.report)


def test_a_stream_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ax.errors.StreamNameError, match="nothing_like_it"):
        ax.convert(torch.fx.symbolic_trace(Adapted()), (tokens(),), config=ax.AttnResConfig(streams="nothing_like_it"))


# --- one module called again and again ---------------------------------------------------------------
def test_a_module_called_again_numbers_its_reads():
    def program(m, x):
        h = m.embed(x)
        for _ in range(4):
            h = h + m.mlp_1(m.norm_1(h))
        return m.head(m.norm_f(h))

    expected = """
        stream stream from embed
          1: mlp_1
          2: mlp_1
          3: mlp_1
          4: mlp_1
          norm_1 reads 1
          norm_1#2 reads 2
          norm_1#3 reads 3
          norm_f reads 4
    """
    check_trap(program, (tokens(),), expected)


def test_repeated_reads_have_parameters_of_their_own():
    def program(m, x):
        h = m.embed(x)
        for _ in range(3):
            h = h + m.mlp_1(m.norm_1(h))
        return m.head(m.norm_f(h))

    converted = ax.convert(torch.fx.symbolic_trace(toy(program)), (tokens(),))
    names = [n for n, _ in converted.attnres.named_parameters() if n.endswith("query")]
    assert names == ["reads.norm_1.query", "reads.norm_1#2.query", "reads.norm_f.query"]
    assert len({id(r.query) for r in converted.attnres.reads}) == 3


# --- two streams -------------------------------------------------------------------------------------
def encoder_decoder(m, x, y):
    e = m.embed(x)
    e = e + m.attn_1(m.norm_1(e))
    e = e + m.mlp_1(m.norm_2(e))
    d = m.positions(y)
    d = d + m.attn_2(m.norm_3(d))
    scores = m.attn_3(m.norm_4(d)) @ m.attn_4(e).transpose(-1, -2)
    d = d + scores.softmax(-1) @ m.mlp_3(e)
    d = d + m.mlp_2(m.norm_f(d))
    return m.head(d)


def test_cross_attention_reads_the_other_stream():
    expected = """
        stream stream from embed
          1: attn_1
          2: mlp_1
          norm_2 reads 1
          attn_4 reads 2
        stream stream#2 from positions
          1: attn_2
          2: matmul
          3: mlp_2
          norm_4 reads 1
          norm_f reads 2
          head reads 3
    """
    check_trap(encoder_decoder, (tokens(), tokens()), expected)


def test_reads_of_two_streams_are_in_execution_order():
    converted = ax.convert(torch.fx.symbolic_trace(toy(encoder_decoder, 2)), (tokens(), tokens()))
    assert converted.attnres.reads.names == ("norm_2", "attn_4", "norm_4", "norm_f", "head")


def test_a_stream_that_begins_on_the_end_of_another_is_not_nested():
    def program(m, x):
        e = m.embed(x)
        e = e + m.attn_1(m.norm_1(e))
        e = e + m.mlp_1(m.norm_2(e))
        d = m.mlp_4(m.norm_4(e))
        d = d + m.attn_2(m.norm_3(d))
        d = d + m.mlp_2(m.attn_3(d))
        return m.head(m.norm_f(d))

    expected = """
        stream stream from embed
          1: attn_1
          2: mlp_1
          norm_2 reads 1
          norm_4 reads 2
        stream stream#2 from mlp_4
          1: attn_2
          2: mlp_2
          attn_3 reads 1
          norm_f reads 2
    """
    check_trap(program, (tokens(),), expected)


def test_two_streams_that_read_each_other_are_both_main():
    def program(m, x, y):
        a, b = m.embed(x), m.positions(y)
        a = a + m.attn_1(m.norm_1(a)) * m.attn_2(b)
        b = b + m.mlp_1(m.norm_2(b)) * m.mlp_2(a)
        a = a + m.attn_3(a) * m.attn_4(b)
        return m.head(m.norm_3(a)), m.head(m.norm_4(b))

    expected = """
        stream stream from embed
          1: mul
          2: mul
          mlp_2 reads 1
          norm_3 reads 2
        stream stream#2 from positions
          1: mul
          attn_4 reads 1
    """
    config = ax.AttnResConfig(variant="full")
    model = toy(program, 2)
    for spelling in ("symbolic", "export", "dynamo"):
        assert found_text(model, (tokens(), tokens()), spelling).split() == expected.split(), spelling
    converted = ax.convert(torch.fx.symbolic_trace(model), (tokens(), tokens()), config=config, check=False)
    check_preserved(model, converted, (tokens(), tokens()))


# --- post-norm ---------------------------------------------------------------------------------------
def post_norm(m, x):
    h = m.norm_1(m.embed(x))
    h = m.norm_2(h + m.attn_1(h))
    h = m.norm_3(h + m.mlp_1(h))
    h = m.norm_4(m.attn_2(h) + h)
    h = m.norm_f(m.mlp_2(h) + h)
    return m.head(h)


def test_a_post_norm_chain_is_one_stream():
    expected = """
        stream stream from norm_1, post-norm
          1: attn_1
          2: mlp_1
          3: attn_2
          4: mlp_2
          norm_2 reads 1
          norm_3 reads 2
          norm_4 reads 3
          norm_f reads 4
    """
    check_trap(post_norm, (tokens(),), expected)


def test_only_post_norm_reads_in_mode_sum_have_gates_and_the_first_has_none():
    graph = torch.fx.symbolic_trace(toy(post_norm))
    first, *gated = ax.convert(graph, (tokens(),), config=ax.AttnResConfig(output="sum")).attnres.reads
    assert first.gate is None  # its sources add up to the state
    assert all(r.gate is not None and r.gate.shape == () and r.gate.item() == 0 for r in gated)
    plain = ax.convert(graph, (tokens(),), config=ax.AttnResConfig(output="mean"))
    assert all(r.gate is None for r in plain.attnres.reads)


def test_a_written_out_post_norm_is_one_stream():
    def norm(h):
        centred = h - h.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)

    def program(m, x):
        h = m.embed(x)
        h = norm(h + m.attn_1(h))
        h = norm(h + m.mlp_1(h))
        return m.head(norm(h + m.mlp_2(h)))

    model = toy(program)
    for source in (torch.fx.symbolic_trace(model), model):
        (stream,) = ax.inspect(source, (tokens(),)).streams
        assert stream.post_norm and stream.num_sublayers == 3 and len(stream.depth_reads) == 3
        for config in VARIANTS.values():
            check_preserved(model, ax.convert(source, (tokens(),), config=config, check=False), (tokens(),))
