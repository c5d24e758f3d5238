"""Public models, written small: every read found, under its name and with its sources, as counted by hand."""

import pytest
import torch

import attnres_fx as ax
from tests.support.public_models import EXAMPLES, drawn
from tests.support.public_models.by_hand import BY_HAND, Reads
from tests.support.public_models.counted import CASES, counted

FULL = ax.AttnResConfig(variant="full")
#: Converted in both modes, which the conversion checks against the original; what moves is not in the eval graph.
IN_BOTH_MODES = ("dinov2", "patchtst")
INSPECTED = [name for name in CASES if name not in {*BY_HAND, *IN_BOTH_MODES}]


def reads_of(stream):
    return {read.name: 1 + read.position + len(read.extras) for read in stream.depth_reads}


def main_reads(report):
    return [reads_of(s) for s in report.streams if s.is_main]


def inspected(name, *, train=False, **options):
    model, args = EXAMPLES[name]()
    return ax.inspect(drawn(model).train(train), args, **options)


def check(streams, refusals, case):
    found = [(list(reads_of(s).items()), s.width) for s in streams]
    wanted = [(list(reads.items()), width) for reads, width in zip(case.main, case.widths, strict=True)]
    optional = [list(reads.items()) for reads in (*case.beside, *case.channels)]
    assert [f for f in found if f[0] not in optional] == wanted, (found, refusals)
    over_channels = [f for f in found if dict(f[0]) in case.channels]
    if case.channels and not over_channels:
        reasons = [r.reason for r in refusals if r.kind == "width"]
        assert len(reasons) == len(case.channels), refusals
        assert all("dimension 1" in why or "channel" in why for why in reasons), refusals
    else:
        assert tuple(width for _, width in over_channels) == case.channel_widths, found
    assert sum(r.kind == "interrupted" for r in refusals) >= case.ends, refusals


def check_report(report, case):
    check([s for s in report.streams if s.is_main], report.refusals, case)


def check_converted(report, case):
    check([plan.stream for plan in report.streams], report.refusals, case)


@pytest.mark.parametrize("name", INSPECTED)
def test_a_public_model_has_the_reads_that_are_counted_by_hand(name):
    check_report(inspected(name), CASES[name])


@pytest.mark.parametrize("name", IN_BOTH_MODES)
@pytest.mark.slow
def test_a_public_model_computes_the_same_with_these_reads_in_both_modes(name):
    model, args = EXAMPLES[name]()
    converted = ax.convert(drawn(model), args, config=FULL)
    check_converted(converted.report, CASES[name])
    converted.train()
    assert set(converted.report.modes) == {"eval", "train"}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.slow
def test_a_public_model_computes_attention_residuals_written_by_hand(name):
    model, args = EXAMPLES[name]()
    converted = ax.convert(drawn(model), args, config=FULL, check="outputs")
    if name in CASES:
        check_converted(converted.report, CASES[name])
    generator, by_hand = torch.Generator().manual_seed(2), Reads(converted.attnres.reads)
    with torch.no_grad():
        for read in converted.attnres.reads:
            read.query.normal_(generator=generator)
            if read.gate is not None:
                read.gate.fill_(0.7)
        found, expected, plain = converted(*args), BY_HAND[name](model, by_hand, *args), model(*args)
    assert {read.read: len(read.sources) for read in converted.report.reads} == by_hand.given
    scale = expected.abs().max()
    assert (expected - plain).abs().max() > 1e-2 * scale
    assert (found - expected).abs().max() <= 1e-5 * scale


def test_a_branch_of_a_part_of_the_batch_is_written_into_the_one_stream():
    """Picking rows of a batch moves rows: the norm of the picked rows reads, as it does in eval mode."""
    check_report(inspected("dinov2", train=True, dynamic_shapes={"image": {}}), CASES["dinov2"])


@pytest.mark.slow
def test_streams_of_text_and_image_that_are_joined_go_on_or_are_said_to_end():
    """A joined state is of two streams: its rows keep the sources of each, or both are read where they are joined."""
    report = inspected("flux")
    found = main_reads(report)
    apart = {"doubles.0.image_norm2": 2, "doubles.0.text_norm2": 2}
    together = {name: sources for reads in found for name, sources in reads.items()}
    if "singles.0" not in together:
        assert together == {**apart, "singles.0.norm": 3, "singles.1.norm": 4, "last.norm": 5}, str(report)
        return
    joined = {"singles.0": 3, "singles.0#2": 3}
    assert together == {**apart, **joined, "singles.1.norm": 2, "last.norm": 3}, str(report)
    assert any(r.kind == "interrupted" for r in report.refusals), str(report)


def test_two_lanes_are_both_main():
    """Attention reads the right lane alone, so the left lane's first sum may be its first sublayer or its root."""
    found = main_reads(inspected("two lanes"))
    left = [{"layers.0.norm2": 2, "layers.1.norm2": 3}, {"layers.1.norm2": 2}]
    assert {"layers.1.norm1": 2, "norm_right": 3} in found
    assert any(reads in left for reads in found) and len(found) == 2, found


@pytest.mark.parametrize(
    "name, main",
    [
        ("rwkv-7", counted("blocks.0.ln2", "blocks.1.ln1", "blocks.1.ln2", "ln_out")),
        ("mamba", counted("norms.1", "norm")),
    ],
)
@pytest.mark.slow
def test_a_recurrence_over_time_gives_no_reads_at_any_length(name, main):
    """Under `streams="all"` neither: no stream, main or nested, grows with the length."""
    found = []
    for length in (2, 3):
        model, (tokens,) = EXAMPLES[name]()
        report = ax.inspect(drawn(model), (tokens[:, :1].repeat(1, length),))
        assert main_reads(report) == [main], f"{length}: {report}"
        found.append(sorted(map(str, map(reads_of, report.streams))))
    assert found[0] == found[1]


def test_a_gated_residual_is_refused_by_name():
    model, args = EXAMPLES["gate residual"]()
    with pytest.raises(ax.errors.NotAdditiveError, match="gate"):
        ax.convert(drawn(model), args, config=FULL)
