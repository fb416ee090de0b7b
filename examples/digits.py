"""Quick start: a dense denoiser becomes three timestep-region tickets within one fit, on real 8x8 digits.

    python examples/digits.py                                               # examples/configs/digits.yaml
    python examples/digits.py trainer.max_epochs=40 pruner.overlap=10       # overrides
    python examples/digits.py resume=true                                   # goes on where it was stopped or killed
    python examples/digits.py my_digits.yaml                                # a configuration of your own
    python examples/digits.py examples/configs/digits_parallel.yaml         # tickets side by side, a process for each

Ends with tables in the terminal; the ensemble, a grid of samples, two figures and the metrics are in the output folder.
"""

import sys
import time
import warnings
from typing import Any

import lightning as L
import torch
import wandb
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from lightning.pytorch.callbacks import EMAWeightAveraging
from matplotlib.figure import Figure
from omegaconf import DictConfig
from shared.keepers import DenseKeeper, PhaseBar
from shared.outputs import make_output
from shared.reports import cost_report
from shared.run import QUIET, begin, build_checkpoints, build_loggers, build_pruning
from shared.settings import CONFIGS, read_settings
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_earlybird import TicketEnsembleSampler
from lightning_earlybird.reporting import log_figure, log_metrics, ticket_table

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}


def digits(held_out: int) -> tuple[Tensor, Tensor]:
    """Training and held-out images of scikit-learn's bundled digits, shape (N, 1, 8, 8), values in [-1, 1]."""
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
    # A fixed split, whatever the seed of the run.
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[held_out:], images[:held_out]


class DigitsDiffusion(L.LightningModule):
    """A plain DDPM. Nothing in it knows that it will be pruned."""

    def __init__(self, model: DictConfig, optimizer: DictConfig) -> None:
        super().__init__()
        levels = len(model.channels)
        self.model = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=tuple(model.channels),
            layers_per_block=model.layers_per_block,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            norm_num_groups=8,
        )
        self.scheduler = DDPMScheduler(num_train_timesteps=model.num_train_timesteps)
        self.settings = optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images = batch[0]
        noise = torch.randn_like(images)
        steps = torch.randint(self.scheduler.config.num_train_timesteps, (len(images),), device=self.device)
        residual = self.model(self.scheduler.add_noise(images, noise, steps), steps).sample
        loss = nn.functional.mse_loss(residual, noise)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        total, settings = self.trainer.estimated_stepping_batches, self.settings

        def factor(step: int) -> float:
            falling = (total - step) / (total * (1 - settings.constant_share))
            return min(1.0, (step + 1) / settings.warmup_steps, falling)

        optimizer = torch.optim.Adam(self.parameters(), lr=settings.learning_rate, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Pixels(nn.Module):
    """The pixels themselves as the features of the Fréchet distance."""

    num_features = 64

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


def frechet_distance(images: Tensor, real: Tensor) -> float:
    """Fréchet distance in pixel space, between images of shape (N, 1, 8, 8) and values in [-1, 1]."""
    metric = FrechetInceptionDistance(Pixels(), normalize=True, sync_on_compute=False).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(images.cpu(), real=False)
    return float(metric.compute())


def sample_figure(columns: dict[str, Tensor], grid: int) -> Figure:
    """Grids of images side by side; equal places come from equal noise."""
    figure = Figure(figsize=(3.6 * len(columns), 3.9), dpi=150, layout="constrained")
    for axis, (title, images) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        # A frame of one pixel around each image.
        tiles = nn.functional.pad(images[: grid * grid].cpu(), (1, 1, 1, 1), value=-0.6)
        sheet = tiles.reshape(grid, grid, 10, 10).permute(0, 2, 1, 3).reshape(10 * grid, 10 * grid)
        axis.imshow(sheet.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title)
        axis.set_axis_off()
    return figure


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    config = read_settings(CONFIGS / "digits.yaml", arguments)
    output, checkpoint = begin(config)
    train, held_out = digits(config.data.held_out)
    loader = DataLoader(TensorDataset(train), config.data.batch_size, shuffle=True, drop_last=True)
    module = DigitsDiffusion(config.model, config.optimizer)
    scheduler = SCHEDULERS[config.sampling.scheduler](num_train_timesteps=config.model.num_train_timesteps)

    watchers, pruner = build_pruning(config, output)
    average = EMAWeightAveraging(decay=config.optimizer.ema_decay)
    keeper = DenseKeeper(average, pruner, output / "dense", checkpoint)
    loggers, logs = build_loggers(config, output, checkpoint)
    trainer = L.Trainer(
        **config.trainer,
        logger=loggers,
        callbacks=[average, keeper, *watchers, pruner, logs, PhaseBar(pruner), build_checkpoints(config, output)],
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    make_output(config)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    if not trainer.is_global_zero:
        return  # every rank holds the ensemble now; one is enough to sample from it

    # The pruner has written the figures of the search to the output folder, and the ensemble to output / "ensemble":
    # from_pretrained would give the same.
    ensemble = TicketEnsembleSampler.from_trainer(trainer)
    # The dense network in place of each ticket, so that both are sampled by the same code from the same noise.
    denoiser = UNet2DModel.from_pretrained(keeper.folder)
    dense = TicketEnsembleSampler([denoiser] * len(ensemble.regions), ensemble.partition, ensemble.timesteps)
    samples = {
        title: model.sample(
            config.sampling.num_images,
            scheduler=scheduler,
            num_inference_steps=config.sampling.num_inference_steps,
            generator=torch.Generator(model.device).manual_seed(config.seed),
        )
        for title, model in (("dense at the switch", dense), ("ticket ensemble", ensemble))
    }
    noise = torch.randn(samples["ticket ensemble"].shape, generator=torch.Generator().manual_seed(config.seed))
    rows = {
        "noise": noise.clamp(-1, 1),
        **samples,
        "training digits": train[: config.sampling.num_images],
    }
    distances = {title: frechet_distance(images, held_out) for title, images in rows.items()}

    log_figure(trainer, "samples", sample_figure(samples, config.sampling.grid), folder=output)
    log_metrics(trainer, {f"frechet_distance/{title}": value for title, value in distances.items()})
    for logger in loggers:
        logger.finalize("success")
    wandb.finish()

    print(f"\n{ticket_table(pruner.facts)}\n")
    print(cost_report(pruner, trainer, config.data.batch_size, keeper.search_s, keeper.total_s))
    print(f"\n{'Fréchet distance in pixel space to held-out digits':<52}")
    for title, value in distances.items():
        print(f"  {title:<22}{value:>8.3f}")
    print(f"\nWritten to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    print(f"Took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=QUIET)
    main(sys.argv[1:])
