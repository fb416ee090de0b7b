"""TimestepAwarePruner: turns the dense denoiser into one small network per timestep region, in the middle of a fit."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from typing_extensions import override

from lightning_earlybird.arguments import (
    check_choice,
    check_positive,
    check_resumed,
    check_state_version,
    plain_settings,
    reading_state,
    taken,
)
from lightning_earlybird.budget import Allocation, Heads, Scope, Target
from lightning_earlybird.checkpoint_io import write_whole_checkpoints
from lightning_earlybird.checkpointing import follow_checkpoints, save_structure
from lightning_earlybird.compilation import unwrap
from lightning_earlybird.conversion import FoundDenoiser, convert, find_ensemble
from lightning_earlybird.detector import EarlyBirdDetector
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.parallel.fit_files import refuse_directories
from lightning_earlybird.parallel.timing import PassSeconds, StepClock, pass_seconds
from lightning_earlybird.probe import DenoiserCall, check_name
from lightning_earlybird.regions import RegionLike, TimestepPartition, TimestepRegion
from lightning_earlybird.reporting import (
    MATPLOTLIB_AVAILABLE,
    LossReport,
    cost_of_dense,
    define_metrics,
    describe_run,
    log_tickets,
    report_end,
    report_switch,
    ticket_table,
)
from lightning_earlybird.resume import Continuing, begins_anew
from lightning_earlybird.saved_tickets import take_saved_tickets
from lightning_earlybird.search import SearchKey, describe, short_name
from lightning_earlybird.strategy import MultiTicketStrategy
from lightning_earlybird.structure import Norm
from lightning_earlybird.tickets import TicketFacts, saved_partition
from lightning_earlybird.transition import averaged_modules, check_supported, check_trained
from lightning_earlybird.writing import check_directory, is_rehearsal, write_at_end, write_at_switch


class SearchLimitError(RuntimeError):
    """Tickets had not emerged by ``max_search_steps``, and ``on_search_limit="raise"`` asked to be told."""


class TimestepAwarePruner(Continuing):
    """Gives each stretch of the time axis a network of its own, as sparse as it can bear, in the middle of a fit.

    The dense denoiser trains until the tickets of all regions have emerged (see :class:`EarlyBirdDetector`). Then, in
    the same fit, it is replaced by an ensemble that routes every sample to the ticket of its timestep's region: the
    module's ``training_step`` and its timesteps stay as they are. Optimizer moments, schedules and averaged weights are
    carried over. The tickets are written to ``directory / "switch"`` at that moment, and the trained ensemble to
    ``directory / "ensemble"`` at the end of the fit (with the averaged weights, where a callback keeps such). With
    ``fast_dev_run`` nothing is written.

    The method is EB-Diff-Train's timestep-aware tickets (arXiv 2504.09606). Differs from the paper: all tickets are
    drawn from the weights at the switch, when the last one has emerged, instead of each from the weights of its own
    emergence; optimizer moments are kept, not reset; in one process the tickets train together, each on the share of
    the timesteps that falls into its region, instead of one after the other with budgets of their own.

    Args:
        regions: Regions that partition the time axis: :class:`TimestepRegion`, triples ``(start, stop, sparsity)`` or
            mappings; or the path of tickets that were saved earlier, which then replace the denoiser at the start of
            the fit.
        denoiser: Dotted name of the denoiser in the LightningModule; None finds it by watching the first training
            batch.
        overlap: How far each region's training reaches past its upper end, in the module's own time unit. Inference
            never overlaps.
        max_search_steps: Optimizer steps after which the search ends; None never ends it.
        on_search_limit: ``"prune"`` takes the masks of that moment; ``"raise"`` stops with :class:`SearchLimitError`.
        rewind: ``"init"`` gives the tickets the initial weights under their masks, with fresh optimizer state (the
            lottery-ticket control); None keeps what the dense denoiser has learned.
        round_to: Kept widths are multiples of this (8 is what tensor cores like); a layer no wider than it stays whole.
        target: What sparsity is the fraction of: ``"channels"`` that can be pruned, or ``"params"`` or ``"macs"`` of
            the whole denoiser. What cannot be met to one percent is warned about, with what is possible.
        scope: ``"uniform"`` takes the same fraction from every layer; ``"global"`` ranks the channels of all layers by
            their score over the mean score of their layer, so that layers of many weak channels lose more.
        min_width: Channels that every layer keeps at least, or, as a float in (0, 1), the fraction of its width.
        heads: ``"equal"`` narrows all heads of an attention alike, and rescales its queries so that scores stay what
            they were; ``"whole"`` removes whole heads where the module can be told how many are left.
        norm: What becomes of a GroupNorm that loses channels: ``"shrink"`` regroups those that stay evenly, in at most
            as many groups as before; ``"exact"`` normalises each with what is left of its own group.
        log_tickets: Whether the tickets, at the switch and trained, become versions of an artifact of a W&B run.
            ``"auto"`` leaves out what is larger than 2 GiB.
        dirpath: Where tickets and figures are written; None means ``tickets`` beside the first logger's files, or a new
            ``earlybird/version_N`` in the Trainer's ``default_root_dir`` without a logger.

    Attributes:
        detector: The detector in use: the Trainer's, or one that the pruner brought.
        facts: What is known about each ticket, in region order; empty before the switch.
        switched_at: Optimizer step of the switch; None before it.
        directory: Where tickets are written; None before the fit.

    Raises:
        ValueError: If an argument is out of range, or the regions do not partition an axis.
        MisconfigurationException: In ``setup`` or during the first batch, if the Trainer, the module or the denoiser
            cannot be pruned.
        SearchLimitError: See ``on_search_limit``.
        NonFiniteWeightsError: At the switch, if a weight of the denoiser, or of its average, is NaN or infinite; the
            denoiser is still dense then.
        OSError: At the end, if the ensemble can be written neither to ``directory``, nor to ``default_root_dir``, nor
            among temporary files.

    Example::

        pruner = TimestepAwarePruner([(0, 240, 0.3), (240, 440, 0.6), (440, 1000, 0.8)], overlap=20)
        L.Trainer(callbacks=[pruner]).fit(module)
    """

    def __init__(
        self,
        regions: Sequence[RegionLike] | str | os.PathLike[str],
        *,
        denoiser: str | None = None,
        overlap: int | float = 0,
        max_search_steps: int | None = None,
        on_search_limit: Literal["prune", "raise"] = "prune",
        rewind: Literal["init"] | None = None,
        round_to: int = 8,
        target: Target = "channels",
        scope: Scope = "uniform",
        min_width: int | float = 1,
        heads: Heads = "equal",
        norm: Norm = "shrink",
        dirpath: str | os.PathLike[str] | None = None,
        log_tickets: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        check_positive(max_search_steps=max_search_steps, round_to=round_to)
        check_choice("on_search_limit", on_search_limit, ("prune", "raise"))
        check_choice("rewind", rewind, (None, "init"))
        check_choice("norm", norm, get_args(Norm))
        check_choice("log_tickets", log_tickets, (True, False, "auto"))
        self._allocation = Allocation(target, scope, round_to, min_width, heads)
        # Exactly one of the two: regions to search tickets for, or the tickets themselves.
        self._saved: Path | None = None
        self._partition: TimestepPartition | None = None
        if not isinstance(regions, str | os.PathLike):
            self._partition = TimestepPartition.of(regions, overlap)
        else:
            if isinstance(regions, str) and regions.lstrip().startswith(("[", "{", "(")):
                # A command line hands over as text what it could not read as a list.
                raise ValueError(
                    f"regions={regions!r} is text, which stands for the path of saved tickets, but looks like a list. "
                    "Give a list of triples (start, stop, sparsity) of numbers, or of mappings with those names."
                )
            self._saved = Path(regions)
            settings = {"overlap": overlap, "max_search_steps": max_search_steps, "rewind": rewind, "norm": norm}
            settings |= asdict(self._allocation)
            defaults = {"overlap": 0, "max_search_steps": None, "rewind": None, "norm": "shrink"}
            defaults |= asdict(Allocation())
            for name, value in settings.items():
                if value != defaults[name]:
                    raise ValueError(
                        f"{name}={value!r} has no effect on the tickets saved in regions={str(regions)!r}, which bring "
                        "their regions, overlap and networks. Leave it at its default."
                    )
        self.regions = regions
        self.denoiser = denoiser
        self.overlap = overlap
        self.max_search_steps = max_search_steps
        self.on_search_limit = on_search_limit
        self.rewind = rewind
        self.round_to = round_to
        self.target = target
        self.scope = scope
        self.min_width = min_width
        self.heads = heads
        self.norm: Norm = norm
        self.dirpath = dirpath
        self.log_tickets = log_tickets

        self.detector: EarlyBirdDetector | None = None
        self.facts: tuple[TicketFacts, ...] = ()
        self.switched_at: int | None = None
        self.directory: Path | None = None
        self._saved_settings: dict[str, Any] = {}
        self._initial: dict[str, Tensor] | None = None
        self._seen: FoundDenoiser | None = None
        self._losses = LossReport()
        # The denoiser, or what has taken its place: name, timesteps, regions; None until it is known.
        self._watched: tuple[str, TimestepArgument, TimestepPartition] | None = None
        self._unfollow: Callable[[], None] | None = None
        self._clock: StepClock | None = None
        self._ended = False

    @property
    def phase(self) -> Literal["search", "tickets"]:
        """What the fit is doing: searching with the dense denoiser, or training tickets."""
        return "search" if self.switched_at is None else "tickets"

    # --- hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._leave_checkpoints()
        self._unfollow = follow_checkpoints(trainer, pl_module)
        if not isinstance(trainer.strategy, MultiTicketStrategy):
            refuse_directories(trainer)
        if stage != "fit":
            return
        check_supported(trainer, pl_module)
        write_whole_checkpoints(trainer)
        gone = self.switched_at is not None and find_ensemble(pl_module) is None  # tickets of an earlier module
        if begins_anew(trainer, pl_module, self) or gone:
            self.facts, self.switched_at, self._initial, self._losses = (), None, None, LossReport()
            self._saved_settings = {}
        self._watched = None
        if self._partition is not None:
            self._take_detector(trainer, pl_module, self._partition)
            together = not isinstance(trainer.strategy, MultiTicketStrategy)
            if together and any(region.max_steps for region in self._partition):
                rank_zero_warn(
                    f"regions: max_steps has no effect with strategy={type(trainer.strategy).__name__}, where all "
                    "tickets train together; the Trainer's max_steps ends the fit. MultiTicketStrategy, on one device "
                    "or several, trains each ticket for its own number of steps."
                )
        directory = Path(self.dirpath) if self.dirpath is not None else _default_directory(trainer)
        self.directory = Path(trainer.strategy.broadcast(str(directory)))
        check_directory(trainer, self.directory)
        if self.detector is not None:
            self.detector.figures.folder = None if is_rehearsal(trainer) else self.directory
        if isinstance(trainer.strategy, MultiTicketStrategy):
            trainer.strategy.note_directory(self.directory)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Where there is a detector it looks at the same, and knows the denoiser.
        if self.denoiser is not None:
            check_name(pl_module, self.denoiser)
        check_resumed(self._settings, self._saved_settings)  # not on loading, which tests and predictions do as well
        check_supported(trainer, pl_module)
        self._clock, self._ended = None, False
        if isinstance(trainer.strategy, MultiTicketStrategy):
            self._clock = StepClock(trainer.strategy.root_device)
            assert self.directory is not None
            partition = saved_partition(self._saved) if self._saved is not None else self._partition
            assert partition is not None
            trainer.strategy.prepare(pl_module, len(partition), self.directory)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._describe(trainer)
        present = find_ensemble(pl_module)
        if present is None and self._saved is not None:
            self._take_saved(trainer, pl_module, self._saved)
        elif present is not None:
            check_trained(trainer, *present)
            self._resume(trainer, *present)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Before the batch that follows a check, and not in the hook of the check: validation, checkpoints and early
        # stopping of that step then still see the dense denoiser, whose scores they hold.
        if self._clock is not None:
            self._clock.batch_begins()
        found = self.detector.found if self.detector is not None else None
        if found is not None and self._partition is not None:
            self._watched = found.call.name, found.call.timesteps, self._partition
        self._consider_switch(trainer, pl_module)
        if self._watched is not None:
            self._losses.batch_begins(trainer, pl_module, *self._watched, apart=_apart(trainer) is not None)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._look_at_first_step(pl_module)
        self._losses.backward_begins(trainer, pl_module, loss)
        if self._clock is not None:
            self._clock.backward_begins()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._clock is not None:
            self._clock.backward_ends()
        self._losses.backward_ended(trainer, pl_module, apart=_apart(trainer))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._look_at_first_step(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look_at_first_step(pl_module)
        self._losses.batch_ended(trainer, pl_module, outputs, apart=_apart(trainer))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended = True
        self._losses.end(trainer, apart=_apart(trainer))
        if isinstance(trainer.strategy, MultiTicketStrategy) and trainer.strategy.is_split:
            return  # the strategy calls when every rank has all tickets
        if find_ensemble(pl_module) is not None:
            self._write_ensemble(trainer, pl_module)
        elif self.detector is not None:
            emerged = self.detector.emerged
            progress = {
                short_name(key) if isinstance(key, TimestepRegion) else key: f"emerged at step {emerged[key]}"
                if key in emerged
                else _last(window.checks)
                for key, window in self.detector.windows.items()
            }
            rank_zero_warn(
                f"TimestepAwarePruner: the fit ended during the search, the denoiser is still dense ({progress}). "
                "Train longer, check more often, raise threshold, or set max_search_steps."
            )

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Resumed from a checkpoint of the last step, a fit ends before it begins: nothing is left to train, but the
        # ensemble may be missing if the process was killed before it was written.
        present = find_ensemble(pl_module)
        if isinstance(trainer.strategy, MultiTicketStrategy) or self._ended or present is None:
            return
        if trainer.fit_loop.done:
            self._resume(trainer, *present)
            self.on_train_end(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        save_structure(pl_module, checkpoint)  # after the fit, the module's own hook is no longer followed
        if isinstance(trainer.strategy, MultiTicketStrategy):
            trainer.strategy.write_record(trainer, checkpoint)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(trainer.strategy, MultiTicketStrategy):
            trainer.strategy.report(exception)
        super().on_exception(trainer, pl_module, exception)
        self._losses.leave()
        self._leave_checkpoints()  # Lightning does not tear down after an exception

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._losses.leave()
        self._leave_checkpoints()

    # --- the search and its end

    def _take_detector(self, trainer: pl.Trainer, pl_module: pl.LightningModule, partition: TimestepPartition) -> None:
        """Use the Trainer's detector or bring one; it acts first, so that a check and its switch coincide."""
        needed = [sparsity for sparsity in partition.sparsities if sparsity > 0]
        callbacks: list[pl.Callback] = list(trainer.callbacks)  # type: ignore[attr-defined]
        present = [callback for callback in callbacks if isinstance(callback, EarlyBirdDetector)]
        covering = [detector for detector in present if set(needed) <= set(detector.sparsities)]
        if present and len(covering) != 1:
            problem = "none covers" if not covering else "more than one covers"
            offered = [[float(s) for s in detector.sparsities] for detector in present]
            raise MisconfigurationException(
                f"regions need the sparsities {needed}, and of the EarlyBirdDetectors with {offered} {problem} them. "
                "Give one detector all of them, or none: the pruner then brings its own."
            )
        # Where every region stays dense nothing has to settle, but the denoiser must be found all the same.
        self.detector = covering[0] if covering else EarlyBirdDetector(needed or [0.5])
        self.detector.serve(denoiser=self.denoiser, allocation=self._allocation, norm=self.norm, partition=partition)
        callbacks = [callback for callback in callbacks if callback is not self.detector]
        callbacks.insert(callbacks.index(self), self.detector)
        # A new list: Lightning is iterating over the old one at this moment.
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        if not covering:
            self.detector.setup(trainer, pl_module, "fit")

    def _consider_switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        detector, partition = self.detector, self._partition
        if self.switched_at is not None or partition is None or detector is None or detector.found is None:
            return
        needed = dict.fromkeys(detector.key(region) for region in _by_sparsity(partition) if region.sparsity > 0)
        missing = [key for key in needed if key not in detector.emerged]
        if missing and (self.max_search_steps is None or trainer.global_step < self.max_search_steps):
            return
        if missing and self.on_search_limit == "raise":
            raise SearchLimitError(
                f"max_search_steps={self.max_search_steps}: the tickets of {_listed(missing)} have not emerged by step "
                f"{trainer.global_step}. Raise max_search_steps or threshold, or take the masks as they are with "
                "on_search_limit='prune'."
            )
        if missing:
            rank_zero_warn(
                f"max_search_steps={self.max_search_steps} reached: the masks of {_listed(missing)} are taken as they "
                "are, although they have not settled."
            )
        self._switch(trainer, pl_module, detector, partition)

    def _switch(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        detector: EarlyBirdDetector,
        partition: TimestepPartition,
    ) -> None:
        assert detector.found is not None and self.directory is not None
        found = detector.found
        drawn = detector.try_draw(trainer, pl_module)
        if drawn is None:
            return  # the next batch tries again
        besides_s = self._besides_seconds(trainer, unwrap(pl_module.get_submodule(found.call.name)), found.call)
        keys = {region: detector.key(region) for region in partition if region.sparsity > 0}
        masks = [drawn[keys[region]] if region in keys else found.plan.full_mask() for region in partition]
        ensemble = convert(
            trainer,
            pl_module,
            found,
            partition,
            masks,
            {region: detector.emerged[key] for region, key in keys.items() if key in detector.emerged},
            target=detector.budget.allocation.target,
            norm=self.norm,
            initial_weights=self._initial,
        )
        assert ensemble.record is not None
        detector.finish()
        self._initial = self._seen = None
        self.facts = ensemble.record.facts
        self.switched_at = trainer.global_step
        self._losses.switch(partition)
        written = write_at_switch(trainer, ensemble, self.directory / "switch")
        rank_zero_info(
            f"TimestepAwarePruner: the denoiser has become {len(partition)} tickets at step {self.switched_at}.\n"
            f"{ticket_table(self.facts)}"
        )
        detector.figures.draw(trainer, detector.windows, detector.threshold)
        report_switch(trainer, ensemble.record, self.switched_at, folder=detector.figures.folder)
        if detector.figures.folder is not None and MATPLOTLIB_AVAILABLE:
            rank_zero_info(f"TimestepAwarePruner: the figures are in {str(detector.figures.folder)!r}.")
        self._log_tickets(trainer, self.directory / "switch" if written else None, "switch")
        self._split(trainer, pl_module, self._step_seconds(trainer, ensemble, found.call, besides_s))

    def _look_at_first_step(self, pl_module: pl.LightningModule) -> None:
        """As soon as the denoiser is found, and before it learns: do the regions fit, and what are its weights?"""
        found = self.detector.found if self.detector is not None else None
        if found is None or self._partition is None or self._seen is found:
            return
        self._seen = found
        try:
            self._partition.lookup(found.call.seen)
        except ValueError as error:
            # The tickets would say so, too, but only once the search is over.
            regions = self._partition.to_json()["regions"]
            raise MisconfigurationException(f"regions={regions}: in the first batch, {error}") from error
        network = unwrap(pl_module.get_submodule(found.call.name))
        normed = [name for name, part in network.named_modules() if isinstance(part, _BatchNorm)]
        if normed and len(self._partition) > 1:
            raise MisconfigurationException(
                f"denoiser={found.call.name!r} has the batch norm {normed[0]!r}: a ticket sees the part of each batch "
                "that falls into its region, down to a single sample, from which there are no statistics. Use a norm "
                "that needs no batch (GroupNorm), or one region."
            )
        if self.rewind == "init" and self._initial is None:
            if pl_module.global_step > 0:
                rank_zero_warn(
                    f"rewind='init': the checkpoint does not hold the initial weights; those of step "
                    f"{pl_module.global_step} are taken for them. Use the pruner from the start of the training."
                )
            self._initial = {key: value.detach().to("cpu", copy=True) for key, value in network.state_dict().items()}

    def _split(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step_seconds: Sequence[float] | None) -> None:
        """Under MultiTicketStrategy: from here on ranks train different tickets."""
        strategy = trainer.strategy
        if not isinstance(strategy, MultiTicketStrategy):
            return
        measured = step_seconds is not None
        if step_seconds is None:
            # Tickets that were there from the start: MACs at a made-up speed still share out the ranks.
            step_seconds = [1.0 if fact.macs is None else fact.macs[1] * 1e-9 for fact in self.facts]
        strategy.split(
            trainer,
            pl_module,
            step_seconds,
            lambda: self._write_ensemble(trainer, pl_module),
            began=self.switched_at,
            measured=measured,
        )

    def _besides_seconds(self, trainer: pl.Trainer, dense: nn.Module, call: DenoiserCall) -> float:
        """Seconds that a step of the search takes besides the passes through the denoiser; zero if nobody asks.

        They hold data, noise, the optimizer, callbacks: what a ticket's step takes as well.
        """
        strategy, clock = trainer.strategy, self._clock
        self._clock = None  # the search is over
        if not isinstance(strategy, MultiTicketStrategy) or clock is None or clock.seconds is None:
            return 0.0
        # Both as they are at most times on a machine that others use, too, so that their difference holds anywhere.
        return max(0.0, clock.seconds - statistics.median(self._pass_seconds(strategy, dense, call).forward))

    def _step_seconds(
        self, trainer: pl.Trainer, ensemble: TicketEnsemble, call: DenoiserCall, besides_s: float
    ) -> list[float] | None:
        """Seconds of an optimizer step of each ticket: its passes, and what a step takes besides.

        The mean over the ranks, so that all come to the same plan; the largest would grow with every rank that was
        disturbed just then.
        """
        strategy = trainer.strategy
        if not isinstance(strategy, MultiTicketStrategy):
            return None
        seconds = [self._pass_seconds(strategy, ticket, call).least + besides_s for ticket in ensemble.tickets]
        local = torch.tensor(seconds, device=strategy.root_device)
        steps: list[float] = (strategy.reduce(local, reduce_op="mean") * trainer.accumulate_grad_batches).tolist()
        return steps

    def _pass_seconds(self, strategy: MultiTicketStrategy, network: nn.Module, call: DenoiserCall) -> PassSeconds:
        strategy.barrier()  # ranks of one machine share it: the same load for every network
        return pass_seconds(network, call, strategy.root_device, strategy.precision_plugin.train_step_context)

    def _write_ensemble(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = find_ensemble((averaged_modules(trainer) or [pl_module])[0])
        assert found is not None and self.directory is not None
        written = write_at_end(trainer, found[1], self.directory / "ensemble")
        self._log_tickets(trainer, written, "final")
        report_end(trainer, {"cost_of_dense": self._cost_of_dense(trainer)})

    # --- what loggers are told besides

    def _describe(self, trainer: pl.Trainer) -> None:
        """Settings and metrics of the fit that begins."""
        partition = saved_partition(self._saved) if self._saved is not None else self._partition
        assert partition is not None
        regions = [[region.start, region.stop, region.sparsity] for region in partition]
        limits = [region.max_steps for region in partition]
        settings = {"regions": regions, "overlap": partition.overlap, "strategy": type(trainer.strategy).__name__}
        settings |= {"max_search_steps": self.max_search_steps, "on_search_limit": self.on_search_limit}
        settings |= {"rewind": self.rewind, "max_ticket_steps": limits if any(limits) else None} | self._settings
        describe_run(trainer, settings)
        define_metrics(trainer, partition)

    def _log_tickets(self, trainer: pl.Trainer, directory: Path | None, alias: str) -> None:
        if directory is not None and not is_rehearsal(trainer):
            choice = self.log_tickets
            log_tickets(trainer, directory, self.facts, alias=alias, step=trainer.global_step, choice=choice)

    def _cost_of_dense(self, trainer: pl.Trainer) -> float | None:
        """Of search and tickets, from the samples that were seen, or, where tickets train apart, from their plan."""
        plan = trainer.strategy.plan if isinstance(trainer.strategy, MultiTicketStrategy) else None
        if plan is not None and all(steps is not None for steps in plan.steps):
            batches = [steps * len(plan.assignment.ranks(k)) for k, steps in enumerate(plan.steps) if steps is not None]
            return cost_of_dense(self.facts, (self.switched_at or 0) * trainer.world_size, batches)
        seen = self._losses.samples_seen()
        return None if seen is None or plan is not None else cost_of_dense(self.facts, *seen)

    # --- tickets that are there already

    def _take_saved(self, trainer: pl.Trainer, pl_module: pl.LightningModule, path: Path) -> None:
        """Put tickets that were saved earlier in the denoiser's place."""
        name, saved = take_saved_tickets(trainer, pl_module, self.denoiser, path)
        self._resume(trainer, name, saved)
        assert saved.record is not None
        report_switch(
            trainer, saved.record, trainer.global_step, folder=None if is_rehearsal(trainer) else self.directory
        )
        rank_zero_info(
            f"TimestepAwarePruner: {len(saved.tickets)} tickets from {str(path)!r} have replaced the denoiser "
            f"{name!r}.\n{ticket_table(self.facts)}"
        )

    def _resume(self, trainer: pl.Trainer, name: str, ensemble: TicketEnsemble) -> None:
        """The denoiser's place is taken by tickets already: go on with those."""
        if self._partition is not None and ensemble.partition != self._partition:
            raise MisconfigurationException(
                f"regions={self._partition.to_json()} differ from those of the tickets in {name!r}, "
                f"{ensemble.partition.to_json()}. Resume with the regions that the tickets were made for."
            )
        self._clock = None
        self._watched = name, ensemble.timesteps, ensemble.partition
        if self.detector is not None:
            self.detector.finish()
        if self.switched_at is None:
            self.switched_at = trainer.global_step
        strategy = trainer.strategy
        if len(ensemble.hosted) < len(ensemble.tickets) and not (
            isinstance(strategy, MultiTicketStrategy) and strategy.is_split
        ):
            raise MisconfigurationException(
                f"ckpt_path: the checkpoint holds the tickets {list(ensemble.hosted)} of {len(ensemble.tickets)}, as "
                "one group of ranks had them under MultiTicketStrategy. Resume with that strategy, for which one "
                "device is enough: ckpt_path=PATH with the directory that holds the folders of all groups. Or start "
                "from the tickets at the switch: regions=PATH with the directory `switch` of the tickets' directory."
            )
        if ensemble.record is not None:
            self.facts = ensemble.record.facts
        self._split(trainer, trainer.lightning_module, None)

    def _leave_checkpoints(self) -> None:
        if self._unfollow is not None:
            self._unfollow()
            self._unfollow = None

    # --- state

    @property
    def _settings(self) -> dict[str, Any]:
        """What tickets are made by besides their regions, in plain types; saved ones bring their own."""
        return {} if self._partition is None else plain_settings({**asdict(self._allocation), "norm": self.norm})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "format_version": 1,
            "settings": self._settings,
            "switched_at": self.switched_at,
            "initial_weights": self._initial,
            **self._losses.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with reading_state(self):
            check_state_version(self, state_dict, newest=1)
            # Absent from the first ones of this version.
            self._saved_settings = taken({"settings": {}, **state_dict}, "settings", dict)
            self.switched_at = taken(state_dict, "switched_at", int, type(None))
            self._initial = taken(state_dict, "initial_weights", dict, type(None))
            self._losses.load_state_dict(state_dict)


def _default_directory(trainer: pl.Trainer) -> Path:
    """Beside the logger's own files, as Lightning places its checkpoints; a new folder where there is no logger."""
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version / "tickets"
    root = Path(trainer.default_root_dir) / "earlybird"
    number = 0
    while (root / f"version_{number}").exists():
        number += 1
    return root / f"version_{number}"


def _apart(trainer: pl.Trainer) -> dict[int, Any] | None:
    """Ticket -> what ``training_step`` has returned for it on this batch; None where tickets train together."""
    strategy = trainer.strategy
    return strategy.turn_outputs if isinstance(strategy, MultiTicketStrategy) and strategy.is_split else None


def _by_sparsity(partition: TimestepPartition) -> list[TimestepRegion]:
    return sorted(partition, key=lambda region: region.sparsity)


def _listed(keys: Sequence[SearchKey]) -> str:
    regions = [describe(key) for key in keys if isinstance(key, TimestepRegion)]
    return ", ".join(regions) if regions else f"sparsity {list(keys)}"


def _last(checks: Sequence[Any]) -> str:
    distance = checks[-1].distance if checks else None
    return f"{len(checks)} checks" if distance is None else f"distance {distance:.3f} after {len(checks)} checks"
