"""What people see: a model as they would draw it, one line a remark, and nothing wider than a screen."""

import inspect
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import attnres_fx as ax
from attnres_fx.backend.compile_log import CompiledGraph
from attnres_fx.backend.explain import Explanation
from attnres_fx.passes import analyze_
from attnres_fx.shown import brief, by_kind, short_paths, table
from tests.support.stream_text import SPELLINGS, WIDTH, captured, rows, tokens, toy


class Norm(nn.Module):
    """A norm with code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.mix, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.mix(self.norm1(x)))  # mixes
        return x + self.down(self.up(self.norm2(x)).relu())  # feeds


class Text(nn.Module):
    """Embeddings that are normed and dropped, two blocks, a last norm."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens, self.embed_norm, self.drop = nn.Embedding(11, WIDTH), Norm(), nn.Dropout(0.1)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.last_norm = Norm()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.embed_norm(self.embed_tokens(ids)))
        for layer in self.layers:
            x = layer(x)
        return self.last_norm(x)  # ends


class Borrowed(nn.Module):
    """Torch's layers in a loop of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)  # borrows
        return x


def line_of(kind, comment):
    """Where a comment stands in the source of a class."""
    lines, start = inspect.getsourcelines(kind)
    return f"test_report.py:{start + next(i for i, line in enumerate(lines) if comment in line)}"


def stream_of(model, args, spelling):
    (stream,) = analyze_(captured(model, args, spelling)).streams
    return stream


def widest(text):
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("spelling", SPELLINGS[1:])
def test_a_read_is_on_the_line_of_the_layer_and_not_of_the_norm(spelling):
    stream = stream_of(Text().eval(), (tokens(),), spelling)
    lines = [read.line.rpartition("/")[2] for read in stream.depth_reads]
    mixes, feeds, ends = line_of(Block, "# mixes"), line_of(Block, "# feeds"), line_of(Text, "# ends")
    assert lines == [feeds, mixes, feeds, ends]
    assert [t.line.rpartition("/")[2] for t in stream.terms] == [mixes, feeds, mixes, feeds]


@pytest.mark.parametrize("spelling", SPELLINGS[1:])
def test_layers_of_a_library_are_on_the_line_that_calls_them(spelling):
    stream = stream_of(Borrowed(), (tokens(),), spelling)
    assert {r.line.rpartition("/")[2] for r in stream.depth_reads} == {line_of(Borrowed, "# borrows")}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_root_is_named_by_the_module_that_made_it(spelling):
    if spelling == "symbolic":
        model = toy(lambda m, x: m.norm_f((h := m.norm_1(m.embed(x)) * 2) + m.attn_1(m.norm_2(h))))
        assert stream_of(model, (tokens(),), spelling).made_by == "embed"
    else:
        assert stream_of(Text().eval(), (tokens(),), spelling).made_by == "embed_tokens"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_root_of_two_tables_is_named_by_both_and_an_input_by_its_name(spelling):
    def two(m, x):
        h = m.embed(x) + m.positions(x)
        return m.norm_f(h + m.attn_1(m.norm_1(h)))

    def given(m, x):
        return m.norm_f(x + m.attn_1(m.norm_1(x)))

    assert stream_of(toy(two), (tokens(),), spelling).made_by == "embed + positions"
    assert stream_of(toy(given), (rows(),), spelling).made_by == "x"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_root_that_nothing_makes_goes_by_what_is_called(spelling):
    def program(m, x):
        start = torch.zeros_like(x)
        h = start + m.attn_1(m.norm_1(start) + x)
        return m.norm_f(h + m.attn_2(m.norm_2(h)))

    assert stream_of(toy(program), (rows(),), spelling).made_by == "zeros_like"


def test_of_a_root_of_several_parts_each_is_seen_in_a_narrow_column():
    parts = " + ".join(f"model.encoder.{name}" for name in ("convolutions", "embed_positions"))
    cell = table([{"root": parts, "line": "x" * 20}], width=60).splitlines()[2]
    assert "…" in cell and "convolutions + " in cell and "embed_positions " in cell


class Queries(nn.Module):
    """Learned queries, spread over the batch of a memory that they read."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.queries = nn.Linear(4, WIDTH), nn.Parameter(torch.ones(1, 3, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memory, queries = self.into(x), self.queries
        h = queries.expand(x.shape[0], -1, -1)
        for norm in self.norms[:2]:
            q = norm(h)
            h = h + (q @ memory.transpose(1, 2)).softmax(-1) @ memory
        return self.norms[2](h)


def test_a_root_that_is_a_parameter_goes_by_its_name_and_not_by_what_its_sizes_come_from():
    assert ax.inspect(Queries().eval(), (torch.randn(2, 5, 4),)).streams[0].made_by == "queries"


def test_a_line_of_a_remark_is_never_the_librarys_own():
    residual = Residual(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)))
    again = Residual(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)))
    report = ax.inspect(nn.Sequential(residual, nn.Linear(WIDTH, WIDTH), again), (torch.randn(2, 5, WIDTH),))
    assert "interrupted" in str(report) and "recorder" not in str(report)


