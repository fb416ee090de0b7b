"""The LightningModules of the examples. Nothing in them knows that their denoiser will be pruned.

``model`` is the denoiser. ``sample_timesteps`` has bounds so that tickets which train apart can draw inside their own
region; the dense denoiser is asked for the whole axis.
"""

import sys
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_earlybird import draw_uniform, draw_within
from lightning_earlybird.schedulers import SpacedDDIMScheduler


class DiffusionModule(L.LightningModule):
    """Denoising diffusion (DDPM): the denoiser learns the noise in an image, or what ``prediction`` says.

    Args:
        model: The denoiser, called as ``model(images, timesteps)``, with class labels as ``class_labels=``.
        diffusion: ``DiffusionSettings``.
        optimizer: ``OptimizerSettings``.
        one_class: Give every image the class 0: for a transformer that must have one, on data without classes.
    """

    def __init__(
        self, model: nn.Module, diffusion: DictConfig, optimizer: DictConfig, *, one_class: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.one_class = one_class
        self.scheduler = DDPMScheduler(
            num_train_timesteps=diffusion.num_train_timesteps,
            beta_schedule=diffusion.beta_schedule,
            beta_start=diffusion.beta_start,
            beta_end=diffusion.beta_end,
            prediction_type=diffusion.prediction,
            clip_sample=diffusion.clip_sample,
        )
        self.antithetic = diffusion.antithetic
        self.settings = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, *labels = batch
        if self.one_class:
            labels = [torch.zeros(len(images), dtype=torch.long, device=images.device)]
        timesteps = self.sample_timesteps(len(images))
        noise = torch.randn_like(images)
        noisy, target = self.corrupt(images, noise, timesteps)
        conditions = {"class_labels": labels[0]} if labels else {}
        prediction = self.model(noisy, timesteps, **conditions).sample
        # Transformers that learn a variance, too, return it behind the rest.
        loss = nn.functional.mse_loss(prediction[:, : target.shape[1]], target)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def corrupt(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy images and what is to be predicted from them."""
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return noisy, self.scheduler.get_velocity(images, noise, timesteps)
        return noisy, noise if kind == "epsilon" else images

    def sample_timesteps(self, batch_size: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Uniform timesteps in [start, stop); in pairs mirrored about the middle, as DDIM's code base draws them."""
        stop = self.scheduler.config.num_train_timesteps if stop is None else stop
        return draw_uniform(batch_size, start, stop, antithetic=self.antithetic, device=self.device)

    def sampling_scheduler(self, settings: DictConfig) -> Any:
        """DDIM as ``SamplingSettings`` say, with the betas and the kind of prediction that it was trained with."""
        names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "clip_sample")
        trained = {name: self.scheduler.config[name] for name in names}
        return SpacedDDIMScheduler(spacing=settings.spacing, **trained)

    def configure_optimizers(self) -> dict[str, Any]:
        settings = self.settings
        # Lightning clips no gradients of fused optimizers under mixed precision.
        fused = {} if "mixed" in str(self.trainer.precision) else {"fused": True}
        kind = torch.optim.AdamW if settings.weight_decay else torch.optim.Adam
        optimizer = kind(self.model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, **fused)
        warmup = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / (settings.warmup_steps + 1))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


class FlowModule(DiffusionModule):
    """Flow matching along straight lines in continuous time: the denoiser learns noise minus image.

    Time runs from 0 (image) to ``num_train_timesteps`` (noise), the unit of diffusers' flow-matching schedulers, in
    real numbers; regions are written in that unit.
    """

    def __init__(self, model: nn.Module, flow: DictConfig, optimizer: DictConfig) -> None:
        L.LightningModule.__init__(self)
        self.model = model
        self.one_class = False
        self.settings = optimizer
        self.unit = float(flow.num_train_timesteps)
        self.density = flow.density
        self.shift = flow.shift

    def corrupt(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        share = (timesteps / self.unit).view(-1, *[1] * (images.dim() - 1))
        return (1 - share) * images + share * noise, noise - images

    def sample_timesteps(self, batch_size: int, start: float = 0.0, stop: float | None = None) -> Tensor:
        stop = self.unit if stop is None else float(stop)
        if self.density == "uniform":
            return draw_uniform(batch_size, float(start), stop, device=self.device)
        # Logit-normal, as in Stable Diffusion 3 (arXiv 2403.03206, section 3.1): the middle of the axis more often.
        return draw_within(
            lambda n: torch.randn(n, device=self.device).sigmoid() * self.unit, batch_size, float(start), stop
        )

    def sampling_scheduler(self, settings: DictConfig) -> Any:
        """Euler steps along the flow."""
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=int(self.unit), shift=self.shift)


def refuse(mistake: str) -> NoReturn:
    """End the program with a sentence about a setting."""
    sys.exit(f"{Path(sys.argv[0]).name}: {mistake}")


def build_unet(model: DictConfig, *, size: int, channels: int, num_classes: int | None = None) -> UNet2DModel:
    """A U-Net of diffusers, with attention on the feature maps whose sides are listed.

    With the paper's settings it is that of DDPM (arXiv 2006.11239) for CIFAR-10: 35.7 million parameters.
    """
    sides = [size >> level for level in range(len(model.channels))]
    if unknown := sorted(set(model.attention) - set(sides)):
        refuse(
            f"model.attention={unknown}: feature maps of a {size}x{size} image have the sides {sides}; list some of "
            "them, or none."
        )
    halvings = len(model.channels) - 1
    if size % 2**halvings:
        refuse(
            f"model.channels={list(model.channels)}: {len(model.channels)} levels halve images {halvings} times, and "
            f"their side is {size}; take a multiple of {2**halvings} for data.size, or fewer levels."
        )
    if any(width % model.norm_groups for width in model.channels):
        refuse(
            f"model.channels={list(model.channels)}: every width must be a multiple of "
            f"model.norm_groups={model.norm_groups}; change the widths, or the groups."
        )
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(model.channels),
        layers_per_block=model.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if side in model.attention else "DownBlock2D" for side in sides),
        up_block_types=tuple("AttnUpBlock2D" if side in model.attention else "UpBlock2D" for side in reversed(sides)),
        attention_head_dim=model.attention_head_dim,
        dropout=model.dropout,
        norm_num_groups=model.norm_groups,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        num_class_embeds=num_classes,
    )


def build_transformer(model: DictConfig, *, size: int, channels: int, num_classes: int) -> DiTTransformer2DModel:
    """A DiT (arXiv 2212.09748) for latents of side ``size``; its labels are class numbers."""
    if size % model.patch_size:
        refuse(
            f"model.patch_size={model.patch_size}: latents have the side {size}, which must be a multiple of it; take "
            "another patch size."
        )
    return DiTTransformer2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        num_layers=model.layers,
        num_attention_heads=model.heads,
        attention_head_dim=model.head_dim,
        patch_size=model.patch_size,
        num_embeds_ada_norm=num_classes,
        dropout=model.dropout,
        norm_num_groups=1,
    )
