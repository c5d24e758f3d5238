"""transformers' Trainer on both routes: the same losses as the original's at the start, and the same after a resume."""

import inspect

import pytest
import torch
from torch.utils.data import Dataset

import attnres_fx as ax

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

LENGTH, ROWS = 9, 16
ROUTES = ["convert", "compile"]


class Rows(Dataset):
    """Rows of which some have few labels, so that a mean over batches is no mean over labels."""

    def __init__(self):
        self.ids = torch.randint(3, 50, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
        self.labels = self.ids.clone()
        self.labels[::3, 4:] = -100

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        mask = torch.ones(LENGTH, dtype=torch.long)
        return {"input_ids": self.ids[i], "attention_mask": mask, "labels": self.labels[i]}


def model_on(route, *, tied=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=50, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).train()
    rows = Rows()
    example = {name: torch.stack([rows[i][name] for i in range(4)]) for name in rows[0]}
    config = ax.AttnResConfig(variant="block", block_size=3)
    if route == "convert":
        return ax.convert(model, kwargs=example, config=config, check=False)
    if route == "compile":
        ax.compile(model, kwargs=example, config=config, inner="eager")
    return model


def trainer(model, folder, **options):
    given = {"per_device_train_batch_size": 4, "max_steps": 3, "save_steps": 2, "logging_steps": 1, "seed": 3}
    given |= {"learning_rate": 1e-3, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(folder), **given, **options)
    return transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_accumulated_steps_a_resume_and_an_evaluation(tmp_path, route):
    options = {"gradient_accumulation_steps": 2}
    plain = trainer(model_on("original"), tmp_path / "plain", **options)
    plain.train()
    run = trainer(model_on(route), tmp_path / "run", **options)
    run.train()
    # The rates of Trainer change nothing before the first step; after it the two are two functions.
    assert losses(run)[0] == pytest.approx(losses(plain)[0], abs=1e-4)
    with torch.no_grad():
        assert any(read.query.any() for read in run.model.attnres.reads)
    resumed = trainer(model_on(route), tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == losses(run)
    assert resumed.evaluate()["eval_loss"] == pytest.approx(run.evaluate()["eval_loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_half_precision_and_tied_weights(tmp_path, route):
    found = {}
    for kind in ("original", route):
        run = trainer(model_on(kind, tied=True), tmp_path / kind, bf16=True)
        run.train()
        found[kind] = losses(run)[0]
        assert run.model.lm_head.weight is run.model.model.embed_tokens.weight
    assert found[route] == pytest.approx(found["original"], abs=2e-3)


@pytest.mark.slow
def test_checkpointing_asked_of_a_converted_model_names_the_other_route(tmp_path):
    with pytest.raises(ax.AttnResError, match=r"ax\.compile"):
        trainer(model_on("convert"), tmp_path, gradient_checkpointing=True).train()


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_an_outer_compiler_is_refused_with_what_to_do(tmp_path, route):
    says = {"convert": r"make such a call once outside", "compile": r"torch_compile=True\) takes its place"}[route]
    with pytest.raises(ax.AttnResError, match=says):
        trainer(model_on(route), tmp_path, torch_compile=True, torch_compile_backend="eager").train()


@pytest.mark.slow
def test_the_signature_says_that_the_loss_takes_the_number_of_labels():
    for route in ROUTES:
        shown = inspect.signature(model_on(route).forward).parameters.values()
        assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in shown)
