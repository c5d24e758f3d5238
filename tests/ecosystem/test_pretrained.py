"""`save_pretrained` and `from_pretrained` of models with reads: the adapter lies beside the weights, and is found."""

import dataclasses
import json
import logging

import pytest
import torch

import attnres_fx as ax
from attnres_fx.errors import SaveError

transformers = pytest.importorskip("transformers")

CONFIG = ax.AttnResConfig(variant="block", block_size=3, output="mean")
IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(2))


def small_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=50)).eval()


def with_queries(route):
    model = small_llama()
    if route == "convert":
        model = ax.convert(model, kwargs={"input_ids": IDS}, config=CONFIG, check=False)
    else:
        ax.compile(model, kwargs={"input_ids": IDS}, config=CONFIG, inner="eager")
    with torch.no_grad():
        for read in model.attnres.reads:
            read.query.normal_()
    return model


@pytest.fixture(scope="module", params=["convert", "compile"])
def saved(request, tmp_path_factory):
    model, folder = with_queries(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.slow
def test_the_folder_gives_the_model_back(saved):
    model, folder = saved
    again = ax.from_pretrained(transformers.AutoModelForCausalLM, folder).eval()
    assert again.attnres.config == CONFIG
    ax.compile(again, inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_config_json_names_the_adapter(saved):
    said = json.loads((saved[1] / "config.json").read_text())
    assert said["attnres_fx"] == {"adapter": "attnres_config.json", **dataclasses.asdict(CONFIG)}
    assert said["architectures"] == ["LlamaForCausalLM"]


def test_the_plain_class_says_which_tensors_it_leaves_out(saved, caplog):
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        plain = transformers.AutoModelForCausalLM.from_pretrained(saved[1])
    transformers.utils.logging.disable_propagation()
    assert "attnres.reads.model__norm.query" in caplog.text and "UNEXPECTED" in caplog.text
    assert plain.config.attnres_fx["variant"] == "block"


def test_the_class_of_a_model_with_reads_loads_its_own_class(saved):
    model, folder = saved
    assert type(type(model).from_pretrained(folder)) is transformers.LlamaForCausalLM


def test_an_upload_in_one_go_is_refused(saved, tmp_path):
    with pytest.raises(SaveError, match="upload_folder"):
        saved[0].save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()


def test_another_process_than_the_main_one_writes_no_adapter(saved, tmp_path):
    saved[0].save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "attnres_config.json").exists()


@pytest.mark.slow
def test_a_part_of_an_attached_model_is_not_saved_by_itself(tmp_path):
    model = with_queries("compile")
    with pytest.raises(SaveError, match="'model' of an attached model"):
        model.model.save_pretrained(tmp_path)


def test_a_folder_without_an_adapter_is_refused_by_name(tmp_path):
    small_llama().save_pretrained(tmp_path)
    with pytest.raises(SaveError, match=r"no attnres_config\.json"):
        ax.from_pretrained(transformers.AutoModelForCausalLM, tmp_path)


def test_no_folder_and_nothing_on_the_hub():
    with pytest.raises(SaveError, match="is no folder, and no adapter was found on the hub"):
        ax.from_pretrained(transformers.AutoModelForCausalLM, "nobody/nothing", local_files_only=True)


def test_a_class_without_an_example_of_its_own_needs_one(saved):
    class Bare:
        @staticmethod
        def from_pretrained(folder):
            return torch.nn.Linear(2, 2)

    with pytest.raises(SaveError, match="example_args="):
        ax.from_pretrained(Bare, saved[1])
