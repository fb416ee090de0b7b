"""EarlyBirdDetector: watches a denoiser's pruning masks until they settle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_earlybird.arguments import (
    check_choice,
    check_fraction,
    check_positive,
    check_resumed,
    check_state_version,
    plain_settings,
    reading_state,
    taken,
)
from lightning_earlybird.budget import Allocation, Budget, Heads, Scope, Target
from lightning_earlybird.checkpoint_io import write_whole_checkpoints
from lightning_earlybird.checkpointing import follow_checkpoints, save_structure
from lightning_earlybird.compilation import unwrap
from lightning_earlybird.convergence import MaskCheck, MaskWindow
from lightning_earlybird.conversion import FoundDenoiser, convert, find_ensemble
from lightning_earlybird.importance import Criterion, NonFiniteGradientsError, check_criterion
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.probe import DenoiserCall, DenoiserProbe, check_name
from lightning_earlybird.regions import TimestepPartition, TimestepRegion
from lightning_earlybird.reporting import SearchFigures, describe_run, log_metrics, report_switch, ticket_table
from lightning_earlybird.resume import Continuing, begins_anew
from lightning_earlybird.scoring import ChannelScorer
from lightning_earlybird.search import SearchKey, TicketSearch, describe, named_metrics, short_name, sparsity_of
from lightning_earlybird.structure import Norm
from lightning_earlybird.transition import averaged_modules, check_supported, check_trained, initial_share

# Checks in a row that may fail for gradients that are NaN or infinite: one batch may be bad, but not all of them.
_MOST_UNSOUND = 5


class EarlyBirdDetector(Continuing):
    """Finds early-bird tickets: channel masks that have stopped changing while the dense denoiser trains.

    At each check the denoiser's channels are scored, one mask per sparsity is drawn, and its distance to the masks
    before it is measured. A ticket has *emerged* when the newest mask is at most ``threshold`` away from each of the
    others in a FIFO of ``window`` masks (Early-Bird tickets, arXiv 1909.11957; EB-Diff-Train, arXiv
    2504.09606). The denoiser is found, traced and verified during the first training batch, before anything is learned.

    Logged at each check, per sparsity S: ``earlybird/distance/S`` (the one that decides),
    ``earlybird/distance_from_init/S``, ``earlybird/distance_to_half/S`` (to the mask at half the training so far), and
    once ``earlybird/null_line/S`` (the distance of two random masks). Where each region has masks of its own, S is
    ``START-STOP``. Criteria that take gradients also log ``earlybird/scoring_seconds``. Of several detectors in one
    Trainer that share a sparsity, all but the first (or the one that a pruner uses) log under ``earlybird/CRITERION``
    instead of ``earlybird``.

    Differs from the paper: masks are drawn from the raw weights by default, not from averaged ones, in which the
    initialisation lives on for long and which therefore seem settled early; the sparsity is met exactly, in widths that
    are multiples of ``round_to``. Of Diff-Pruning (arXiv 2305.10924) differs that a sample's loss is told from the
    squared norm of the gradient of the denoiser's output (for a mean squared error that is the loss, up to a factor),
    and that the largest loss is that of the region which the ticket will serve.

    Args:
        sparsities: Fractions to remove, of channels unless ``target`` says otherwise, each in (0, 1).
        denoiser: Dotted name of the denoiser in the LightningModule; None finds it by watching the first training
            batch.
        every_n_epochs: Check at the end of every so many epochs.
        every_n_train_steps: Check after every so many optimizer steps instead.
        window: Masks in the FIFO, the newest included.
        threshold: Largest mask distance that counts as settled.
        criterion: ``"magnitude"``; ``"random"`` as a control; ``"taylor"``: how much the training loss would change
            without a channel, to first order; ``"diff_pruning"``: the same, but only timesteps of substantial loss
            count; or a callable ``(denoiser, plan) -> scores`` of shape (plan.num_channels,), higher is more important,
            which is tried before anything is learned. Taylor scores run ``training_step`` on a few batches at each
            check. With a :class:`TimestepAwarePruner` they are taken over the timesteps of each region, and every
            region gets a mask of its own: the outcomes are then keyed by region instead of sparsity.
        score_batches: Batches of training data, on every rank, that Taylor scores are taken from.
        score_threshold: For ``"diff_pruning"``: timesteps whose loss is below this fraction of the largest (within a
            region, in bins of time) do not count; in [0, 1].
        weights: ``"raw"``; ``"ema"`` for the weights kept by a ``WeightAveraging`` callback; ``"auto"`` is raw.
        on_emergence: What happens when every sparsity has emerged: ``"continue"`` training, ``"stop"`` it, or
            ``"prune"``: turn the denoiser into the one traditional ticket that serves the whole time axis (needs
            exactly one sparsity).
        round_to: Kept widths are multiples of this. For this and the following arguments None means the pruner's, or
            its default without one; :class:`TimestepAwarePruner` describes them.
        target: What sparsity counts: ``"channels"``, ``"params"`` or ``"macs"``.
        scope: How it is shared out among layers: ``"uniform"`` or ``"global"``.
        min_width: Channels (or fraction of the width) that every layer keeps at least.
        heads: ``"equal"`` or ``"whole"``: what attention loses.
        norm: ``"shrink"`` or ``"exact"``: what becomes of group norms (``on_emergence="prune"``).

    Attributes:
        found: The denoiser with its channel plan; None before the first batch and once the denoiser has been replaced.
        figures: Draws the search now and then.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In ``setup`` or during the first batch, if the Trainer, the module or the denoiser
            cannot be pruned.
        NonFiniteWeightsError: At a check, if a parameter of the denoiser is NaN or infinite; or the gradients that
            score it, at five checks in a row. A check where only gradients are is left out, with a warning.

    Example::

        detector = EarlyBirdDetector([0.3, 0.6, 0.8], threshold=0.1)
        trainer = L.Trainer(callbacks=[detector])
        trainer.fit(module)
        print(detector.emerged)
    """

    def __init__(
        self,
        sparsities: Sequence[float],
        *,
        denoiser: str | None = None,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        window: int = 5,
        threshold: float = 0.1,
        criterion: Criterion = "magnitude",
        score_batches: int = 4,
        score_threshold: float = 0.1,
        weights: Literal["auto", "raw", "ema"] = "auto",
        on_emergence: Literal["continue", "stop", "prune"] = "continue",
        round_to: int | None = None,
        target: Target | None = None,
        scope: Scope | None = None,
        min_width: int | float | None = None,
        heads: Heads | None = None,
        norm: Norm | None = None,
    ) -> None:
        super().__init__()
        check_positive(every_n_epochs=every_n_epochs, every_n_train_steps=every_n_train_steps, round_to=round_to)
        check_positive(window=window, score_batches=score_batches)
        check_fraction("threshold", threshold, "a mask distance, a fraction of channels")
        check_fraction("score_threshold", score_threshold, "a fraction of the largest loss")
        check_criterion(criterion)
        check_choice("weights", weights, ("auto", "raw", "ema"))
        check_choice("on_emergence", on_emergence, ("continue", "stop", "prune"))
        self._search = TicketSearch(sparsities, window=window, threshold=threshold)
        if on_emergence == "prune" and len(sparsities) != 1:
            raise ValueError(
                f"on_emergence='prune' with {len(sparsities)} sparsities: one traditional ticket needs exactly one. "
                "Give one sparsity, or a TimestepAwarePruner with a region for each."
            )
        self.sparsities = sparsities
        self.denoiser = denoiser
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.window = window
        self.threshold = threshold
        self.criterion: Criterion = criterion
        self.score_batches = score_batches
        self.score_threshold = score_threshold
        self.weights = weights
        self.on_emergence = on_emergence
        self.round_to = round_to
        self.target = target
        self.scope = scope
        self.min_width = min_width
        self.heads = heads
        self.norm = norm
        check_choice("norm", norm, (None, *get_args(Norm)))
        Allocation(**self._given())  # refuses what is out of range

        self.found: FoundDenoiser | None = None
        self._probe: DenoiserProbe | None = None
        self._last_check_step = -1
        self._finished = False  # the denoiser has been replaced: there is nothing left to search
        self._served: dict[str, Any] = {}  # settings of the pruner that uses the masks
        self._budget: Budget | None = None
        self._served_partition: TimestepPartition | None = None
        self._scorer = self._new_scorer()
        self._warned_of_inertia = False
        self._fitting = True
        self._missed: set[float] = set()  # sparsities that cannot be met, as has been said
        self._unsound = 0  # checks in a row that have failed for their gradients
        self.figures = SearchFigures()
        self._unfollow: Callable[[], None] | None = None
        self._saved_call: dict[str, Any] | None = None  # of a checkpoint

    # --- outcomes

    @property
    def emerged(self) -> dict[SearchKey, int]:
        """Sparsity (or region, see ``criterion``) -> optimizer step at which its ticket emerged."""
        return self._search.emerged

    @property
    def masks(self) -> dict[SearchKey, TicketMask]:
        """Sparsity (or region) -> the newest mask; empty before the first check."""
        return {key: window.newest for key, window in self.windows.items() if window.newest is not None}

    @property
    def distances(self) -> dict[SearchKey, list[MaskCheck]]:
        """Sparsity (or region) -> every check so far, oldest first."""
        return {key: window.checks for key, window in self.windows.items()}

    @property
    def windows(self) -> dict[SearchKey, MaskWindow]:
        """Sparsity (or region) -> the masks behind the checks, for figures."""
        return self._search.windows

    def key(self, wanted: SearchKey) -> SearchKey:
        """Under which sparsity or region the masks for ``wanted`` are kept.

        Args:
            wanted: A region, or a sparsity.

        Raises:
            KeyError: It is not searched for, or several regions have that sparsity.
        """
        return self._search.key(wanted)

    def ticket(self, wanted: SearchKey) -> TicketMask:
        """The mask that emerged.

        Args:
            wanted: A sparsity, or a region.

        Raises:
            KeyError: If it is not searched for, or several regions have that sparsity.
            LookupError: If its ticket has not emerged.
        """
        key = self.key(wanted)
        if key not in self._search.tickets:
            name = describe(key) if isinstance(key, TimestepRegion) else f"sparsity={key}"
            raise LookupError(
                f"{name}: no ticket has emerged in {len(self.windows[key].checks)} checks. Train longer, or raise "
                "threshold."
            )
        return self._search.tickets[key]

    @property
    @override
    def state_key(self) -> str:
        # What is at its default is left out, so that the state of a checkpoint from before it belonged here is found.
        usual = {"criterion": "magnitude", "weights": "raw"}
        odd = {name: value for name, value in self._kind.items() if value != usual[name]}
        sparsities = [float(s) for s in self.sparsities]
        return self._generate_state_key(sparsities=sparsities, denoiser=self.denoiser, **odd)

    # --- hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.on_emergence == "prune":
            self._leave_checkpoints()
            self._unfollow = follow_checkpoints(trainer, pl_module)
        self._fitting = stage == "fit"
        self._saved_call = None
        if not self._fitting:
            return
        check_supported(trainer, pl_module)
        write_whole_checkpoints(trainer)
        if self._scorer.gradients is not None:
            self._scorer.gradients.check(pl_module)
        averaging = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if self.weights == "ema" and not averaging:
            raise MisconfigurationException(
                "weights='ema' needs a WeightAveraging callback in the Trainer. Add EMAWeightAveraging(), or use "
                "weights='raw'."
            )
        if not any(getattr(callback, "detector", None) is self for callback in trainer.callbacks):  # type: ignore[attr-defined]
            self._served, self._served_partition = {}, None  # by the pruner of an earlier fit
        # Asked in any case, because it takes note of the module.
        if begins_anew(trainer, pl_module, self) or (self._finished and find_ensemble(pl_module) is None):
            self._search = self._new_search()
            self._scorer = self._new_scorer()
            self.found, self._finished, self._last_check_step = None, False, -1
            self._warned_of_inertia, self._missed, self._unsound = False, set(), 0

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        # With another criterion there is no state under this key, and the search would silently begin anew. The state
        # of a like detector that is not here any more stands for it, which `load_state_dict` takes or refuses: written
        # before the criterion belonged to the key, or under other settings.
        states: dict[Any, Any] = checkpoint.get("callbacks", {})
        taken = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
        alike = self._generate_state_key(sparsities=[float(s) for s in self.sparsities], denoiser=self.denoiser)
        if self.state_key not in states:
            left = [key for key in states if key not in taken and str(key).startswith(alike.rstrip("}"))]
            if left:
                states[self.state_key] = states[left[0]]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.figures.namespace = self._own_namespace(trainer)
        if self._denoiser is not None:  # not in `setup`, which comes before the module's own and `configure_model`
            check_name(pl_module, self._denoiser)
        check_supported(trainer, pl_module, None if self._finished else self._denoiser)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._finish_if_replaced(pl_module)
        present = find_ensemble(pl_module)
        if present is not None:
            check_trained(trainer, *present)
        self.figures.begin()
        search = ("sparsities", "window", "threshold", "every_n_epochs", "every_n_train_steps")
        own = {name: getattr(self, name) for name in (*search, "score_batches", "score_threshold")} | self._settings
        describe_run(trainer, own, namespace=self.figures.namespace)
        call, self._saved_call = self._saved_call, None
        if call is not None and self.found is None and not self._finished:
            self._find(trainer, pl_module, DenoiserCall.read(self, call, pl_module.device))
        if trainer.ckpt_path is not None and self.on_emergence == "stop" and self._search.done:
            # The checkpoint was written after the check that ended the training, and before the end itself.
            rank_zero_info("EarlyBirdDetector: every ticket has emerged already; training stops.")
            trainer.should_stop = True
        if self.weights == "auto" and averaged_modules(trainer) and not self._finished:
            rank_zero_info(
                "EarlyBirdDetector: masks are drawn from the raw weights; weights='ema' would draw them from the "
                "averaged ones."
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.on_emergence == "prune" and self._search.done and self.found is not None:
            # Not in the hook of the check: validation and checkpoints of that step hold the dense denoiser's scores.
            self._prune(trainer, pl_module, self.found)
        if self.found is None:
            self._finish_if_replaced(pl_module)
        if self.found is None and not self._finished:
            self._stop_probe()  # that of a batch that was skipped
            self._probe = DenoiserProbe(pl_module, self._denoiser)
            self._probe.start()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._find_before_learning(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # Manual optimization may have gone backward without telling.
        self._find_before_learning(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._probe is not None:
            probe = self._probe
            self._stop_probe()
            self._find(trainer, pl_module, probe.resolve())
        # Several optimizers move the step on by more than one: what counts is that a multiple has been passed.
        every = self.every_n_train_steps
        if every is not None and trainer.global_step // every > max(0, self._last_check_step) // every:
            self.check(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_train_steps is None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.check(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._scorer.gradients is not None:
            self._scorer.gradients.tell_total()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.on_emergence == "prune":
            save_structure(pl_module, checkpoint)  # after the fit, the module's own hook is no longer followed

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._stop_probe()  # Lightning does not tear down after an exception
        self._leave_checkpoints()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._stop_probe()
        self._leave_checkpoints()

    # --- the search

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw one mask per sparsity or region from the present weights, and see whether tickets have emerged.

        Once for an optimizer step: with accumulation several batches share one, and the first of them has checked it.
        """
        step = trainer.global_step
        self._finish_if_replaced(pl_module)
        if self.found is None or self._finished or step == self._last_check_step:
            return
        self._last_check_step = step
        masks = self.try_draw(trainer, pl_module)
        if masks is None:
            return
        checks = self._search.push(masks, step)
        if self.weights == "ema" and any(check.distance is not None for check in checks.values()):
            self._warn_of_inertia(trainer)
        metrics = named_metrics(checks)
        if self._scorer.gradients is not None:
            metrics["earlybird/scoring_seconds"] = self._scorer.gradients.last_seconds
        for key, check in checks.items():
            name = short_name(key)
            if check.distance is not None:
                # The same on every rank; synchronised all the same, or Lightning warns that it may not be.
                namespace = self.figures.namespace
                shown = f"distance/{name}" if namespace == "earlybird" else f"{namespace}/distance/{name}"
                pl_module.log(shown, check.distance, prog_bar=True, logger=False, sync_dist=True)
            # Every rank scores the same weights, yet a switch on one rank only would hang the others: they vote.
            converged = trainer.strategy.reduce_boolean_decision(check.converged, all=True)
            if converged and key not in self.emerged:
                self._search.emerge(key, masks[key], step)
                metrics[f"earlybird/emerged/{name}"] = step
                self._announce(key, check)
        self._log(trainer, metrics)
        self.figures.consider(trainer, self.windows, self.threshold)
        if self._search.done and self.on_emergence == "stop":
            rank_zero_info("EarlyBirdDetector: every ticket has emerged; training stops.")
            trainer.should_stop = True

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[SearchKey, TicketMask]:
        """One mask per sparsity or region from the present weights; nothing is recorded.

        A sparsity that the masks miss is warned about, once.

        Raises:
            NonFiniteWeightsError: If a parameter of the denoiser, or a gradient, is NaN or infinite.
            ValueError: If a callable criterion does not give one finite score for each channel.
        """
        assert self.found is not None
        averaged = None
        if self.weights == "ema":
            averaged = unwrap(averaged_modules(trainer)[0].get_submodule(self.found.call.name))
        regions = self._regions
        scores = self._scorer.score(trainer, pl_module, self.found, regions, averaged)
        masks: dict[SearchKey, TicketMask] = {}
        for key in self.windows:
            index = regions.regions.index(key) if isinstance(key, TimestepRegion) and regions is not None else 0
            masks[key] = self.budget.draw(scores[index], sparsity_of(key))
            miss = self.budget.explain_miss(masks[key], sparsity_of(key))
            if miss is not None and sparsity_of(key) not in self._missed:  # once: regions of one sparsity miss it alike
                self._missed.add(sparsity_of(key))
                rank_zero_warn(miss)
        return masks

    def try_draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[SearchKey, TicketMask] | None:
        """:meth:`draw`; or None, with a warning, where only the gradients that score channels are NaN or infinite.

        One bad batch, or one overflow in half precision, is no reason to end a training whose weights are sound.

        Raises:
            NonFiniteWeightsError: If a parameter of the denoiser is NaN or infinite; or gradients, five times in a row.
        """
        try:
            masks = self.draw(trainer, pl_module)
        except NonFiniteGradientsError as error:  # on all ranks alike, as they have added up their gradients
            self._unsound += 1
            if self._unsound >= _MOST_UNSOUND:
                raise
            rank_zero_warn(f"EarlyBirdDetector: there are no masks of step {trainer.global_step}. {error}")
            return None
        self._unsound = 0
        return masks

    @property
    def budget(self) -> Budget:
        """What a sparsity counts in the denoiser that was found; it draws the masks."""
        assert self.found is not None
        if self._budget is None or self._budget.plan is not self.found.plan:
            self._budget = Budget(self.found.plan, self._allocation)
        return self._budget

    def serve(
        self,
        *,
        denoiser: str | None,
        allocation: Allocation,
        norm: Norm,
        partition: TimestepPartition | None = None,
    ) -> None:
        """Take the settings of the pruner that will use the masks.

        Args:
            denoiser: Its name for the denoiser.
            allocation: What its sparsities count, and how they are shared out.
            norm: What becomes of group norms.
            partition: The regions that its tickets will serve.

        Raises:
            MisconfigurationException: If the two were given settings that contradict each other.
        """
        if self.on_emergence != "continue":
            raise MisconfigurationException(
                f"on_emergence={self.on_emergence!r} contradicts the TimestepAwarePruner, which acts on emergence "
                "itself. Leave it at 'continue'."
            )
        settings = {"denoiser": denoiser, "norm": norm, **asdict(allocation)}
        for name, given in settings.items():
            own = getattr(self, name)
            if own is not None and given is not None and own != given:
                raise MisconfigurationException(
                    f"{name}={own!r} of the EarlyBirdDetector contradicts {name}={given!r} of the TimestepAwarePruner. "
                    "Give it to the pruner alone."
                )
        self._served = {"denoiser": denoiser, "allocation": asdict(allocation)}
        self._served_partition = partition
        fresh = self._new_search()
        unsought = [sparsity for sparsity in self.sparsities if sparsity not in map(sparsity_of, fresh.windows)]
        if unsought:
            rank_zero_warn(
                f"sparsities={list(self.sparsities)}: criterion={self.criterion!r} draws masks by region, and no "
                f"region of the TimestepAwarePruner has {unsought}, which will not be searched for. Leave them out, or "
                "give them to an EarlyBirdDetector of their own."
            )
        if not self._search.started and list(fresh.windows) != list(self._search.windows):
            self._search = fresh

    def finish(self) -> None:
        """Stop searching: the denoiser has been replaced."""
        self._stop_probe()
        if self._scorer.gradients is not None:
            self._scorer.gradients.tell_total()
        self._finished = True
        self.found = None

    @property
    def _regions(self) -> TimestepPartition | None:
        """The regions that have masks of their own; None where the regions of one sparsity share one."""
        partition = self._served_partition
        if partition is None or self._scorer.gradients is None or not any(region.sparsity for region in partition):
            return None
        return partition

    def _new_scorer(self) -> ChannelScorer:
        return ChannelScorer(self.criterion, batches=self.score_batches, threshold=self.score_threshold)

    def _new_search(self) -> TicketSearch:
        regions = self._regions.regions if self._regions is not None else ()
        return TicketSearch(self.sparsities, window=self.window, threshold=self.threshold, regions=regions)

    def _given(self) -> dict[str, Any]:
        """The arguments of an allocation that this detector was given itself."""
        names = [field.name for field in fields(Allocation)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def _allocation(self) -> Allocation:
        return Allocation(**{**self._served.get("allocation", {}), **self._given()})

    @property
    def _kind(self) -> dict[str, str]:
        """What scores are taken from, in plain types."""
        criterion = self.criterion if isinstance(self.criterion, str) else "callable"
        return {"criterion": criterion, "weights": "raw" if self.weights == "auto" else self.weights}

    @property
    def _settings(self) -> dict[str, Any]:
        """What masks depend on besides the weights of the denoiser, in plain types."""
        return plain_settings({**self._kind, **asdict(self._allocation)})

    @property
    def _denoiser(self) -> str | None:
        return self.denoiser or self._served.get("denoiser")

    def _find_before_learning(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the denoiser before the first step, so that the initial mask is that of the initial weights."""
        probe = self._probe
        if probe is None:
            return
        if pl_module.automatic_optimization:
            self._stop_probe()
            self._find(trainer, pl_module, probe.resolve())
        elif probe.called and self.found is None:
            # A step by hand may train several networks, of which some have not been called: it is watched to its end.
            probe.stop()
            self._find(trainer, pl_module, probe.resolve())
            probe.start()

    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule, call: DenoiserCall) -> None:
        if self.found is None:
            self.found = FoundDenoiser.trace(pl_module, call)
            check_supported(trainer, pl_module, call.name)
            self._check_steps(call.name)
            if not self._search.started:
                masks = self.draw(trainer, pl_module)
                self.found.check_masks(pl_module, {describe(key): mask for key, mask in masks.items()})
                self._log(trainer, self._search.start(masks, trainer.global_step))
        elif self.found.call.name != call.name:
            raise MisconfigurationException(
                f"denoiser=None: {self.found.call.name!r} was called with samples and one value each before the first "
                f"backward pass, {call.name!r} after it. Say which one is the denoiser, for example "
                f"denoiser={call.name!r}."
            )

    def _check_steps(self, name: str) -> None:
        """Refuse a rounding or a minimum under which no layer at all can lose anything."""
        partition, allocation = self._served_partition, self.budget.allocation
        if self.budget.most > 0 or (partition is not None and not any(region.sparsity for region in partition)):
            return
        widest = max(group.size for group in self.budget.plan.groups)
        raise MisconfigurationException(
            f"denoiser={name!r}: with round_to={allocation.round_to} and min_width={allocation.min_width} no layer can "
            f"lose a channel, as the widest group that can be pruned has {widest}. Use a smaller round_to or min_width."
        )

    def _finish_if_replaced(self, pl_module: pl.LightningModule) -> None:
        """Somebody else may have replaced the denoiser: a pruner with saved tickets, or with another detector."""
        if not self._finished and find_ensemble(pl_module) is not None:
            rank_zero_info("EarlyBirdDetector: the module holds tickets already; there is nothing to search for.")
            self.finish()

    def _own_namespace(self, trainer: pl.Trainer) -> str:
        """What names of metrics begin with, so that another detector's do not run into them."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [each for each in callbacks if isinstance(each, EarlyBirdDetector)]
        others.sort(key=lambda each: each._served_partition is None)  # the one that a pruner uses goes first
        before = [each for each in others[: others.index(self)] if each.windows.keys() & self.windows.keys()]
        if not before:
            return "earlybird"
        name = f"earlybird/{self._kind['criterion']}"
        taken = [each._own_namespace(trainer) for each in before]
        return next(f"{name}{end}" for end in ("", *(f"_{n}" for n in range(2, 99))) if f"{name}{end}" not in taken)

    def _log(self, trainer: pl.Trainer, metrics: Mapping[str, float | None]) -> None:
        begins = self.figures.namespace
        log_metrics(trainer, {name.replace("earlybird", begins, 1): value for name, value in metrics.items()})

    def _stop_probe(self) -> None:
        if self._probe is not None:
            self._probe.stop()
            self._probe = None

    def _leave_checkpoints(self) -> None:
        if self._unfollow is not None:
            self._unfollow()
            self._unfollow = None

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, found: FoundDenoiser) -> None:
        ((key, mask),) = self.masks.items()
        partition = TimestepPartition.whole(sparsity_of(key))
        ensemble = convert(
            trainer,
            pl_module,
            found,
            partition,
            [mask],
            {partition.regions[0]: self.emerged[key]},
            target=self.budget.allocation.target,
            norm=self.norm or "shrink",
        )
        self.finish()
        assert ensemble.record is not None
        rank_zero_info(
            f"EarlyBirdDetector: the denoiser has become a ticket at step {trainer.global_step}.\n"
            f"{ticket_table(ensemble.record.facts)}"
        )
        self.figures.draw(trainer, self.windows, self.threshold)
        report_switch(trainer, ensemble.record, trainer.global_step)

    def _announce(self, key: SearchKey, check: MaskCheck) -> None:
        inertia = ""
        if check.from_start is not None and check.from_start <= self.threshold:
            inertia = " This is still the mask of the initial weights: little has been learned between checks."
        rank_zero_info(
            f"EarlyBirdDetector: the ticket of {describe(key)} emerged at step {check.step}: its mask is at most "
            f"{check.distance:.3f} away from the {self.window - 1} before it ({check.from_start or 0:.3f} from the "
            f"initial one; two random masks: {self.windows[key].null_distance:.3f}).{inertia}"
        )

    def _warn_of_inertia(self, trainer: pl.Trainer) -> None:
        share = initial_share(trainer)
        if share is not None and share > 0.5 and not self._warned_of_inertia:
            self._warned_of_inertia = True
            rank_zero_warn(
                f"weights='ema': the initialisation still makes up {share:.0%} of the averaged weights at step "
                f"{trainer.global_step}, so that masks drawn from them agree whatever is learned. Use weights='raw' or "
                "a smaller decay."
            )

    # --- state

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "format_version": 1,
            "settings": self._settings,
            "search": self._search.state_dict(),
            "last_check_step": self._last_check_step,
            "finished": self._finished,
            # For the denoiser to be known from the first batch of a resumed fit on, which may be that of the switch.
            "call": None if self.found is None else self.found.call.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fitting:
            return  # tests and predictions search for nothing, and no pruner has said by what regions
        with reading_state(self):
            check_state_version(self, state_dict, newest=1)
            check_resumed(self._settings, state_dict.get("settings", {}))  # absent from the first ones of this version
            self._search.load_state_dict(state_dict["search"])
            self._last_check_step = taken(state_dict, "last_check_step", int)
            self._finished = taken(state_dict, "finished", bool)
            self._saved_call = taken({"call": None, **state_dict}, "call", dict, type(None))
