"""Several streams, nested ones, repeated modules, post-norm, hidden regions (design section 4)."""

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

import attnres_fx as ax
from attnres_fx.errors import NotAdditiveError
from attnres_fx.passes import analyze_
from tests.support.stream_text import (
    VARIANTS,
    check_preserved,
    check_trap,
    dynamo_graph,
    found_text,
    stream_text,
    tokens,
    toy,
)

TWO_LAYERS = """
    stream stream from embed
      1: attn_1
      2: mlp_1
      norm_2 reads 1
      norm_f reads 2
"""


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
        stream attn_4 from positions
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


def test_only_post_norm_reads_in_mode_sum_have_gates():
    graph = torch.fx.symbolic_trace(toy(post_norm))
    gated = ax.convert(graph, (tokens(),), config=ax.AttnResConfig(output="sum"))
    assert all(r.gate is not None and r.gate.shape == () and r.gate.item() == 0 for r in gated.attnres.reads)
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


# --- regions that hide part of a stream --------------------------------------------------------------


def under_autocast(m, x):
    h = m.embed(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
    return m.head(m.norm_f(h))


def partly_under_autocast(m, x):
    h = m.embed(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = m.attn_1(m.norm_1(h))
    h = h + v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = h + m.mlp_1(m.norm_2(h))
    return m.head(m.norm_f(h))


@pytest.mark.parametrize("program", [under_autocast, partly_under_autocast])
def test_a_stream_under_autocast_is_found(program):
    check_trap(program, (tokens(),), TWO_LAYERS, spellings=("export",), tolerance=2e-2)
    assert found_text(toy(program), (tokens(),), "dynamo").split() == TWO_LAYERS.split()


def under_no_grad(m, x):
    h = m.embed(x)
    with torch.no_grad():
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.mlp_1(m.norm_2(h))
    h = h + m.mlp_2(m.norm_3(h))
    return m.head(m.norm_f(h))


NO_GRAD = """
    stream stream from embed
      1: attn_1
      2: mlp_1
      3: mlp_2
      norm_2 reads 1
      norm_3 reads 2
      norm_f reads 3
"""


@pytest.mark.parametrize("spelling", ["export", "dynamo"])
def test_a_stream_under_no_grad_is_found(spelling):
    assert found_text(toy(under_no_grad), (tokens(),), spelling).split() == NO_GRAD.split()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow_after(1)
def test_what_was_frozen_by_no_grad_stays_frozen(variant):
    model = toy(under_no_grad)
    converted = ax.convert(model, (tokens(),), config=VARIANTS[variant], check=False)
    torch.testing.assert_close(converted(tokens()), model(tokens()), rtol=1e-5, atol=1e-6)
    model(tokens()).sum().backward()
    frozen = {n for n, p in model.named_parameters() if p.grad is None}
    assert "attn_1.weight" in frozen and "embed.weight" in frozen
    model.zero_grad()
    converted(tokens()).sum().backward()
    leaked = {n for n in frozen if (g := model.get_parameter(n).grad) is not None and g.any()}
    assert not leaked


def test_a_checkpointed_layer_is_inlined_and_keeps_its_tags():
    def layer(m, h):
        h = h + m.attn_1(m.norm_1(h))
        return h + m.mlp_1(m.norm_2(h))

    def program(m, x):
        h = m.embed(x)
        h = checkpoint.checkpoint(layer, m, h, use_reentrant=False)
        return m.head(m.norm_f(h))

    gm = dynamo_graph(toy(program), (tokens(),))
    assert any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in gm.graph.nodes)
    streams = analyze_(gm).streams
    assert stream_text(streams, gm).split() == TWO_LAYERS.split()
    tagged = [n for n in gm.graph.nodes if "recompute" in n.meta]
    assert {"attn_1", "mlp_1"} <= {_last_module(n) for n in tagged}
    assert not {"head", "norm_f"} & {_last_module(n) for n in tagged}


def _last_module(node):
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(next(reversed(stack.values()))[0]).rsplit(".", 1)[-1].strip("]'\"")


def test_a_region_that_is_compiled_once_is_inlined():
    @torch.compiler.nested_compile_region
    def layer(h, weight):
        return h + torch.tanh(h @ weight)

    def program(m, x):
        h = m.embed(x)
        for _ in range(3):
            h = layer(h, m.mlp_1.weight)
        return m.head(m.norm_f(h))

    gm = dynamo_graph(toy(program), (tokens(),))
    (stream,) = analyze_(gm).streams
    assert stream.num_sublayers == 3
    assert [r.position for r in stream.depth_reads] == [1, 2, 3]


def test_a_region_that_cannot_be_inlined_is_named_in_the_report():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = torch.cond(h.sum() > 0, lambda h: h + m.mlp_1(h), lambda h: h + m.mlp_2(h), (h,))
        h = h + m.mlp_3(m.norm_3(h))
        return m.head(m.norm_f(h))

    assert "cond" in str(ax.inspect(toy(program), (tokens(),)))


# --- streams that are not additive -------------------------------------------------------------------


def highway(m, x):
    h = m.embed(x)
    for norm, mlp, gate in ((m.norm_1, m.mlp_1, m.attn_1), (m.norm_2, m.mlp_2, m.attn_2)):
        g = torch.sigmoid(gate(h))
        h = g * h + (1 - g) * mlp(norm(h))
    return m.head(m.norm_f(h))


def gated_carry(m, x):
    h = m.embed(x)
    for norm, mlp, gate in ((m.norm_1, m.mlp_1, m.attn_1), (m.norm_2, m.mlp_2, m.attn_2)):
        h = torch.sigmoid(gate(h)) * h + mlp(norm(h))
    return m.head(m.norm_f(h))


def hyper_connections(m, x):
    streams = m.embed(x).unsqueeze(2).expand(-1, -1, 4, -1)
    for norm, mlp, mix in ((m.norm_1, m.mlp_1, m.attn_1), (m.norm_2, m.mlp_2, m.attn_2)):
        weights = torch.tanh(mix(streams.mean(2)))[..., :4]
        out = mlp(norm((weights.unsqueeze(-1) * streams).sum(2)))
        streams = torch.einsum(
            "btij,btjd->btid", torch.softmax(weights, -1).unsqueeze(-1).expand(-1, -1, -1, 4), streams
        )
        streams = streams + weights.unsqueeze(-1) * out.unsqueeze(2)
    return m.head(m.norm_f(streams.sum(2)))


@pytest.mark.parametrize("program", [highway, gated_carry, hyper_connections])
def test_a_stream_that_is_not_additive_is_refused_by_name(program):
    model = toy(program)
    with pytest.raises((ax.errors.NotAdditiveError, ax.errors.NoStreamError)) as raised:
        ax.convert(model, (tokens(),), config=ax.AttnResConfig(variant="full"))
    assert isinstance(raised.value, ax.errors.NotAdditiveError)


GATED = {
    "lerp": lambda h, f, g: torch.lerp(h, f, g),
    "moved towards the branch": lambda h, f, g: h + g * (f - h),
    "highway": lambda h, f, g: h * (1 - g) + f * g,
}


@pytest.mark.parametrize("how", GATED)
def test_a_carry_gated_by_the_stream_is_refused_however_it_is_spelled(how):
    def program(m, x):
        h = m.embed(x)
        for i in (1, 2, 3):
            h = GATED[how](h, getattr(m, f"attn_{i}")(getattr(m, f"norm_{i}")(h)), torch.sigmoid(m.mlp_1(h)))
        return m.head(m.norm_f(h))

    with pytest.raises(NotAdditiveError, match="gated carry"):
        ax.convert(toy(program), (tokens(),))


def test_a_gate_inside_a_sublayer_stops_nothing():
    def program(m, x):
        h = m.embed(x)
        for i in (1, 2):
            n = getattr(m, f"norm_{i}")(h)
            weights = torch.sigmoid(m.mlp_1(n))
            h = h + (weights * n + (1 - weights) * getattr(m, f"attn_{i}")(n))
        return m.head(m.norm_f(h))

    converted = ax.convert(toy(program), (tokens(),))
    assert len(converted.attnres.reads) == 2
    assert "inside a sublayer" in str(converted.report)


def test_naming_a_stream_goes_past_what_is_refused_elsewhere():
    def program(m, x):
        h = m.embed(x)
        h = h + m.attn_1(m.norm_1(h))
        h = h + m.attn_2(m.norm_2(h))
        g = m.positions(x)
        for _ in range(2):
            g = torch.lerp(g, m.attn_3(m.norm_3(g)), torch.sigmoid(m.mlp_1(g)))
        return m.head(m.norm_f(h)), g

    with pytest.raises(NotAdditiveError):
        ax.convert(toy(program), (tokens(),))
    name = ax.inspect(toy(program), (tokens(),)).streams[0].name
    assert len(ax.convert(toy(program), (tokens(),), config=ax.AttnResConfig(streams=[name])).attnres.reads) == 2


def test_where_a_stream_is_cut_by_something_that_is_no_sum_the_report_says_so():
    def program(m, x):
        h = m.embed(x)
        h = (h + m.attn_1(m.norm_1(h))).clamp(-9, 9)
        h = h + m.attn_2(m.norm_2(h))
        return m.head(m.norm_f(h))

    text = str(ax.convert(toy(program), (tokens(),)).report)
    assert "interrupted: clamp" in text and "do not reach what was written before" in text
