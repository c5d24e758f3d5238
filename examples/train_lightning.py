"""Train and resume with Lightning: `python examples/train_lightning.py` (needs lightning).

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

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return next_byte_loss(self.model(batch[:, :-1]), batch[:, 1:])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(ax.parameter_groups(self.model), lr=1e-2)


def trained(folder: str, steps: int, resume: str | None = None) -> LanguageModel:
    """After this many steps, of which a checkpoint saves those before it."""
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=steps, default_root_dir=folder, enable_checkpointing=False, **options)
    module = LanguageModel()
    loader = DataLoader(stdlib_rows(33, files=1)[:32].long(), batch_size=8)
    trainer.fit(module, loader, ckpt_path=resume)
    trainer.save_checkpoint(f"{folder}/{steps}.ckpt")
    return module


with tempfile.TemporaryDirectory() as folder:
    straight = trained(folder, 8)
    trained(folder, 4)
    resumed = trained(folder, 8, resume=f"{folder}/4.ckpt")
for name, parameter in straight.named_parameters():
    assert torch.allclose(parameter, resumed.get_parameter(name), atol=1e-6), name
assert any(read.query.any() for read in straight.model.attnres.reads)
print("trained in one go and resumed: they agree")
