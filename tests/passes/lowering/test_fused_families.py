"""What is folded into the reads does not depend on how a model was captured."""

from collections import Counter

import pytest
import torch

import attnres_fx as ax
from attnres_fx.passes.graph.operations import op_name
from tests.support.families import FAMILIES

#: One for each place and spelling of a norm; Qwen3 and Mixtral have Llama's.
NAMES = ("llama", "gpt2", "gpt_neox", "opt", "phi", "gemma2", "granite", "t5", "bart", "vit")


def reads_of(converted):
    nodes = converted.graph_module("eval", lowered=True).graph.nodes
    return Counter(op_name(n) for n in nodes if op_name(n).startswith("attnres_fx::"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_a_model_and_its_export_run_the_same_fused_reads(name):
    model, kwargs, _ = FAMILIES[name]()
    converted = ax.convert(model, kwargs=kwargs, dynamic_shapes={}, check=False)
    kwargs = {**kwargs, **converted.signature.bound_values}
    exported = torch.export.export(model, (), kwargs, strict=False)
    found = reads_of(converted)
    assert found == reads_of(ax.convert(exported, kwargs=kwargs, check=False))
    assert found["attnres_fx::depth_attention_fused"] > 0 or name == "bart"  # post-norm: no norm takes a read alone