def test_inspect_lists_as_many_reads_as_it_announces_and_the_sublayer_that_each_feeds():
    report = ax.inspect(Text().eval(), (tokens(),))
    assert "Text: 1 residual stream, 4 reads" in str(report) and "embed_tokens" in str(report)
    listed = [row.split() for row in report.reads_table().splitlines()[2:]]
    assert [row[:3] for row in listed] == [
        ["layers.0.norm2", "down", "1"],
        ["layers.1.norm1", "mix", "2"],
        ["layers.1.norm2", "down", "3"],
        ["last_norm", "-", "4"],
    ]
    converted = ax.convert(Text().eval(), (tokens(),), check=False).report
    assert len(converted.reads_table().splitlines()[2:]) == converted.num_reads == 4


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Skipped(nn.Module):
    """A skip around the stack of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        for layer in self.layers:
            h = layer(h)
        return x + self.out(h)


@pytest.mark.slow
def test_inspect_says_what_convert_does_under_a_config_and_what_there_is_to_choose():
    model, args = Skipped().eval(), (torch.randn(2, 5, 4),)
    choices = {"main": 4, "all": 5, "stream": 4, ("stream", "out"): 5}
    for streams, reads in choices.items():
        config = ax.AttnResConfig(streams=streams)
        report, done = ax.inspect(model, args, config=config), ax.convert(model, args, config=config, check=False)
        assert report.converted == tuple(s.stream.name for s in done.report.streams)
        assert report.left == done.report.left and done.report.num_reads == reads
        assert f"{reads} reads (streams={config.streams!r})" in str(report)
    text = str(ax.inspect(model, args))
    assert ax.inspect(model, args).streams[1].made_by == "x"
    assert "takes 'main', 'all', or names" in text and "a skip around 'stream'" in text


@pytest.mark.parametrize("config", [ax.AttnResConfig(streams="nothing"), ax.AttnResConfig(num_blocks=50)])
def test_inspect_says_which_error_convert_raises(config):
    report = ax.inspect(Text().eval(), (tokens(),), config=config)
    with pytest.raises(ax.errors.AttnResError) as raised:
        ax.convert(Text().eval(), (tokens(),), config=config)
    assert report.error == f"{type(raised.value).__name__}: {raised.value}" and report.converted == ()
    assert "convert raises" in str(report)


def gated(m, x):
    h = m.embed(x)
    for mix, gate in ((m.attn_1, m.mlp_1), (m.attn_2, m.mlp_2), (m.attn_3, m.mlp_3)):
        h = torch.lerp(h, mix(h), gate(h).sigmoid())
    return m.head(h)


def masked(m, x):
    h, bias = m.embed(x), m.positions(x)
    for norm, mix in ((m.norm_1, m.attn_1), (m.norm_2, m.attn_2), (m.norm_3, m.attn_3)):
        h = h + mix((norm(h) + bias).relu())
    return m.norm_f(h)


@pytest.mark.parametrize(("program", "kind"), [(gated, "not additive"), (masked, "injected")])
def test_a_kind_of_remark_is_one_line_however_many_layers_have_it(program, kind):
    report = ax.inspect(toy(program), (tokens(),))
    said = [line for line in str(report).splitlines() if f"({kind})" in line]
    count = Counter(r.kind for r in report.refusals)[kind]
    assert len(said) == 1 and count > 0 and (count == 1 or f"{count} places, the first " in said[0])


def test_what_is_refused_is_not_said_to_be_missing():
    report = ax.inspect(toy(gated), (tokens(),))
    assert "no addition" not in str(report) and "NotAdditiveError" in report.error
    plain = ax.inspect(toy(lambda m, x: m.head(x)), (rows(),))
    assert "no addition" in plain.error and not plain.refusals


@pytest.mark.slow
def test_nothing_that_is_printed_is_wider_than_a_screen_and_no_repr_longer():
    model = Text(24).eval()
    converted = ax.convert(model, (tokens(),), config=ax.AttnResConfig(variant="full"), check=False)
    weights = ax.depth_weights(converted, (tokens(),))
    report, inspected = converted.report, ax.inspect(model, (tokens(),))
    for shown in (inspected, report, weights, weights.reads[-1], converted, report.streams[0]):
        assert len(repr(shown)) <= 5_000, type(shown)
    for text in (str(report), report.reads_table(), str(weights), inspected.reads_table()):
        assert widest(text) <= 120
    assert "48 reads" in repr(report) and len(str(weights).splitlines()) == 2 + 2 + 48
    assert "49 sources, one shade a source" in str(weights) and "v_0     v_8 " in str(weights)


def test_a_table_gives_up_the_beginning_of_its_widest_cells_or_goes_on_in_the_next_line():
    long = ".".join(f"part_{i}" for i in range(30))
    short = table([{"name": long, "count": 3}], width=40)
    assert widest(short) == 40 and short.endswith("part_29      3") and "…" in short
    words = "one two three four five six seven eight nine"
    wrapped = table([{"name": "a", "said": words}], wrapped=("said",), width=30)
    assert widest(wrapped) <= 30 and " ".join(" ".join(wrapped.splitlines()[2:]).split()) == f"a {words}"


def test_an_explanation_of_long_pass_lists_fits_a_screen():
    changed = tuple(f"some_long_name_of_a_pass_{i} (-{i} +{i})" for i in range(12))
    graph = CompiledGraph("train", True, ("[2, 5, 8]",) * 6, 48, changed, "inductor", "triton")
    text = str(Explanation("Text", ax.AttnResConfig(), ("norm",) * 48, [graph, graph]))
    assert widest(text) <= 120 and all(name.split()[0] in text for name in changed)


def test_texts_are_made_short_without_losing_what_they_say():
    assert short_paths("x in a.b (/home/me/code/net/model.py:3): y") == "x in a.b (net/model.py:3): y"
    assert by_kind(["a.0: set once", "a.1: set once", "other"]) == ["a.0 and 1 more place: set once", "other"]
    text = "\n".join(f"line {i}" for i in range(2_000))
    assert len(brief(text)) <= 5_000 and brief(text).startswith("line 0\n") and brief(text).endswith("line 1999")
    assert "more lines; print it" in brief(text) and brief("short") == "short" and len(brief("x" * 90_000)) <= 5_000
