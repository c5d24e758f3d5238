"""What depth attention refuses, and that each refusal names the source or argument to look at."""

import re

import pytest
import torch

from attnres_fx.errors import AttnResError, OperatorError
from attnres_fx.ops import depth_attention, depth_attention_batch, depth_attention_fused, depth_attention_merge
from attnres_fx.ops.operator import DEPTH_ATTENTION

x, w = torch.randn(4, 8), torch.randn(8)
REFUSED = {
    "no sources": ([], w, w, "empty list of sources"),
    "integer source": ([x, x.long()], w, w, r"source 1 is torch\.int64"),
    "boolean source": ([x, x, x > 0], w, w, r"source 2 is torch\.bool"),
    "complex source": ([x.to(torch.complex64)], w, w, r"source 0 is torch\.complex64"),
    "source without dimensions": ([torch.tensor(1.0)], w, w, "source 0 has no dimensions"),
    "another width": ([x, x, x[:, :4]], w, w, r"source 2 has shape \(4, 4\).*source 0 \(4, 8\)"),
    "sources that would broadcast": ([x, x[:1]], w, w, r"source 1 has shape \(1, 8\)"),
    "fewer dimensions": ([x, x[0]], w, w, r"source 1 has shape \(8,\)"),
    "source on another device": ([x, x.to("meta")], w, w, "source 1 is on meta and source 0 on cpu"),
    "query on another device": ([x, x], w.to("meta"), w, "query is on meta and the sources on cpu"),
    "key_weight on another device": ([x, x], w, w.to("meta"), "key_weight is on meta"),
    "query of another width": ([x, x], w[:4], w, r"query is torch\.float32 \(4,\).*\(8,\)"),
    "query of width one": ([x, x], w[:1], w, r"query is torch\.float32 \(1,\)"),
    "query with two dimensions": ([x, x], w[None], w, r"query is torch\.float32 \(1, 8\)"),
    "query without dimensions": ([x, x], torch.tensor(1.0), w, r"query is torch\.float32 \(\)"),
    "integer query": ([x, x], w.long(), w, r"query is torch\.int64"),
    "key_weight of another width": ([x, x], w, w[:4], r"key_weight is torch\.float32 \(4,\)"),
    "key_weight with two dimensions": ([x, x], w, w[None], r"key_weight is torch\.float32 \(1, 8\)"),
    "numbers for sources": ([1.0, 2.0], w, w, "source 0 is a float"),
    "no query": ([x, x], None, w, "query is a NoneType"),
    "integer key_weight": ([x, x], w, w.long(), r"key_weight is torch\.int64"),
}


@pytest.mark.parametrize(("sources", "query", "key_weight", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_by_name(sources, query, key_weight, message):
    with pytest.raises(OperatorError, match=message):
        depth_attention(sources, query, key_weight)


IN_A_NODE = {name: case for name, case in REFUSED.items() if name not in ("numbers for sources", "no query")}


@pytest.mark.parametrize(("sources", "query", "key_weight", "message"), IN_A_NODE.values(), ids=IN_A_NODE)
def test_the_node_in_a_graph_refuses_what_the_function_refuses(sources, query, key_weight, message):
    with pytest.raises(OperatorError, match=message):
        DEPTH_ATTENTION(sources, query, key_weight, 1e-6, 1.0)


def test_errors_are_the_librarys_and_value_errors():
    with pytest.raises(AttnResError):
        depth_attention([], w, w)
    with pytest.raises(ValueError):
        depth_attention([], w, w)


def test_eps_and_gain_are_given_by_name():
    with pytest.raises(TypeError):
        depth_attention([x, x], w, w, 1e-6)


@pytest.mark.parametrize("eps", [-1e-6, float("inf"), float("nan")])
def test_an_eps_that_means_nothing_is_refused(eps):
    with pytest.raises(OperatorError, match="eps is"):
        depth_attention([x, x], w, w, eps=eps)


# -- fused and two-phase forms


def bad(**changes):
    given = {"sources": [torch.ones(3, 8)] * 2, "query": torch.ones(8), "key_weight": torch.ones(8), **changes}
    return lambda: depth_attention_fused(**given)


def bad_merge(**changes):
    x, d = torch.ones(3, 8), torch.ones(8)
    given = {"mixed": x, "lse": torch.ones(3), "partial": x, "query": d, "key_weight": d, **changes}
    return lambda: depth_attention_merge(**given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(sources=[]), "empty list"),
        (bad(sources=torch.ones(2, 3, 8)), "one tensor"),
        (bad(delta=torch.ones(3, 7)), "delta is torch.float32 (3, 7)"),
        (bad(delta=torch.ones(3, 8, dtype=torch.int64)), "delta is torch.int64"),
        (bad(delta=torch.ones(3, 8, device="meta")), "delta is on meta"),
        (bad(norm=3), "norm is 3"),
        (bad(norm=1, norm_weight=torch.ones(1, 8)), "norm_weight is torch.float32 (1, 8)"),
        (bad(norm=2, norm_bias=torch.ones(7)), "norm_bias is torch.float32 (7,)"),
        (bad(norm_weight=torch.ones(8)), "norm is 0"),
        (bad(norm=1, norm_eps=float("nan")), "norm_eps is nan"),
        (bad(norm=1, norm_eps=-1.0), "norm_eps is -1.0"),
        (bad(dtype=torch.int32), "dtype is torch.int32"),
        (bad_merge(lse=torch.ones(4)), "lse is torch.float32 (4,)"),
        (bad_merge(partial=torch.ones(3, 9)), "source 1 has shape (3, 9)"),
        (bad_merge(delta=torch.ones(8)), "delta is torch.float32 (8,)"),
        (lambda: depth_attention_batch([torch.ones(3, 8)], [], []), "0 queries"),
        (lambda: depth_attention_batch([torch.ones(3, 8)], [torch.ones(8)], []), "0 key_weights"),
        (lambda: depth_attention_batch(torch.ones(3, 8), [torch.ones(8)], [torch.ones(8)]), "lists of tensors"),
    ],
    ids=range(18),
)
def test_what_the_fused_forms_cannot_take_is_refused(call, message):
    with pytest.raises(OperatorError, match=re.escape(message)):
        call()
