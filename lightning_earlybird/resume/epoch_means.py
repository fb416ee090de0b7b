"""Metrics of the epoch under way, which Lightning forgets when a fit resumes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

_PLAIN = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
_LARGEST = 16 << 20
"""Bytes of a metric that a checkpoint takes up at most: some gather features of all samples."""

_NEWEST = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def capture_epoch_means(trainer: pl.Trainer) -> dict[str, Any]:
    """What has been accumulated for the means of the epoch under way, and the newest values of all metrics.

    Args:
        trainer: The Trainer of the fit.

    Returns:
        Plain containers and tensors on the CPU.
    """
    results = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        meta = result.meta
        if result.has_reset or not meta.on_epoch:
            continue
        saved: dict[str, Any] = {name: getattr(meta, name) for name in _PLAIN}
        saved["reduce"] = next(name for name in ("mean", "sum", "max", "min") if getattr(meta, f"is_{name}_reduction"))
        saved |= {"sync": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only}
        if result.is_tensor:
            saved["value"] = _kept(result.value)
            saved["batch_size"] = _kept(getattr(result, "cumulated_batch_size", None))
        elif meta.metric_attribute is not None:
            saved["attribute"] = meta.metric_attribute
        results[key] = saved
    connector = trainer._logger_connector
    newest = {name: getattr(connector, name) for name in _NEWEST}
    return {
        "results": results,
        "metrics": {
            name: {
                "state": {key: _kept(value) for key, value in metric.metric_state.items()},
                "updates": metric._update_count,
            }
            for name, metric in _metric_objects(trainer).items()
        },
        # Monitors of callbacks and schedulers look these up, also long after they were logged.
        "newest": {
            name: {key: _kept(value) for key, value in values.items() if isinstance(value, Tensor)}
            for name, values in newest.items()
        },
    }


def restore_newest(trainer: pl.Trainer, own: dict[str, Any]) -> None:
    """The newest values of all metrics are known again; for ``on_train_start``."""
    for name, values in own["means"]["newest"].items():
        moved = {key: _moved(value, trainer.strategy.root_device) for key, value in values.items()}
        getattr(trainer._logger_connector, name).update(moved)


def restore_metric_objects(trainer: pl.Trainer, own: dict[str, Any]) -> None:
    """Metric objects of the module have their sums again, whether they have been logged or will be at the end."""
    for name, saved in own["means"]["metrics"].items():
        metric = trainer.lightning_module.get_submodule(name)
        assert isinstance(metric, Metric)
        for key, value in saved["state"].items():
            setattr(metric, key, _moved(value, metric.device))
        metric._update_count, metric._computed = saved["updates"], None


def take_up_epoch_means(trainer: pl.Trainer, own: dict[str, Any]) -> None:
    """The means of the epoch under way go on; to be called before its next batch.

    A sum is taken up when its metric is logged again, since Lightning makes the place for it only then.
    """
    sums = {key: saved for key, saved in own["means"]["results"].items() if "value" in saved}
    results = trainer.fit_loop.epoch_loop._results
    update = results.update_metrics

    def taken_up(key: str, value: Any, batch_size: int) -> None:
        saved = sums.pop(key, None)
        if saved is not None:
            _fill(results[key], saved, trainer.strategy.root_device)
        update(key, value, batch_size)

    if sums:
        results.__dict__["update_metrics"] = taken_up
    # Otherwise Lightning would clear what is logged a second time within its first batch.
    trainer._logger_connector._first_loop_iter = False


def restore_epoch_means(trainer: pl.Trainer, own: dict[str, Any]) -> None:
    """All means of an epoch that has no more batches, for its end to log them."""
    for key, saved in own["means"]["results"].items():
        meta = _Metadata(**{name: saved[name] for name in _PLAIN}, reduce_fx=getattr(torch, saved["reduce"]))
        meta.metric_attribute = saved.get("attribute")
        meta.sync = _Sync(_should=saved["sync"], fn=trainer.strategy.reduce, rank_zero_only=saved["rank_zero_only"])
        result = _ResultMetric(meta, "value" in saved)
        if "value" in saved:
            _fill(result, saved, trainer.strategy.root_device)
        elif "attribute" in saved:
            result.value = trainer.lightning_module.get_submodule(saved["attribute"])
        else:
            continue
        result._update_count = 1
        trainer.fit_loop.epoch_loop._results[key] = result


def forget_epoch_means(trainer: pl.Trainer) -> None:
    """Lightning's own way again, for the next epochs."""
    trainer.fit_loop.epoch_loop._results.__dict__.pop("update_metrics", None)


def _metric_objects(trainer: pl.Trainer) -> dict[str, Metric]:
    """Those that gather something over the training epoch.

    Those of a validation begin with its first batch: Lightning resets them if they were logged before in this process,
    which in another one they were not.
    """
    loop = trainer.fit_loop.epoch_loop
    validated = loop.val_loop.batch_progress.total
    gathered = {result.meta.metric_attribute for result in loop._results.values()}
    left_out = {result.meta.metric_attribute for result in loop.val_loop._results.values()} - gathered
    if trainer.validating and validated.ready != validated.completed:
        left_out = {name for name, _ in trainer.lightning_module.named_modules()} - gathered
    found = {
        name: part
        for name, part in trainer.lightning_module.named_modules()
        if isinstance(part, Metric)
        and part._update_count > 0
        and not any(name == each or name.startswith(f"{each}.") for each in left_out)
    }
    large = [name for name, metric in found.items() if _size(metric) > _LARGEST]
    if large:
        rank_zero_warn(
            f"The metric {large[0]!r} holds more than {_LARGEST >> 20} MiB, and checkpoints leave out what it has "
            "gathered so far: a fit that resumes in the middle of an epoch computes it from the rest of the epoch only."
        )
    return {name: metric for name, metric in found.items() if name not in large}


def _size(metric: Metric) -> int:
    values = [
        each for value in metric.metric_state.values() for each in (value if isinstance(value, list) else [value])
    ]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _fill(result: _ResultMetric, saved: dict[str, Any], device: torch.device) -> None:
    result.value = _moved(saved["value"], device)
    if saved["batch_size"] is not None:
        result.cumulated_batch_size = _moved(saved["batch_size"], device)


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return [_kept(each) for each in value] if isinstance(value, (list, tuple)) else value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    return [_moved(each, device) for each in value] if isinstance(value, list) else value
