"""Channel scores in the middle of a fit, which goes on as if nothing had been."""

from __future__ import annotations

import time
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_earlybird.compilation import unwrap
from lightning_earlybird.conversion import FoundDenoiser
from lightning_earlybird.importance import (
    GRADIENT_CRITERIA,
    Criterion,
    NonFiniteGradientsError,
    channel_scores,
    check_finite,
    custom_scores,
    slice_slots,
    taylor_scores,
)
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.score_batches import scoring_batches
from lightning_earlybird.scoring_run import ScoringRun, passes
from lightning_earlybird.untouched import isolated_rng, parameters_set_aside, seed_everything_by, untouched


class GradientScorer:
    """Scores channels by Taylor expansion of the training loss, for each timestep region.

    Beside what a training step needs there must be room for one more copy of the trainable parameters and for one set
    of their gradients; and in the first training step, which is under way when the initial masks are drawn, for the
    activations of two steps.

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
            NonFiniteWeightsError: A weight is NaN or infinite; the subclass NonFiniteGradientsError: only gradients.
        """
        if self._newest is not None and self._newest[0] == trainer.global_step:
            return self._newest[1]  # the switch asks for what the check of its step has seen
        started = time.perf_counter()
        live = unwrap(module.get_submodule(found.call.name))
        weights: dict[str, Tensor] = dict((live if averaged is None else averaged).named_parameters())
        fallback = channel_scores(weights, found.plan)  # looks for NaN in the weights, too
        with (
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            untouched(trainer, module),
            parameters_set_aside(module, live, None if averaged is None else weights),
        ):
            seed_everything_by(trainer.global_step, trainer.global_rank)
            batches = scoring_batches(trainer, self.batches)
            run = ScoringRun(
                trainer, module, found, partition, batches, criterion=self.criterion, threshold=self.threshold
            )
            with run:
                measured = run.measure()
        scores = self._scores(found, partition, run.names, *measured, fallback)
        scores = [trainer.strategy.broadcast(each) for each in scores]
        self.last_seconds = time.perf_counter() - started
        self.seconds += self.last_seconds
        self.checks += 1
        if self.checks == 1:
            self._tell_cost(len(batches))
        self._newest = trainer.global_step, scores
        return scores

    def forget(self) -> None:
        """Score anew even at an optimizer step that has been scored."""
        self._newest = None

    def tell_total(self) -> None:
        """Say what scoring has cost, once the search or the fit is over; once."""
        if self.checks > 1:
            rank_zero_info(
                f"EarlyBirdDetector: scoring by criterion={self.criterion!r} took {self.seconds:.2f} s in "
                f"{self.checks} checks."
            )
        self.checks, self.seconds = 0, 0.0

    def _tell_cost(self, batches: int) -> None:
        # A backward pass costs two forward passes, and the first pass of Diff-Pruning goes forward only.
        steps = batches * (1.0 if passes(self.criterion) == 1 else 4 / 3)
        rank_zero_info(
            f"EarlyBirdDetector: scoring by criterion={self.criterion!r} took {self.last_seconds:.2f} s for {batches} "
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
            raise NonFiniteGradientsError(
                f"criterion={self.criterion!r}: the gradient of {bad!r} holds NaN or infinite values in the scoring "
                "batches. Lower the learning rate, clip gradients, or use criterion='magnitude'."
            )
        scores = []
        for index, region in enumerate(partition):
            own = slice(index, index + 1)
            if samples[index] == 0 and region.sparsity > 0:
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


class ChannelScorer:
    """Scores channels by any criterion, the same on all ranks.

    Args:
        criterion: See :class:`EarlyBirdDetector`.
        batches: See :class:`GradientScorer`.
        threshold: See :class:`GradientScorer`.

    Attributes:
        gradients: What scores by gradients; None for the other criteria.
    """

    def __init__(self, criterion: Criterion, *, batches: int, threshold: float) -> None:
        self.criterion = criterion
        self.gradients: GradientScorer | None = None
        if isinstance(criterion, str) and criterion in GRADIENT_CRITERIA:
            self.gradients = GradientScorer(criterion, batches=batches, threshold=threshold)

    def score(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        found: FoundDenoiser,
        partition: TimestepPartition | None,
        averaged: nn.Module | None = None,
    ) -> list[Tensor]:
        """Score the channels of the denoiser.

        Args:
            trainer: The Trainer of the fit.
            module: Its LightningModule.
            found: The denoiser.
            partition: The regions that are scored each for itself; None for the whole time axis. Only criteria with
                gradients know regions.
            averaged: Another copy of the denoiser, whose weights are scored in place of the live ones.

        Returns:
            One tensor of shape (num_channels,), float32, CPU, for each region, or for the whole axis.

        Raises:
            MisconfigurationException: See :meth:`GradientScorer.score`.
            NonFiniteWeightsError: A weight is NaN or infinite; the subclass NonFiniteGradientsError: only gradients.
            ValueError: A callable does not give one finite score for each channel.
        """
        if averaged is not None:
            check_finite(averaged, "the averaged denoiser")
        if self.gradients is not None:
            return self.gradients.score(trainer, module, found, partition or TimestepPartition.whole(0.0), averaged)
        network = averaged if averaged is not None else unwrap(module.get_submodule(found.call.name))
        if self.criterion == "magnitude":
            # Not broadcast: added up in a fixed order, from weights that are the same on every rank.
            return [channel_scores(dict(network.named_parameters()), found.plan)]
        if callable(self.criterion):
            with isolated_rng():
                seed_everything_by(trainer.global_step)
                scores = custom_scores(self.criterion, network, found.plan)
        else:
            generator = torch.Generator().manual_seed(trainer.global_step)
            scores = channel_scores({}, found.plan, "random", generator)
        return [trainer.strategy.broadcast(scores)]
