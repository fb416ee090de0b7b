"""One round of scoring: the gradients of the module's own loss, over a few batches and all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_earlybird.compilation import unwrap
from lightning_earlybird.conversion import FoundDenoiser
from lightning_earlybird.gradients import (
    RecordedCall,
    TimeBins,
    bins_that_matter,
    keep_rows,
    output_gradients,
    parameter_gradients,
    recorded,
    sample_losses,
)
from lightning_earlybird.importance import slice_sums, weight_names
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.score_batches import to_device
from lightning_earlybird.untouched import seed_everything_by


def passes(criterion: str) -> int:
    """How often every batch is gone through: Diff-Pruning must know the losses before it takes gradients."""
    return 2 if criterion == "diff_pruning" else 1


class ScoringRun:
    """One round of batches; to be used as a context, which shows the progress.

    Args:
        trainer: The Trainer of the fit.
        module: Its LightningModule.
        found: The denoiser.
        partition: The regions.
        batches: What :func:`scoring_batches` gave.
        criterion: ``"taylor"`` or ``"diff_pruning"``.
        threshold: For the latter.

    Attributes:
        names: The tensors whose slices are measured.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        found: FoundDenoiser,
        partition: TimestepPartition,
        batches: Sequence[Any],
        *,
        criterion: str,
        threshold: float,
    ) -> None:
        self.trainer, self.module, self.batches = trainer, module, batches
        self.found, self.partition, self.criterion, self.threshold = found, partition, criterion, threshold
        self.network = unwrap(module.get_submodule(found.call.name))
        self.parameters: Mapping[str, Tensor] = dict(self.network.named_parameters())
        self.names = weight_names(self.parameters, found.plan)
        self._widths = torch.tensor([sum(map(len, found.plan.ids[name].values())) for name in self.names])
        self._device = trainer.strategy.root_device
        bar: Any = trainer.progress_bar_callback
        self._bar = tqdm(
            total=len(batches) * passes(criterion),
            desc="Scoring channels",
            unit="batch",
            leave=False,
            disable=bar is None or not bar.is_enabled,
        )

    def __enter__(self) -> None:
        self._bar.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._bar.__exit__(*exception)

    def measure(self) -> tuple[Tensor, Tensor, Tensor]:
        """Go through the batches.

        Returns:
            By region, over all ranks and on the CPU: the sums of weight times gradient over every slice, shape
            (regions, slices); which slices have a gradient, bool, same shape; and how many samples there were, shape
            (regions,).
        """
        self._matter = self._timesteps_that_matter() if self.criterion == "diff_pruning" else None
        self._signed = torch.zeros(len(self.partition), int(self._widths.sum()), device=self._device)
        self._reached = torch.zeros_like(self._signed)
        self._samples = torch.zeros(len(self.partition), device=self._device)
        self._each_batch(self._measure, with_graph=True)
        if not bool(self._samples.any()):
            raise MisconfigurationException(
                f"criterion={self.criterion!r}: in {len(self.batches)} batches training_step returned no loss, "
                f"or did not call the denoiser {self.found.call.name!r} with gradients enabled. Return the loss (or a "
                "dict with it under 'loss') from training_step, or use criterion='magnitude'."
            )
        # Summed before the absolute value is taken: it is the gradient over the batches of all ranks that counts.
        signed, reached, samples = map(self._over_ranks, (self._signed, self._reached, self._samples))
        return signed, reached > 0, samples

    def _measure(self, loss: Tensor, calls: Sequence[RecordedCall]) -> None:
        """Add what one batch tells."""
        scale = self._scale()
        flows = output_gradients(loss, calls, scale)
        for call in calls:
            self._samples[call.region] += call.rows
        if self._matter is not None:
            flows = [
                keep_rows(flow, kept[bins.index(call.timesteps)])
                for call, flow in zip(calls, flows, strict=True)
                for bins, kept in [self._matter[call.region]]
            ]
        trained = {name: self.parameters[name] for name in self.names if self.parameters[name].requires_grad}
        for region, gradients in parameter_gradients(calls, flows, list(trained.values())):
            found = {name: each for name, each in zip(trained, gradients, strict=True) if each is not None}

            def product(name: str, found: Mapping[str, Tensor] = found) -> Tensor | None:
                return self.parameters[name].detach().float() * found[name].float() if name in found else None

            sums = slice_sums(self.found.plan, self.names, product)
            self._signed[region] += sums.to(self._device) / scale
            has = torch.tensor([float(name in found) for name in self.names])
            self._reached[region] += has.repeat_interleave(self._widths).to(self._device)

    def _timesteps_that_matter(self) -> list[tuple[TimeBins, Tensor]]:
        """For each region, bins of its stretch of the time axis, and which of them have a loss worth counting."""
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.partition]

        def look(loss: Tensor, calls: Sequence[RecordedCall]) -> None:
            for call, flow in zip(calls, output_gradients(loss, calls, self._scale()), strict=True):
                seen[call.region].append((call.timesteps, sample_losses(call, flow)))

        self._each_batch(look, with_graph=False)
        empty = torch.zeros(0, dtype=torch.float64)
        timesteps = [torch.cat([empty, *(steps for steps, _ in pairs)]) for pairs in seen]
        losses = [torch.cat([empty, *(values for _, values in pairs)]) for pairs in seen]
        # Where the axis has no end, its bins cover what all ranks have seen.
        ends = torch.tensor([[float(t.min()), float(-t.max())] if len(t) else [torch.inf] * 2 for t in timesteps])
        ends = self.trainer.strategy.all_gather(ends.to(self._device)).reshape(-1, len(seen), 2).amin(0).cpu()
        bins = []
        for index, (first, last) in enumerate(ends.tolist()):
            start, stop = self.partition.training_bounds(index)
            bins.append(TimeBins(start if math.isfinite(start) else first, stop if math.isfinite(stop) else -last))
        totals = torch.stack([each.totals(t, values) for each, t, values in zip(bins, timesteps, losses, strict=True)])
        totals = self._over_ranks(totals.to(self._device, torch.float32))
        return [(each, bins_that_matter(total, self.threshold)) for each, total in zip(bins, totals, strict=True)]

    def _each_batch(self, visit: Callable[[Tensor, Sequence[RecordedCall]], None], *, with_graph: bool) -> None:
        """Run the training step on every batch, with the same random numbers whenever the batch comes.

        The graph of a batch is gone before the next one is run: nothing here or in the caller holds on to it.
        """
        trainer, module = self.trainer, self.module
        with recorded(self.network, self.partition, self.found.call.timesteps, with_graph=with_graph) as calls:
            for index, batch in enumerate(self.batches):
                seed_everything_by(trainer.global_step, trainer.global_rank, index)
                arguments = [to_device(trainer, batch)]
                if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
                    arguments.append(index)
                with trainer.precision_plugin.train_step_context():
                    output = module.training_step(*arguments)
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if isinstance(loss, Tensor):
                    self._check_loss(loss)
                    if calls:
                        visit(loss, calls)
                del output, loss
                calls.clear()
                self._bar.update()

    def _check_loss(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise MisconfigurationException(
                f"criterion={self.criterion!r}: the loss that training_step returned does not depend on trained "
                f"parameters of the denoiser {self.found.call.name!r}, so that its channels have no gradients. Return "
                "the loss with its graph (not detached), unfreeze the denoiser, or use criterion='magnitude'."
            )

    def _scale(self) -> float:
        """Factor on the loss, or gradients of half precision vanish; far below what a GradScaler dares."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else min(float(scaler.get_scale()), 1024.0)

    def _over_ranks(self, values: Tensor) -> Tensor:
        summed: Tensor = self.trainer.strategy.reduce(values, reduce_op="sum")
        return summed.cpu()
