"""LoRA adapters and queries, trained together by PEFT: `python examples/train_peft.py` (needs peft).

The base model is frozen; its queries start at zero, so that training begins at the function that the base computes.
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from stdlib_text import stdlib_rows
from transformers import LlamaConfig, LlamaForCausalLM

import attnres_fx as ax


def base() -> LlamaForCausalLM:
    """The model that is adapted; in earnest, `AutoModelForCausalLM.from_pretrained(...)`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


ids = stdlib_rows(64, files=1)[:8].long()
model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
ax.compile(model, kwargs={"input_ids": ids}, inner="eager")  # adapters first; attnres is trained beside them
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(6):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.4f}")

model.eval()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)  # LoRA's file and the adapter of attnres_fx
    again = PeftModel.from_pretrained(base(), folder).eval()
    ax.compile(again, kwargs={"input_ids": ids}, config=model.attnres.config, inner="eager")
    ax.load_adapter(again, folder)
    wanted = model(input_ids=ids).logits
    assert torch.allclose(again(input_ids=ids).logits, wanted, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-4)
print("the model that was read again and the merged one agree")
