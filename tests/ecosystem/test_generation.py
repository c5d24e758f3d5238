"""transformers' ways to generate on the compiled route: the original's tokens at zero queries."""

import copy

import pytest
import torch

import attnres_fx as ax

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 50, (1, 6), generator=torch.Generator().manual_seed(2))
ASKED = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=50)).eval()


@pytest.fixture(scope="module")
def models():
    original = llama()
    compiled = copy.deepcopy(original)
    ax.compile(compiled, kwargs={"input_ids": IDS}, inner="eager")
    return original, compiled


@pytest.mark.slow
def test_assisted_decoding_on_both_sides(models):
    original, compiled = models
    wanted = original.generate(IDS, **ASKED)
    assistant = llama(seed=1)
    assert torch.equal(compiled.generate(IDS, assistant_model=assistant, **ASKED), wanted)
    ax.compile(assistant, kwargs={"input_ids": IDS}, inner="eager")
    assert torch.equal(original.generate(IDS, assistant_model=assistant, **ASKED), wanted)


@pytest.mark.slow
def test_a_static_cache(models):
    original, compiled = models
    wanted = original.generate(IDS, **ASKED)
    assert torch.equal(compiled.generate(IDS, cache_implementation="static", **ASKED), wanted)


@pytest.mark.slow
def test_a_pipeline_for_text(models):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
    said = [transformers.pipeline("text-generation", model=m, tokenizer=tokenizer)("w4 w9 w7", **ASKED) for m in models]
    assert said[0] == said[1]
    assert said[0][0]["generated_text"].removeprefix("w4 w9 w7").count("w") == ASKED["max_new_tokens"]
