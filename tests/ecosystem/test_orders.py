"""The table of docs/ecosystem.md: what is done to a model in which order, by numbers or by the error that says it."""

import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnres_fx as ax
from tests.support.paths import ROOT
from tests.support.process_groups import found_by_processes
from tests.support.sharded_rows import ROWS as SHARDED
from tests.support.sharded_rows import ax_compiled, batch, converted, example, moved, net

#: Sharded rows that raise, with what the error says to do.
REFUSED = {
    "fully_shard, convert": "Attach or convert the model first, and shard it afterwards",
    "fully_shard, attach": "Attach or convert the model first, and shard it afterwards",
    "convert, fully_shard by layers": r"fully_shard\(model\), or use ax\.compile",
    "attach, fully_shard of layers alone, compile": r"shard the model itself too, fully_shard\(model\)",
    "parallelize_module, convert": "Attach the model first",
    "parallelize_module, attach, compile": "Attach the model first",
    "convert, parallelize_module": "use ax.compile: shard or parallelize its blocks after",
}


def lora(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False, **options)
    )


def lora_after_compile(**options):
    model = lora(ax_compiled(net()), **options)
    model.base_model.model.attnres.requires_grad_(True)  # PEFT freezes what it does not know
    return model


def quantized(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        for layer in self.inner.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.inner.norm(x)


def around(model):
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    compiled.attnres = model.attnres
    return compiled


#: Orders that work in one process: the original, and what is made of it.
WORKS = {
    "LoRA, convert": (lambda: lora(net()), lambda: converted(lora(net()))),
    "LoRA, ax.compile": (lambda: lora(net()), lambda: ax_compiled(lora(net()))),
    "ax.compile, LoRA": (lambda: lora(net()), lora_after_compile),
    "quantize_, convert": (lambda: quantized(net()), lambda: converted(quantized(net()))),
    "convert, quantize_": (lambda: quantized(net()), lambda: quantized(converted(net()))),
    "quantize_, ax.compile": (lambda: quantized(net()), lambda: ax_compiled(quantized(net()))),
    "ax.compile, quantize_": (lambda: quantized(net()), lambda: quantized(ax_compiled(net()))),
    "checkpointing, convert": (Checkpointed, lambda: converted(Checkpointed())),
    "checkpointing, ax.compile": (Checkpointed, lambda: ax_compiled(Checkpointed())),
    "convert, torch.compile": (net, lambda: around(converted(net()))),
}


@pytest.mark.slow
@pytest.mark.parametrize("order", WORKS)
def test_an_order_that_works_computes_the_original_and_trains_the_queries(order):
    original, made = (make() for make in WORKS[order])
    with torch.no_grad():
        off = (made(batch()) - original(batch())).abs().max()
    assert off <= 1e-6
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        (made(batch()) - batch().roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert moved(made) > 1e-6


def trained(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".query"):
                parameter.normal_(generator=torch.Generator().manual_seed(5))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("order", ["LoRA, ax.compile", "ax.compile, LoRA"])
def test_adapters_are_merged_and_switched_off_under_a_compiled_model(order):
    model = trained(lora(net()) if order.startswith("LoRA") else net())
    model = trained(ax_compiled(model) if order.startswith("LoRA") else lora(ax_compiled(model)))
    bare, (x,) = trained(converted(net())), example()
    with torch.no_grad():
        adapted = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-5)
        model.unmerge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(model(x), bare(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-5)
        assert (adapted - bare(x)).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("what", ["merge_adapter", "disable_adapter", "merge_and_unload"])
def test_adapters_of_a_converted_model_are_in_its_graph(what):
    model = converted(lora(net()))
    with pytest.raises(ax.AttnResError, match=r"ax\.compile"):
        if what == "disable_adapter":
            with model.disable_adapter():
                model(*example())
        else:
            (getattr(model, what)() or model)(*example())


@pytest.mark.slow
def test_the_original_s_adapters_are_followed_by_what_was_converted_from_it():
    original, (x,) = lora(net()), example()
    model = converted(original)
    with torch.no_grad():
        wanted = original(x)
        original.merge_adapter()
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-5)
        original.unmerge_adapter()
        with original.disable_adapter():
            torch.testing.assert_close(model(x), net()(x), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_adapters_put_into_a_converted_model_are_refused_and_go_in_before():
    with pytest.raises(ax.AttnResError, match=r"to the original before convert"):
        lora(converted(net()))(*example())


@pytest.mark.slow
def test_a_copy_of_the_queries_that_would_be_trained_in_vain_is_refused():
    model = lora_after_compile(modules_to_save=["attnres"])
    with pytest.raises(ax.AttnResError, match=r"attnres\.requires_grad_\(True\)"):
        model(*example())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What two processes found of each sharded row."""
    return found_by_processes("sharded_rows", tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("order", SHARDED)
def test_two_processes_and_an_order_of_sharding(order, sharded):
    found = sharded[order]
    if order in REFUSED:
        assert re.search(REFUSED[order], found["refused"])
        return
    assert found["original"] <= 1e-6 and found["steps"] <= 1e-5
    assert found["moved"] > 1e-2


def test_the_page_has_a_row_for_each_order_and_says_which_raise():
    page = (ROOT / "docs" / "ecosystem.md").read_text().partition("## Examples")[0]
    rows = dict(re.findall(r"^\| `([^|]+)` \| ([^|]+) \|", page, re.M))
    rows = {order.replace("`", ""): outcome for order, outcome in rows.items()}
    refused = {*REFUSED, "convert, LoRA", "LoRA, convert, merge_adapter", "LoRA, convert, disable_adapter"}
    refused |= {"ax.compile, LoRA with modules_to_save=[attnres]"}
    assert set(rows) == {*WORKS, *SHARDED, *refused, "LoRA, ax.compile, merge_adapter, disable_adapter"}
    assert {order for order, outcome in rows.items() if outcome.startswith("raises")} == refused
