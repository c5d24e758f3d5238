"""The depth of models in numbers, against hooks and gradients written out by hand."""

import json
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import attnres_fx as ax
from attnres_fx.errors import ArgumentError, NoStreamError
from tests.support.stream_text import VARIANTS, tokens, toy


def four_layers(m, x):
    h = m.embed(x)
    for i in (1, 2, 3, 4):
        h = h + getattr(m, f"mlp_{i}")(getattr(m, f"norm_{i}")(h))
    return m.head(m.norm_f(h))


def loss(y):
    return y.square().mean()


def by_hand(model, x):
    """Written values and states of `four_layers` from hooks, with the gradients of what is written."""
    written, states = [], []
    hooks = [model.embed.register_forward_hook(lambda m, a, y: written.append(y))]
    hooks += [getattr(model, f"mlp_{i}").register_forward_hook(lambda m, a, y: written.append(y)) for i in (1, 2, 3, 4)]
    norms = [*(getattr(model, f"norm_{i}") for i in (1, 2, 3, 4)), model.norm_f]
    hooks += [n.register_forward_pre_hook(lambda m, a: states.append(a[0])) for n in norms]
    value = loss(model(x))
    for hook in hooks:
        hook.remove()
    return written, states, torch.autograd.grad(value, written), value


def rms(x):
    return x.square().mean().sqrt().item()


def test_magnitudes_gradients_and_shares_of_an_original_are_those_of_hooks_and_autograd():
    model = toy(four_layers)
    written, states, gradients, value = by_hand(model, tokens())
    profile = ax.profile_depth(model, (tokens(),), loss=loss)
    (stream,) = profile.streams
    found = [stream.root, *stream.sublayers]
    assert [s.magnitude for s in found] == pytest.approx([rms(w) for w in written], rel=1e-6)
    assert [s.gradient for s in found] == pytest.approx([g.norm().item() for g in gradients], rel=1e-5)
    assert [r.magnitude for r in stream.reads] == pytest.approx([rms(h) for h in states[1:]], rel=1e-6)
    last = states[-1]
    shares = [((w * last).sum(-1) / last.square().sum(-1)).mean().item() for w in written]
    assert [s.share for s in found] == pytest.approx(shares, rel=1e-5, abs=1e-7)
    assert sum(shares) == pytest.approx(1.0)
    assert profile.loss == pytest.approx(value.item()) and not profile.converted


