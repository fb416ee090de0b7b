"""Quick start: a dense denoiser becomes three timestep-region tickets within one fit, on real 8x8 digits.

    python examples/digits.py                                               # examples/configs/digits.yaml
    python examples/digits.py trainer.max_epochs=40 pruner.overlap=10       # overrides
    python examples/digits.py resume=true                                   # goes on where it was stopped or killed
    python examples/digits.py my_digits.yaml                                # a configuration of your own
    python examples/digits.py examples/configs/digits_parallel.yaml         # tickets side by side, a process for each

Ends with tables in the terminal; the ensemble, a grid of samples, two figures and the metrics are in the output folder.
"""

import copy
import csv
import difflib
import os
import sys
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_earlybird import EarlyBirdDetector, TicketEnsembleSampler, TimestepAwarePruner
from lightning_earlybird.reporting import log_figure, log_metrics, ticket_table

CONFIG = Path(__file__).parent / "configs" / "digits.yaml"
SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}
WANDB_MODES = ("auto", "online", "offline", "disabled")


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


class DenseKeeper(Callback):
    """Keeps the averaged dense denoiser as it was when the pruner replaced it, for comparison, and the time of that.

    Stands before the pruner in the list of callbacks, so that its last copy is made right before the switch.
    """

    def __init__(self, average: EMAWeightAveraging) -> None:
        self.average = average
        self.denoiser: nn.Module | None = None
        self.search_s = self.total_s = 0.0
        self._started = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # A network to load the copy into that a checkpoint brings: from then on the module's own may be an ensemble.
        self.denoiser = copy.deepcopy(pl_module.model).eval()
        self._started = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(pl_module)

    def _keep(self, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module.model, UNet2DModel):
            # Lightning has no public way to the averaged weights.
            self.denoiser = copy.deepcopy(self.average._average_model.module.model).eval()
            self.search_s = self.seconds

    @property
    def seconds(self) -> float:
        """Of the fit so far, what earlier processes took up to the checkpoint included."""
        return time.perf_counter() - self._started

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.total_s = self.seconds

    def state_dict(self) -> dict[str, Any]:
        return {"denoiser": self.denoiser.state_dict(), "search_s": self.search_s, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.denoiser.load_state_dict(state_dict["denoiser"])
        self.search_s = state_dict["search_s"]
        self._started = time.perf_counter() - state_dict["seconds"]


class LogKeeper(Callback):
    """Carries in checkpoints what was logged so far, so that a resumed run logs every step exactly once.

    Lightning's CSVLogger begins its file anew, and what the stopped process logged after its last checkpoint is going
    to be logged again.
    """

    def __init__(self, logger: CSVLogger, wandb_id: str) -> None:
        self.logger = logger
        self.wandb_id = wandb_id

    def state_dict(self) -> dict[str, Any]:
        # Only the first process logs, and its checkpoint counts.
        path = Path(self.logger.log_dir, "metrics.csv")
        lines = path.read_text().splitlines() if rank_zero_only.rank == 0 and path.exists() else []
        return {"rows": list(csv.DictReader(lines)), "wandb_id": self.wandb_id}

    @rank_zero_only
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.logger.experiment.metrics[:0] = [
            {name: value for name, value in row.items() if value} for row in state_dict["rows"]
        ]
        self.logger.save()


class PhaseBar(TQDMProgressBar):
    """The usual progress bar, with the phase of the run; the detector itself adds the mask distances."""

    def __init__(self, pruner: TimestepAwarePruner) -> None:
        super().__init__(refresh_rate=10)
        self.pruner = pruner

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if self.pruner.phase != "search":
            metrics = {name: value for name, value in metrics.items() if not name.startswith("distance/")}
        if getattr(trainer.strategy, "is_split", False):
            metrics.pop(
                "train_loss", None
            )  # of this process's ticket; the strategy adds a line with that of every ticket
        return {"phase": self.pruner.phase, **metrics}


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


def cost_report(keeper: DenseKeeper, pruner: TimestepAwarePruner, trainer: L.Trainer, batch_size: int) -> str:
    """What the training cost, in multiply-accumulate operations (a backward pass costs about two forward passes)."""
    facts, switched_at = pruner.facts, pruner.switched_at or 0
    steps = trainer.global_step - switched_at
    span = facts[-1].region.stop - facts[0].region.start
    plan = getattr(trainer.strategy, "plan", None)
    if plan is None:
        # Timesteps are uniform, so that each ticket gets the share of the samples that is its region's of the axis.
        batches = [steps * trainer.world_size * (f.region.stop - f.region.start) / span for f in facts]
    else:  # every ticket trains on whole batches, one on each of its ranks
        batches = [count * len(plan.assignment.ranks(k)) for k, count in enumerate(plan.steps)]
    per_batch = 3 * batch_size
    dense = per_batch * facts[0].macs[0]
    search = switched_at * trainer.world_size * dense
    tickets = per_batch * sum(count * fact.macs[1] for count, fact in zip(batches, facts, strict=True))
    samples = batch_size * (switched_at * trainer.world_size + sum(batches))
    lines = [
        f"{'training cost':<22}{'steps':>7}{'MACs':>10}{'of all':>8}{'seconds':>9}{'of all':>8}",
        f"{'search (dense)':<22}{switched_at:>7}{search:>10.2e}{search / (search + tickets):>8.0%}"
        f"{keeper.search_s:>9.0f}{keeper.search_s / keeper.total_s:>8.0%}",
        f"{'tickets':<22}{steps:>7}{tickets:>10.2e}{tickets / (search + tickets):>8.0%}"
        f"{keeper.total_s - keeper.search_s:>9.0f}{1 - keeper.search_s / keeper.total_s:>8.0%}",
        f"Together {(search + tickets) * batch_size / (samples * dense):.0%} of the MACs of dense training on as many "
        f"samples ({samples:,.0f}).",
    ]
    if plan is not None and trainer.world_size > 1:
        hosted = [plan.assignment.hosted(rank) for rank in range(trainer.world_size)]
        longest = max(sum(per_batch * plan.steps[k] * facts[k].macs[1] for k in own) for own in hosted)
        path = switched_at * dense + longest
        lines.append(
            f"Critical path, the MACs of the busiest of {trainer.world_size} processes: {path:.2e}, "
            f"{path / (search + tickets):.0%} of all."
        )
    return "\n".join(lines)


def wandb_is_offline(mode: str) -> bool:
    """Whether W&B must stay offline; looks for a login without asking for one and without the network."""
    if mode != "auto":
        return mode == "offline"
    if os.environ.get("WANDB_MODE", "online") != "online":
        return True
    return not wandb.login(prompt=False, verify=False)


def read_config(arguments: list[str]) -> DictConfig:
    """The configuration file, with overrides; an unknown key ends the program and names the nearest one."""

    def keys(node: DictConfig, prefix: str = "") -> list[str]:
        found = []
        for key, value in node.items():
            found += [f"{prefix}{key}", *(keys(value, f"{prefix}{key}.") if isinstance(value, DictConfig) else [])]
        return found

    config = OmegaConf.load(CONFIG)
    overrides = [OmegaConf.load(argument) for argument in arguments if "=" not in argument]
    overrides.append(OmegaConf.from_dotlist([argument for argument in arguments if "=" in argument]))
    known = keys(config)
    for override in overrides:
        for key in keys(override):
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
                sys.exit(f"digits.py: unknown key {key!r}; the nearest one is {nearest!r}. All are in {CONFIG}.")
            old, new = (OmegaConf.is_dict(OmegaConf.select(node, key)) for node in (config, override))
            if old != new:
                kind = "a section; set one of the keys in it" if old else "one value, not a section"
                sys.exit(f"digits.py: {key!r} is {kind}. All are in {CONFIG}.")
        config = OmegaConf.merge(config, override)
    for key, known in (("sampling.scheduler", list(SCHEDULERS)), ("wandb.mode", WANDB_MODES)):
        if OmegaConf.select(config, key) not in known:
            sys.exit(f"digits.py: {key}={OmegaConf.select(config, key)} must be one of {', '.join(known)}.")
    return config


def checkpoint_to_resume(resume: bool | str, last: Path) -> Path | None:
    """The checkpoint that ``resume`` means: true stands for the last one of the output folder, if there is one."""
    if isinstance(resume, str):
        if not Path(resume).is_file():
            sys.exit(
                f"digits.py: resume={resume} must be true, false or the path of a checkpoint; there is no such file."
            )
        return Path(resume)
    if not resume:
        # A run that starts anew must not be resumed from one that was here before, should it be killed early.
        last.unlink(missing_ok=True)
    return last if last.exists() else None


def main(arguments: list[str]) -> None:
    started = time.perf_counter()
    config = read_config(arguments)
    output = Path(config.output)
    L.seed_everything(config.seed)
    torch.set_num_threads(config.threads)
    train, held_out = digits(config.data.held_out)
    loader = DataLoader(TensorDataset(train), config.data.batch_size, shuffle=True, drop_last=True)
    module = DigitsDiffusion(config.model, config.optimizer)
    scheduler = SCHEDULERS[config.sampling.scheduler](num_train_timesteps=config.model.num_train_timesteps)

    sparsities = sorted({sparsity for _, _, sparsity in config.pruner.regions if sparsity > 0})
    # Without sparsity (the dense control) there is nothing to detect; the pruner then brings what it needs.
    watchers = [EarlyBirdDetector(sparsities, **config.detector)] if sparsities else []
    pruner = TimestepAwarePruner(**config.pruner, dirpath=output)
    average = EMAWeightAveraging(decay=config.optimizer.ema_decay)
    keeper = DenseKeeper(average)
    last = output / "checkpoints" / "last.ckpt"
    checkpoint = checkpoint_to_resume(config.resume, last)
    # W&B goes on with the run of this name.
    wandb_id = uuid.uuid4().hex[:8]
    if checkpoint is not None:
        wandb_id = torch.load(checkpoint, mmap=True, weights_only=True)["callbacks"]["LogKeeper"]["wandb_id"]
    loggers: list[Logger] = [CSVLogger(output, name="", version="")]
    logs = LogKeeper(loggers[0], wandb_id)
    if config.wandb.mode != "disabled":
        offline = wandb_is_offline(config.wandb.mode)
        settings = {"offline": offline, "mode": "offline" if offline else "online", "id": wandb_id, "resume": "allow"}
        loggers.append(WandbLogger(project=config.wandb.project, save_dir=output, **settings))
    # One file, which each checkpoint replaces.
    saving = ModelCheckpoint(last.parent, filename=last.stem, enable_version_counter=False, **config.checkpoint)
    trainer = L.Trainer(
        **config.trainer,
        logger=loggers,
        callbacks=[average, keeper, *watchers, pruner, logs, PhaseBar(pruner), saving],
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=checkpoint)
    if not trainer.is_global_zero:
        return  # every rank holds the ensemble now; one is enough to sample from it

    # The pruner has written the figures of the search to the output folder, and the ensemble to output / "ensemble":
    # from_pretrained would give the same.
    ensemble = TicketEnsembleSampler.from_trainer(trainer)
    # The dense network in place of each ticket, so that both are sampled by the same code from the same noise.
    dense = TicketEnsembleSampler([keeper.denoiser] * len(ensemble.regions), ensemble.partition, ensemble.timesteps)
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
    print(cost_report(keeper, pruner, trainer, config.data.batch_size))
    print(f"\n{'Fréchet distance in pixel space to held-out digits':<52}")
    for title, value in distances.items():
        print(f"  {title:<22}{value:>8.3f}")
    print(f"\nWritten to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    print(f"Took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    warnings.filterwarnings(
        "ignore", message=".*many workers|.*logs directory|.*isinstance.treespec|Checkpoint directory"
    )
    main(sys.argv[1:])
