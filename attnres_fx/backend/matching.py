"""The reads of one graph and those that were attached: which is which."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from attnres_fx.backend.attachment import ReadKey, read_key
from attnres_fx.backend.handed_over import HandedOver, is_outside, runs_module
from attnres_fx.backend.mismatch import mismatch_message
from attnres_fx.config import AttnResConfig
from attnres_fx.errors import BackendError, ScheduleError
from attnres_fx.passes import ReadPlan, StreamSet, topology_of
from attnres_fx.passes.streams.stream import Stream


@dataclass(frozen=True)
class MatchedReads:
    """A plan whose reads are those that were attached.

    Attributes:
        plan: Of this graph.
        weights: The tensors of each of its reads, by the name that the read has in the plan.
    """

    plan: ReadPlan
    weights: Mapping[str, Mapping[str, Node]]


def match_reads(gm: GraphModule, streams: StreamSet, handed: HandedOver) -> MatchedReads:
    """Match the reads of a graph with what was attached.

    A stream may be absent as a whole where the graph does not call the module that runs it, as an encoder is absent
    from a step of its decoder.

    Raises:
        BackendError: They do not match; it says where.
    """
    plan = _plan(gm, streams, handed)
    actual = _under_attached_streams({read_key(read): read.read for read in plan.reads}, list(handed.weights))
    present = {key.stream for key in actual}
    expected = {k for k in handed.weights if k.stream in present or not _may_be_absent(gm, k.stream, handed)}
    matched = _matched(expected, actual)
    if matched is None:
        larger = any(c.meta.get("nn_module_stack") for c in handed.calls)
        raise BackendError(mismatch_message(gm, expected, set(actual), in_larger=larger))
    return MatchedReads(plan, {actual[key]: handed.weights[attached] for key, attached in matched.items()})


def _plan(gm: GraphModule, streams: StreamSet, handed: HandedOver) -> ReadPlan:
    option = handed.config.streams
    names = {s.name for s in streams.streams}
    known = option if isinstance(option, str) else [n for n in option if n in names]
    nodes = {n.name: n for n in gm.graph.nodes}

    def is_inside(stream: Stream) -> bool:
        return not all(is_outside(nodes[t.written_by], handed.calls) for t in stream.terms if t.written_by in nodes)

    selected = tuple(filter(is_inside, streams.select(known) if known else ()))
    plan = topology_of(handed.config).plan
    try:
        return plan(streams, selected, handed.config)
    except ScheduleError:  # a part of the model has fewer sublayers; what its reads are does not depend on blocks
        if not isinstance(handed.config, AttnResConfig):
            raise
        plain = replace(handed.config, variant="full", num_blocks=None, block_size=None, boundaries=None)
        return plan(streams, selected, plain)


def _under_attached_streams(actual: dict[ReadKey, str], attached: Sequence[ReadKey]) -> dict[ReadKey, str]:
    """The reads under the streams that were attached.

    A stream is named after what reads it too. Where a part runs by itself its last reader is missing, and it may have
    another name: it is the attached stream with the same reads.
    """
    by_stream: dict[str, list[ReadKey]] = {}
    for key in actual:
        by_stream.setdefault(key.stream, []).append(key)
    missing = [s for s in dict.fromkeys(k.stream for k in attached) if s not in by_stream]
    names: dict[str, str] = {}
    for stream, keys in by_stream.items():
        if any(k.stream == stream for k in attached):
            continue
        for other in missing:
            same = [k for k in attached if k.stream == other]
            if other not in names.values() and _matched(same, [replace(k, stream=other) for k in keys]) is not None:
                names[stream] = other
                break
    return {replace(key, stream=names.get(key.stream, key.stream)): read for key, read in actual.items()}


def _may_be_absent(gm: GraphModule, stream: str, handed: HandedOver) -> bool:
    home = handed.homes.get(stream, "")
    return home != "" and not runs_module(gm, home)


def _matched(expected: Collection[ReadKey], actual: Collection[ReadKey]) -> dict[ReadKey, ReadKey] | None:
    """The attached read of each read of the graph; None where they are not the same reads."""
    left = sorted(expected)
    matched: dict[ReadKey, ReadKey] = {}
    for fits in (_have_one_name, _may_be_one_read):
        for key in sorted(set(actual) - set(matched)):
            same = next((k for k in left if _place(k) == _place(key) and fits(k.name, key.name)), None)
            if same is not None:
                left.remove(same)
                matched[key] = same
    return matched if not left and len(matched) == len(actual) else None


def _have_one_name(attached: str, actual: str) -> bool:
    return attached == actual


def _place(key: ReadKey) -> object:
    return key.stream, key.position, key.extras, key.width, key.gated


def _may_be_one_read(attached: str, actual: str) -> bool:
    """Whether two names at one place of a stream can be one read.

    An adapter puts the module that consumes a state inside another (`mix` becomes `mix.base_layer`), and what leaves
    the graph of a part, or of the model into a larger function, is no output in the other.
    """
    attached, actual = attached.split("#")[0], actual.split("#")[0]
    one_inside_the_other = attached.startswith(f"{actual}.") or actual.startswith(f"{attached}.")
    return one_inside_the_other or "output" in (attached, actual)