def test_entropy_and_reach_of_a_read_are_those_of_the_norms_it_adds_up():
    model = toy(four_layers)
    written, _, _, _ = by_hand(model, tokens())
    read = ax.profile_depth(model, (tokens(),)).streams[0].reads[1]
    norms = torch.stack([w.norm(dim=-1) for w in written[:3]])
    mixture = norms / norms.sum(0)
    assert read.sources == ("v_0", "v_1", "v_2") and read.position == 2
    assert read.mixture == pytest.approx(mixture.flatten(1).mean(1).tolist(), rel=1e-5)
    assert read.entropy == pytest.approx(-(mixture * mixture.log()).sum(0).mean().item(), rel=1e-5)
    assert read.reach == pytest.approx(2 * read.mixture[0] + read.mixture[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_conversion_has_the_profile_of_its_original(variant):
    model = toy(four_layers)
    before = ax.profile_depth(model, (tokens(),), loss=loss).streams[0]
    converted = ax.convert(model, (tokens(),), config=VARIANTS[variant], check=False)
    profile = ax.profile_depth(converted, (tokens(),), loss=loss)
    after = profile.streams[0]
    assert profile.converted
    for one, other in zip([before.root, *before.sublayers], [after.root, *after.sublayers], strict=True):
        assert other.magnitude == pytest.approx(one.magnitude, rel=1e-5)
        assert other.gradient == pytest.approx(one.gradient, rel=1e-4)
        if variant != "local":
            assert other.share == pytest.approx(one.share, rel=1e-4, abs=1e-6)
    assert [r.magnitude for r in after.reads] == pytest.approx([r.magnitude for r in before.reads], rel=1e-5)
    assert (after.halves is None) == (variant == "local")


def test_a_trained_read_is_measured_by_what_it_weighs():
    model = toy(four_layers)
    converted = ax.convert(model, (tokens(),), config=VARIANTS["full"], check=False)
    for seed, read in enumerate(converted.attnres.reads):
        nn.init.normal_(read.query, generator=torch.Generator().manual_seed(seed))
    weights = ax.depth_weights(converted, (tokens(),), per_token=True).reads[0]
    vectors = [model.embed(tokens()), model.mlp_1(model.norm_1(model.embed(tokens())))]
    brought = torch.stack([w * v.norm(dim=-1) for w, v in zip(weights.weights, vectors, strict=True)])
    mixture = (brought / brought.sum(0)).flatten(1).mean(1)
    profile = ax.profile_depth(converted, (tokens(),)).streams[0]
    assert profile.reads[0].mixture == pytest.approx(mixture.tolist(), rel=1e-5)
    assert sum(share for _, share in profile.source_shares) == pytest.approx(1.0, rel=1e-5)
    assert sum(s.share for s in (profile.root, *profile.sublayers)) == pytest.approx(1.0, rel=1e-5)


def test_an_attached_model_is_profiled_as_a_converted_one():
    model = toy(four_layers)
    expected = str(ax.profile_depth(ax.convert(model, (tokens(),), check=False), (tokens(),), loss=loss))
    ax.attach(model, (tokens(),))
    assert str(ax.profile_depth(model, (tokens(),), loss=loss)).splitlines()[2:] == expected.splitlines()[2:]


def scaled(m, x):
    h = m.embed(x)
    h = 0.5 * (h + m.mlp_1(m.norm_1(h)))
    h = h + m.mlp_2(m.norm_2(h)) + m.mlp_3(m.norm_2(h))
    return m.head(m.norm_f(h[:, -1]))


def test_factors_parallel_branches_and_a_slice_before_the_last_norm_count_as_they_do_in_the_state():
    model = toy(scaled)
    stream = ax.profile_depth(model, (tokens(),), loss=loss).streams[0]
    v_0 = model.embed(tokens())
    v_1 = model.mlp_1(model.norm_1(v_0))
    h = 0.5 * (v_0 + v_1)
    v_2 = model.mlp_2(model.norm_2(h)) + model.mlp_3(model.norm_2(h))
    last = (h + v_2)[:, -1]
    parts = [(0.5 * v_0)[:, -1], (0.5 * v_1)[:, -1], v_2[:, -1]]
    shares = [((p * last).sum(-1) / last.square().sum(-1)).mean().item() for p in parts]
    assert [s.share for s in (stream.root, *stream.sublayers)] == pytest.approx(shares, rel=1e-5)
    assert stream.sublayers[1].magnitude == pytest.approx(rms(v_2), rel=1e-6)
    assert stream.reads[-1].magnitude == pytest.approx(rms(last), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss(model.head(model.norm_f((h + v_2)[:, -1]))), v_2)
    assert stream.sublayers[1].gradient == pytest.approx(gradient.norm().item(), rel=1e-5)


def post_norm(m, x):
    h = m.embed(x)
    for i in (1, 2, 3):
        h = getattr(m, f"norm_{i}")(h + getattr(m, f"mlp_{i}")(h))
    return m.head(h)


def test_a_stream_with_norms_on_it_has_magnitudes_and_gradients_and_says_why_it_has_no_shares():
    model = toy(post_norm)
    stream = ax.profile_depth(model, (tokens(),), loss=loss).streams[0]
    h = model.embed(tokens())
    assert stream.reads[0].magnitude == pytest.approx(rms(h + model.mlp_1(h)), rel=1e-6)
    assert stream.halves is None and "norms stand on the stream" in stream.verdict()
    assert stream.reads[0].entropy is None and all(s.share is None for s in stream.sublayers)
    converted = ax.convert(model, (tokens(),), config=VARIANTS["full"], check=False)
    after = ax.profile_depth(converted, (tokens(),), loss=loss).streams[0]
    assert [r.magnitude for r in after.reads] == pytest.approx([r.magnitude for r in stream.reads], rel=1e-5)
    pairs = zip(stream.sublayers, after.sublayers, strict=True)
    assert all(b.gradient == pytest.approx(a.gradient, rel=1e-4) for a, b in pairs)


def test_a_model_stays_as_it_is_while_it_is_profiled():
    model = nn.Sequential(nn.Linear(8, 8), Residual(), Residual()).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    profile = ax.profile_depth(model, (x,), loss=loss)
    assert torch.rand(()) == expected
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(s.gradient > 0 for s in profile.streams[0].sublayers)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.drop = nn.BatchNorm1d(5), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.mix(self.norm(x)))


def growing(m, x):
    h = m.embed(x)
    for i in (1, 2, 3, 4):
        h = h + 4**i * getattr(m, f"mlp_{i}")(getattr(m, f"norm_{i}")(h))
    return m.head(m.norm_f(h))


def test_the_verdict_tells_whether_early_layers_are_diluted():
    profile = ax.profile_depth(toy(growing), (tokens(),))
    assert profile.dilutes and "early layers are diluted" in str(profile) and profile.streams[0].growth > 10
    shrinking = ax.profile_depth(toy(lambda m, x: fading(m, x)), (tokens(),))
    assert shrinking.dilutes is False and "early layers are not diluted" in str(shrinking)


def fading(m, x):
    h = m.embed(x)
    for i in (1, 2, 3, 4):
        h = h + 8.0 ** (2 - i) * getattr(m, f"mlp_{i}")(getattr(m, f"norm_{i}")(h))
    return m.head(m.norm_f(h))


def test_a_profile_prints_draws_and_goes_through_json(tmp_path):
    profile = ax.profile_depth(toy(four_layers), (tokens(),))
    assert "no loss was given, so no gradients" in str(profile)
    assert max(map(len, str(profile).splitlines())) <= 120
    data = json.loads(profile.to_json())
    assert data["streams"][0]["sublayers"][0]["share"] == profile.streams[0].sublayers[0].share
    profile.plot(tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    rows = TableRows()
    rows.feed(profile._repr_html_())
    assert rows.count == 1 + 5 and not rows.open


class TableRows(HTMLParser):
    """Counts rows; `open` are the tags that were not closed in order."""

    def __init__(self):
        super().__init__()
        self.count, self.open = 0, []

    def handle_starttag(self, tag, attrs):
        self.count += tag == "tr"
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_what_cannot_be_profiled_is_refused_by_name():
    with pytest.raises(ArgumentError, match=r"scalar tensor that depends on the model; it returned a tensor \(2"):
        ax.profile_depth(toy(four_layers), (tokens(),), loss=lambda y: y)
    with pytest.raises(ArgumentError, match="meta device"):
        ax.profile_depth(toy(four_layers).to("meta"), (tokens(),))
    with pytest.raises(NoStreamError):
        ax.profile_depth(toy(lambda m, x: m.head(m.embed(x))), (tokens(),))
