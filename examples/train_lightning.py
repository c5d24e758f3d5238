"""Train, save and read again with Lightning: `python examples/train_lightning.py` (needs lightning).

The model is attached before the module holds it, so that Lightning's checkpoints hold the queries and their config.
"""

import tempfile

import lightning
import torch
from small_gpt import GPTConfig, SmallGPT, next_byte_loss
from stdlib_text import stdlib_rows
from torch.utils.data import DataLoader

import attnres_fx as ax


class LanguageModel(lightning.LightningModule):
    """A GPT on bytes with AttnRes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = SmallGPT(GPTConfig(layers=2, width=32, heads=2))
        ax.compile(self.model, (torch.zeros(2, 32, dtype=torch.long),), inner="eager")

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        return next_byte_loss(self.model(batch[:, :-1]), batch[:, 1:])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(ax.parameter_groups(self.model), lr=1e-2)


options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
rows = stdlib_rows(33, files=1)[:32].long()
module = LanguageModel()
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    trainer = lightning.Trainer(max_steps=8, default_root_dir=folder, enable_checkpointing=False, **options)
    trainer.fit(module, DataLoader(rows, batch_size=8))
    trainer.save_checkpoint(f"{folder}/trained.ckpt")
    again = LanguageModel.load_from_checkpoint(f"{folder}/trained.ckpt")
    assert any(read.query.any() for read in again.model.attnres.reads)
    before, after = (m.eval().training_step(rows, 0) for m in (module, again))
assert torch.allclose(before, after, atol=1e-6)
print(f"loss {before.item():.4f}; the model that was read again agrees")
