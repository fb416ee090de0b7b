"""Tiny denoisers, LightningModules around them and quiet Trainers, shared by the tests of the callbacks."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TIMESTEPS = 1000
REGIONS = [(0, 300, 0.25), (300, 1000, 0.5)]


class Mlp(nn.Module):
    """One channel group, ``up``; samples of shape (2,)."""

    sample_shape: tuple[int, ...] = (2,)

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(2, hidden)
        self.down = nn.Linear(hidden, 2)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x) + timesteps.to(x.dtype)[:, None] / TIMESTEPS))


class ConvNet(nn.Module):
    """Two channel groups, ``conv_in`` and ``hidden``, with a group norm; samples of shape (1, 4, 4)."""

    sample_shape: tuple[int, ...] = (1, 4, 4)

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.norm = nn.GroupNorm(4, width)
        self.drop = nn.Dropout(dropout)
        self.hidden = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        time = self.time(timesteps.to(x.dtype).view(-1, 1) / TIMESTEPS)
        hidden = self.drop(nn.functional.silu(self.norm(self.conv_in(x) + time[:, :, None, None])))
        return self.conv_out(nn.functional.silu(self.hidden(hidden)))


def tiny_unet() -> UNet2DModel:
    """For samples of shape (1, 8, 8), with attention at the lower resolution."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


class Tutorial(pl.LightningModule):
    """As Lightning's own diffusion tutorial writes it."""

    sample_shape: tuple[int, ...] = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_unet()
        self.scheduler = DDPMScheduler()

    def training_step(self, batch, batch_idx):
        images = batch[0]
        noise = torch.randn_like(images)
        steps = torch.randint(self.scheduler.config.num_train_timesteps, (images.size(0),), device=self.device)
        noisy_images = self.scheduler.add_noise(images, noise, steps)
        residual = self.model(noisy_images, steps).sample
        loss = torch.nn.functional.mse_loss(residual, noise)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.99)
        return [optimizer], [scheduler]


def adamw(module: pl.LightningModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01)


def frozen_sgd(module: pl.LightningModule) -> torch.optim.Optimizer:
    """Takes steps that change nothing, so that a test alone decides what the weights are."""
    return torch.optim.SGD(module.parameters(), lr=0.0)


class Lit(pl.LightningModule):
    """A LightningModule as a user writes it; ``configure`` stands for its ``configure_optimizers``.

    The weights are those of seed 0 whatever was drawn before.
    """

    def __init__(self, denoiser: Callable[[], nn.Module] = ConvNet, configure: Callable[..., Any] = adamw) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = denoiser()
        self.sample_shape: tuple[int, ...] = getattr(self.model, "sample_shape", (2,))
        self.configure = configure
        self.losses: list[float] = []

    def loss(self, samples: Tensor) -> Tensor:
        noise = torch.randn_like(samples)
        steps = torch.randint(TIMESTEPS, (len(samples),), device=samples.device)
        share = (steps / TIMESTEPS).view(-1, *[1] * (samples.dim() - 1))
        return nn.functional.mse_loss(self.model(samples * (1 - share) + noise * share, steps), noise)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch[0])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch[0]), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch[0]))

    def configure_optimizers(self):
        return self.configure(self)


class OnStep(pl.Callback):
    """Calls a function with (trainer, module) after every batch; placed first, it acts before the other callbacks."""

    def __init__(self, act: Callable[[pl.Trainer, pl.LightningModule], None]) -> None:
        self.act = act

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.act(trainer, pl_module)


def loader(module: pl.LightningModule, batches: int = 4) -> DataLoader:
    """Batches of eight samples of the shape that the module's denoiser takes."""
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(8 * batches, *module.sample_shape, generator=generator)), batch_size=8)


def quiet_trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"limit_val_batches": 0, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(callbacks=list(callbacks), **(quiet | settings))


def fit(module: pl.LightningModule, *callbacks: pl.Callback, batches: int = 4, ckpt_path=None, **settings: Any):
    """Train from the same random state every time; returns the Trainer."""
    trainer = quiet_trainer(*callbacks, **settings)
    data = loader(module, batches)
    torch.manual_seed(2)
    trainer.fit(module, data, data if isinstance(module, Lit) else None, ckpt_path=ckpt_path)
    return trainer


class Repeatable(Lit):
    """Draws its samples, too, from a seed of each step, so that a resumed fit can be compared with a whole one."""

    def loss(self, samples: Tensor) -> Tensor:
        torch.manual_seed(100 + self.trainer.fit_loop.epoch_loop.total_batch_idx)
        return super().loss(torch.randn_like(samples))


class Ranking(pl.Callback):
    """Decides which channels of an :class:`Mlp` matter: ``order(step)`` lists them, the most important first.

    To be placed before the other callbacks, around a module that learns nothing (:func:`frozen_sgd`).
    """

    def __init__(self, order: Callable[[int], Sequence[int]]) -> None:
        self.order = order

    def on_train_start(self, trainer, pl_module):
        self.rank(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rank(trainer, pl_module)

    def rank(self, trainer, pl_module):
        if isinstance(pl_module.model, Mlp):
            order = list(self.order(trainer.global_step))
            weight = torch.empty(len(order))
            weight[order] = torch.arange(len(order), 0, -1.0)
            with torch.no_grad():
                pl_module.model.up.weight.copy_(weight[:, None].expand(-1, 2))
                pl_module.model.down.weight.zero_()


def kept_by_hand(network: Mlp, kept: int) -> Tensor:
    """The mask that keeps the ``kept`` channels of largest squared norm, shape (hidden,)."""
    scores = network.up.weight.detach().square().sum(1) + network.down.weight.detach().square().sum(0)
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:kept]] = True
    return mask
