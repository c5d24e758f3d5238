"""What depth attention refuses, and that each refusal names the source or argument to look at."""

import pytest
import torch

from attnres_fx.errors import AttnResError, OperatorError
from attnres_fx.ops import depth_attention
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
