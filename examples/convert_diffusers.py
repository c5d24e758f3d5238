"""A diffusion transformer of diffusers with AttnRes: `python examples/convert_diffusers.py` (needs diffusers)."""

import tempfile

import torch
from diffusers import DiTTransformer2DModel

import attnres_fx as ax

torch.manual_seed(0)
model = DiTTransformer2DModel(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=3,
    out_channels=3,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=10,
    norm_num_groups=1,
)
image, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
call = {"hidden_states": noise, "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 4])}
print(ax.inspect(model, kwargs=call))
ax.compile(model, kwargs=call, inner="eager")  # or Inductor, without it
optimizer = torch.optim.AdamW(ax.parameter_groups(model), lr=1e-3)
for step in range(3):
    amount = call["timestep"][:, None, None, None] / 10
    noisy = torch.lerp(image, noise, amount)
    loss = (model(**{**call, "hidden_states": noisy}).sample - (noise - image)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.4f}")

model.eval()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    again = ax.from_pretrained(DiTTransformer2DModel, folder, example_kwargs=call).eval()
    ax.compile(again, inner="eager")
    assert torch.allclose(again(**call).sample, model(**call).sample, atol=1e-5)
print("the model that was read again agrees")
