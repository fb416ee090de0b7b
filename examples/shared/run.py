"""One fit from the dense denoiser to an evaluated ensemble, as all examples run it."""

import time
import uuid
import warnings
from pathlib import Path

import lightning as L
import torch
import wandb
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_earlybird import EarlyBirdDetector, TimestepAwarePruner, TimestepPartition
from lightning_earlybird.checkpoint_files import read_checkpoint
from lightning_earlybird.evaluation import SampleQuality
from lightning_earlybird.reporting import ticket_table, wandb_logger
from shared.data import ImageDataModule, look
from shared.keepers import DenseKeeper, LogKeeper, PhaseBar
from shared.outputs import make_output, mistakes_told, prepare_output
from shared.reports import cost_report, score_table

QUIET = ".*many workers|.*logs directory|.*isinstance.treespec|Checkpoint directory"


def begin(config: DictConfig) -> tuple[Path, Path | None]:
    """The output folder, not made yet, and the checkpoint to go on from; seeds everything."""
    with mistakes_told():
        build_pruning(config, Path(config.output))  # wrong regions show before data are read
    output, checkpoint = prepare_output(config)
    L.seed_everything(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return output, checkpoint


def laid_out(denoiser: nn.Module, model: DictConfig) -> nn.Module:
    """The denoiser in the memory format, and compiled, as the settings say."""
    if model.get("channels_last"):
        denoiser = denoiser.to(memory_format=torch.channels_last)
    return torch.compile(denoiser) if model.compile else denoiser


def train(
    config: DictConfig,
    module: L.LightningModule,
    data: L.LightningDataModule,
    output: Path,
    checkpoint: Path | None,
    sampling: list[Callback],
) -> L.Trainer:
    """Fits, prints what came out, and leaves it in the output folder.

    Args:
        config: ``Settings``.
        module: The module, its denoiser dense.
        data: Training data.
        output: The output folder.
        checkpoint: To go on from, or None.
        sampling: Callbacks that sample, which stand after the pruner.

    Returns:
        The Trainer after the fit.
    """
    warnings.filterwarnings("ignore", message=QUIET)
    started = time.perf_counter()
    with mistakes_told():
        average = EMAWeightAveraging(decay=config.optimizer.ema_decay)
        watchers, pruner = build_pruning(config, output)
        keeper = DenseKeeper(average, pruner, output / "dense", checkpoint)
        loggers, logs = build_loggers(config, output, checkpoint)
        trainer = L.Trainer(
            **{**config.trainer, "devices": _plain(config.trainer.devices)},
            logger=loggers,
            callbacks=[
                average,
                keeper,
                *watchers,
                pruner,
                *sampling,
                logs,
                PhaseBar(pruner),
                build_checkpoints(config, output),
            ],
            enable_model_summary=False,
        )
        make_output(config)
        if isinstance(data, ImageDataModule) and data.train is not None and rank_zero_only.rank == 0:
            look(data.train, output / "data.png")
        trainer.fit(module, data, ckpt_path=checkpoint)
    if trainer.is_global_zero and pruner.facts:
        for logger in loggers:
            logger.finalize("success")
        wandb.finish()
        print(f"\n{ticket_table(pruner.facts)}\n")
        print(cost_report(pruner, trainer, config.data.batch_size, keeper.search_s, keeper.total_s))
        for quality in (each for each in sampling if isinstance(each, SampleQuality) and each.results):
            print(f"\n{score_table(quality.results)}")
        print(f"\nWritten to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
        print(f"Took {time.perf_counter() - started:.0f} s.")
    return trainer


def build_pruning(config: DictConfig, output: Path) -> tuple[list[EarlyBirdDetector], TimestepAwarePruner]:
    """The two callbacks that all this is about.

    Without sparsity (the dense baseline), and with tickets that were saved earlier, there is nothing to detect; the
    pruner then brings what it needs.
    """
    regions = config.pruner.regions
    # Saved tickets bring the rest with them.
    settings = {"regions": regions} if isinstance(regions, str) else config.pruner
    pruner = TimestepAwarePruner(**settings, dirpath=output)
    sparsities = [] if isinstance(regions, str) else [s for s in TimestepPartition.of(regions).sparsities if s > 0]
    return [EarlyBirdDetector(sparsities, **config.detector)] if sparsities else [], pruner


def build_loggers(config: DictConfig, output: Path, checkpoint: Path | None) -> tuple[list[Logger], LogKeeper]:
    """CSV always, W&B and TensorBoard as the settings say; and the callback by which they survive a restart."""
    wandb_id = uuid.uuid4().hex[:8]
    if checkpoint is not None:  # W&B goes on with the run that it was
        saved = read_checkpoint(checkpoint)["callbacks"]
        wandb_id = saved.get("LogKeeper", {}).get("wandb_id", wandb_id)
    loggers: list[Logger] = [CSVLogger(output, name="", version="")]
    logs = LogKeeper(loggers[0], wandb_id)
    if config.wandb.mode != "disabled":
        settings = {"name": config.wandb.get("name"), "id": wandb_id, "resume": "allow"}
        with mistakes_told():  # nobody may be logged in
            loggers.append(
                wandb_logger(
                    config.wandb.project,
                    mode=config.wandb.mode,
                    save_dir=output,
                    config=OmegaConf.to_container(config),
                    **settings,
                )
            )
    if config.get("tensorboard"):
        loggers.append(TensorBoardLogger(output, name="tensorboard", version=""))
    return loggers, logs


def build_checkpoints(config: DictConfig, output: Path) -> ModelCheckpoint:
    """One file that each checkpoint replaces, or all of them beside it."""
    settings, folder = dict(config.checkpoint), output / "checkpoints"
    if settings.get("every_n_train_steps"):
        settings["every_n_epochs"] = None  # ModelCheckpoint takes one of the two
    if settings.pop("keep_all", False):
        return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_last=True, **settings)
    return ModelCheckpoint(folder, filename="last", enable_version_counter=False, **settings)


def _plain(value: object) -> object:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
