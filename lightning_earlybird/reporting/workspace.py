"""How a run is set up in loggers: the settings of the callbacks, and what metrics are drawn over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_earlybird.arguments import plain_settings
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.reporting.loggers import tolerated
from lightning_earlybird.search import short_name


def describe_run(trainer: pl.Trainer, settings: Mapping[str, Any], *, namespace: str = "earlybird") -> None:
    """Give the settings of a callback to the loggers: W&B's config, ``hparams.yaml``, and a text in TensorBoard.

    What is there under the same name is left as it is. Does nothing on ranks other than the first.

    Args:
        trainer: The Trainer of the fit, in ``on_train_start`` or later: the loggers then have the module's own
            hyperparameters.
        settings: Name -> value, in plain types.
        namespace: What the names begin with.
    """
    if not trainer.is_global_zero:
        return
    named = {f"{namespace}/{name}": _plain(value) for name, value in settings.items()}
    for logger in trainer.loggers:
        with tolerated(logger):
            if isinstance(logger, WandbLogger):
                config = logger.experiment.config
                config.update({name: value for name, value in named.items() if name not in config})
            elif isinstance(logger, CSVLogger):
                known = logger.experiment.hparams
                logger.log_hyperparams({name: value for name, value in named.items() if name not in known})
                logger.save()
            elif isinstance(logger, TensorBoardLogger):
                for name, value in named.items():
                    logger.hparams.setdefault(name, value)
                # The logger writes the file once, and has done so.
                save_hparams_to_yaml(Path(logger.log_dir) / logger.NAME_HPARAMS_FILE, logger.hparams)
                rows = "\n".join(f"| {name} | `{value}` |" for name, value in named.items())
                logger.experiment.add_text(f"{namespace}/settings", f"| setting | value |\n|---|---|\n{rows}")


def define_metrics(trainer: pl.Trainer, partition: TimestepPartition) -> None:
    """Tell W&B over what our metrics are drawn, and what of them its table of runs shows.

    Sections of the workspace come from the first part of the names: ``earlybird/...``, ``ticket_0/...``.

    Args:
        trainer: The Trainer of the fit.
        partition: The regions of the tickets that there will be.
    """
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            with tolerated(logger):
                run = logger.experiment
                step = "trainer/global_step"
                for prefix in ("earlybird", *(f"ticket_{index}" for index in range(len(partition)))):
                    run.define_metric(f"{prefix}/*", step_metric=step, step_sync=True)
                for region in partition:  # by its whole name: of several patterns W&B takes any
                    name = f"earlybird/region_loss/{short_name(region)}"
                    run.define_metric(name, step_metric=step, step_sync=True, summary="last,min")


def _plain(value: Any) -> Any:
    """A setting in types that YAML and JSON hold."""
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return plain_settings({"value": value})["value"]
