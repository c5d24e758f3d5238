"""Train, save and read again with transformers' Trainer: `python examples/train_trainer.py` (needs accelerate).

A small Llama on bytes learns the sources of Python's standard library, with AttnRes, on the compiled route.
"""

import tempfile

import torch
from stdlib_text import stdlib_rows
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import attnres_fx as ax

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
rows = [{"input_ids": row.long(), "labels": row.long()} for row in stdlib_rows(64, files=4)[:256]]
ax.compile(model, kwargs={"input_ids": torch.zeros(2, 64, dtype=torch.long)}, inner="eager")  # or Inductor, without it

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=10, learning_rate=3e-3, logging_steps=5, save_strategy="no", report_to=[], use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:16])
    trainer.train()
    before = trainer.evaluate()["eval_loss"]
    trainer.save_model(f"{folder}/trained")  # save_pretrained: weights, and the adapter beside them
    again = ax.from_pretrained(AutoModelForCausalLM, f"{folder}/trained")
    ax.compile(again, inner="eager")
    after = Trainer(again, arguments, eval_dataset=rows[:16]).evaluate()["eval_loss"]
assert abs(before - after) < 1e-5
print(f"loss {before:.4f}; the model that was read again agrees")
