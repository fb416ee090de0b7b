"""Channel scores by gradients of the module's own loss, in the middle of a fit that goes on as if nothing had been."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
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
from lightning_earlybird.importance import (
    NonFiniteWeightsError,
    channel_scores,
    slice_slots,
    slice_sums,
    taylor_scores,
    weight_names,
)
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.score_batches import scoring_batches, to_device
from lightning_earlybird.untouched import parameters_set_aside, seed_everything_by, untouched


class GradientScorer:
    """Scores channels by Taylor expansion of the training loss, for each timestep region.

    Args:
        criterion: ``"taylor"``, or ``"diff_pruning"``: only timesteps whose loss is at least ``threshold`` times the
            largest count.
        batches: Batches of training data on every rank at each check.
        threshold: See ``criterion``.

    Attributes:
        seconds: What scoring has taken so far.
        last_seconds: What it took the last time.
        checks: How many times there has been scored.
    """

    def __init__(self, criterion: str, *, batches: int, threshold: float) -> None:
        self.criterion = criterion
        self.batches = batches
        self.threshold = threshold
        self.seconds = self.last_seconds = 0.0
        self.checks = 0
        self._warned: set[str] = set()
        self._newest: tuple[int, list[Tensor]] | None = None

    def check(self, module: pl.LightningModule) -> None:
        """Refuse modules whose loss cannot be had by calling ``training_step``. For callbacks' ``setup``.

        Raises:
            MisconfigurationException: The message says what to do.
        """
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"criterion={self.criterion!r} needs automatic optimization: it calls training_step for its loss, and "
                "by hand that would take optimizer steps. Set automatic_optimization=True, use criterion='magnitude', "
                "or give a callable that computes scores itself."
            )
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"criterion={self.criterion!r} calls training_step with batches of its own, but this one takes "
                "dataloader_iter. Let it take (batch, batch_idx), or use criterion='magnitude'."
            )

    def score(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        found: FoundDenoiser,
        partition: TimestepPartition,
        averaged: nn.Module | None = None,
    ) -> list[Tensor]:
        """Score the channels, once for an optimizer step; the fit is left as it was.

        Args:
            trainer: The Trainer of the fit.
            module: Its LightningModule.
            found: The denoiser.
            partition: The regions.
            averaged: Another copy of the denoiser, whose weights are scored in place of the live ones.

        Returns:
            One tensor of shape (num_channels,) for each region; the same on all ranks.

        Raises:
            MisconfigurationException: The training step gives no loss that reaches the denoiser.
            NonFiniteWeightsError: A weight or a gradient is NaN or infinite.
        """
        if self._newest is not None and self._newest[0] == trainer.global_step:
            return self._newest[1]  # the switch asks for what the check of its step has seen
        started = time.perf_counter()
        live = unwrap(module.get_submodule(found.call.name))
        weights: dict[str, Tensor] = dict((averaged or live).named_parameters())
        fallback = channel_scores(weights, found.plan)  # looks for NaN in the weights, too
        with (
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            untouched(trainer, module),
            parameters_set_aside(module, live, None if averaged is None else weights),
        ):
            seed_everything_by(trainer.global_step, trainer.global_rank)
            run = _Run(self, trainer, module, found, partition, live, scoring_batches(trainer, self.batches))
            with run:
                signed, reached, samples = run.measure()
        scores = self._scores(found, partition, run.names, signed, reached, samples, fallback)
        scores = [trainer.strategy.broadcast(each) for each in scores]
        self.last_seconds = time.perf_counter() - started
        self.seconds += self.last_seconds
        self.checks += 1
        if self.checks == 1:
            self._tell_cost(len(run.batches))
        self._newest = trainer.global_step, scores
        return scores

    def forget(self) -> None:
        """Score anew even at an optimizer step that has been scored."""
        self._newest = None

    def tell_total(self) -> None:
        """Say what scoring has cost, once the search or the fit is over; once."""
        if self.checks > 1:
            rank_zero_info(
                f"EarlyBirdDetector: scoring by criterion={self.criterion!r} took {self.seconds:.1f} s in "
                f"{self.checks} checks."
            )
        self.checks, self.seconds = 0, 0.0

    @property
    def passes(self) -> int:
        """How often every batch is gone through."""
        return 2 if self.criterion == "diff_pruning" else 1

    def _tell_cost(self, batches: int) -> None:
        # A backward pass costs two forward passes, and the first pass of Diff-Pruning goes forward only.
        steps = batches * (1.0 if self.passes == 1 else 4 / 3)
        rank_zero_info(
            f"EarlyBirdDetector: scoring by criterion={self.criterion!r} took {self.last_seconds:.1f} s for {batches} "
            f"batches, the cost of about {steps:.1f} training steps, and will do so at every check."
        )

    def _scores(
        self,
        found: FoundDenoiser,
        partition: TimestepPartition,
        names: Sequence[str],
        signed: Tensor,
        reached: Tensor,
        samples: Tensor,
        fallback: Tensor,
    ) -> list[Tensor]:
        """From what all ranks have measured, region by region, to scores."""
        slots = slice_slots(found.plan, names)
        if not bool(signed.isfinite().all()):
            owners = [name for name in names for ids in found.plan.ids[name].values() for _ in ids]
            bad = owners[int((~signed.isfinite().all(0)).nonzero()[0])]
            raise NonFiniteWeightsError(
                f"criterion={self.criterion!r}: the gradient of {bad!r} holds NaN or infinite values in the scoring "
                "batches. Lower the learning rate, clip gradients, or use criterion='magnitude'."
            )
        scores = []
        for index, region in enumerate(partition):
            own = slice(index, index + 1)
            if samples[index] == 0:
                self._warn_once(
                    f"score_batches={self.batches}: no sample of the scoring batches fell into the region "
                    f"[{region.start:g}, {region.stop:g}), whose channels are scored by the gradient over all regions "
                    "instead. Raise score_batches."
                )
                own = slice(None)
            products, touched = signed[own].sum(0), reached[own].any(0)
            score, unreached = taylor_scores(found.plan, slots, products, touched, fallback)
            if unreached:
                self._warn_once(
                    f"criterion={self.criterion!r}: no gradient reaches {len(unreached)} channel groups of the "
                    f"denoiser (their weights are frozen or unused), such as {unreached[0]!r}; they are ranked by "
                    "magnitude. Unfreeze them if they are to be trained."
                )
            scores.append(score)
        return scores

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)


class _Run:
    """One round of scoring."""

    def __init__(
        self,
        scorer: GradientScorer,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        found: FoundDenoiser,
        partition: TimestepPartition,
        network: nn.Module,
        batches: list[Any],
    ) -> None:
        self.scorer, self.trainer, self.module, self.batches = scorer, trainer, module, batches
        self.found, self.partition, self.network = found, partition, network
        self.parameters: Mapping[str, Tensor] = dict(network.named_parameters())
        self.names = weight_names(self.parameters, found.plan)
        self._widths = torch.tensor([sum(map(len, found.plan.ids[name].values())) for name in self.names])
        self._device = trainer.strategy.root_device
        bar: Any = trainer.progress_bar_callback
        self._bar = tqdm(
            total=len(batches) * scorer.passes,
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
        self._matter = self._timesteps_that_matter() if self.scorer.criterion == "diff_pruning" else None
        self._signed = torch.zeros(len(self.partition), int(self._widths.sum()), device=self._device)
        self._reached = torch.zeros_like(self._signed)
        self._samples = torch.zeros(len(self.partition), device=self._device)
        self._each_batch(self._measure, with_graph=True)
        if not bool(self._samples.any()):
            raise MisconfigurationException(
                f"criterion={self.scorer.criterion!r}: in {len(self.batches)} batches training_step returned no loss, "
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
        return [
            (each, bins_that_matter(total, self.scorer.threshold)) for each, total in zip(bins, totals, strict=True)
        ]

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
                f"criterion={self.scorer.criterion!r}: the loss that training_step returned does not depend on trained "
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
