"""SampleQuality: FID and KID of what the averaged denoiser, or the ensemble of tickets, samples during a fit."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_earlybird.arguments import check_choice, check_positive, check_state_version, reading_state, taken
from lightning_earlybird.class_labels import configured_classes, takes_labels
from lightning_earlybird.compilation import unwrap
from lightning_earlybird.conversion import find_ensemble
from lightning_earlybird.detector import EarlyBirdDetector
from lightning_earlybird.evaluation.drawing import (
    Decode,
    decoded,
    default_scheduler,
    dense_sampler,
    drawn,
    ensemble_sampler,
    finite_uint8,
    share,
)
from lightning_earlybird.evaluation.features import FeatureExtractor, Features, load_features
from lightning_earlybird.evaluation.reference import reference_statistics
from lightning_earlybird.evaluation.scores import QualityMeter, Scores, caution, metric_suffix
from lightning_earlybird.evaluation.statistics import KID_ROWS, FeatureStatistics
from lightning_earlybird.probe import DenoiserCall, DenoiserProbe, check_name
from lightning_earlybird.pruner import TimestepAwarePruner
from lightning_earlybird.reporting import log_metrics
from lightning_earlybird.resume import begins_anew
from lightning_earlybird.resume.random_states import capture_random_states, restore_random_states
from lightning_earlybird.sampler import TicketEnsembleSampler
from lightning_earlybird.sampling import evaluating, owners_of, prepared
from lightning_earlybird.strategy import MultiTicketStrategy
from lightning_earlybird.writing import is_rehearsal


class SampleQuality(pl.Callback):
    """Draws samples during a fit and says how far they are from the training images: FID and KID.

    What is sampled from is whatever the module holds at that moment, the dense denoiser or the ensemble of tickets,
    with averaged weights where a ``WeightAveraging`` callback has any. Scores are logged as ``fid_10k`` and
    ``kid_10k``, with the number of samples in the name; features that are not Inception's are named, too:
    ``fid_10k_classifier``. They stand in ``trainer.callback_metrics``, where ``ModelCheckpoint(monitor="fid_10k")``
    finds them at the ends of epochs.

    An evaluation does not change the course of the training: random states, modes and metrics of the epoch are as
    before. It samples in the precision of the weights, without autocast. The noise is the same each time, so that
    scores differ by the weights alone.

    On several ranks each draws its share, and the samples are the same whatever the number of ranks. Under
    :class:`MultiTicketStrategy`, ranks hold different tickets between the switch and the end of the fit: evaluations
    that fall into that time are left out, and the last one is made when the tickets have come together.

    Args:
        reference: What samples are compared with: an ``ImageSet``, images (uint8, or floating in [-1, 1]) of shape
            (num_images, C, H, W), a path that :func:`lightning_earlybird.images.read_images` reads, a ``DataLoader``, a
            ``LightningDataModule``, or the path of saved statistics (``.safetensors``). None is the data set of the
            Trainer's training data, in its own order.
        num_samples: Samples drawn; scores of other numbers cannot be compared. Published ones are of 50,000.
        scheduler: A diffusers scheduler to sample with. None is DDIM with quadratic spacing
            (:class:`~lightning_earlybird.SpacedDDIMScheduler`), as in the paper, with the betas and the kind of
            prediction of the module's own diffusers scheduler where it has one.
        num_inference_steps: Steps of the scheduler; the paper takes 100.
        batch_size: Samples drawn at once on each rank.
        every_n_epochs: Evaluate after every so many epochs; None never does.
        every_n_train_steps: Evaluate after every so many optimizer steps; None never does.
        at_end: Whether to evaluate at the end of the fit.
        features: What images are compared by: ``"inception"``, ``"classifier:FILE"``, ``"package.module:Factory"``, a
            network that takes uint8 images (batch_size, C, H, W), or a function that builds one.
        inception_weights: File with Inception's weights, for places without a network.
        kid: Whether to compute KID.
        kid_subsets: Subsets of samples that it is averaged over.
        kid_subset_size: Samples in each; None is 1000, or as many as there are.
        seed: Of the noise.
        class_labels: ``"uniform"`` draws each class equally often, for class-conditional denoisers; None passes no
            labels.
        num_classes: Number of classes; None takes the ``num_class_embeds`` (of a DiT the ``num_embeds_ada_norm``) of
            the denoiser's configuration.
        decode: Makes images (batch_size, C, H, W) in [-1, 1] of what is sampled, where that is latents.
        denoiser: Dotted name of the denoiser in the LightningModule; None takes that of the pruner or the detector, or
            finds it in the first training batch.
        cache_dir: Where statistics of references are kept; None takes ``$LIGHTNING_EARLYBIRD_CACHE/references``, else
            ``~/.cache/lightning-earlybird/references``.
        progress: Whether to show progress bars, where the Trainer shows any.

    Attributes:
        results: One dictionary per evaluation: ``step``, ``epoch``, ``network`` (``"dense"`` or ``"tickets"``),
            ``seconds``, and the scores under their names, with the standard deviation of KID as ``kid_10k_std``.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: Before training, if features or reference cannot be used or the strategy shards
            networks; in the first batch, if samples would not fit the reference, or scheduler, steps or classes do not
            suit the denoiser.

    Example::

        quality = SampleQuality(every_n_epochs=50, num_samples=10_000)
        L.Trainer(callbacks=[EMAWeightAveraging(decay=0.9999), pruner, quality]).fit(module, data)
        print(quality.results[-1]["fid_10k"])
    """

    def __init__(
        self,
        reference: Any = None,
        *,
        num_samples: int = 10_000,
        scheduler: Any = None,
        num_inference_steps: int = 100,
        batch_size: int = 256,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        at_end: bool = True,
        features: Features = "inception",
        inception_weights: str | os.PathLike[str] | None = None,
        kid: bool = True,
        kid_subsets: int = 100,
        kid_subset_size: int | None = None,
        seed: int = 0,
        class_labels: Literal["uniform"] | None = None,
        num_classes: int | None = None,
        decode: Decode | None = None,
        denoiser: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        check_positive(
            num_samples=num_samples,
            num_inference_steps=num_inference_steps,
            batch_size=batch_size,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            kid_subsets=kid_subsets,
            kid_subset_size=kid_subset_size,
            num_classes=num_classes,
        )
        if num_samples < 2:
            raise ValueError(f"num_samples={num_samples} must be at least 2: one sample has no covariance.")
        if kid and kid_subset_size is not None and not 2 <= kid_subset_size <= num_samples:
            raise ValueError(
                f"kid_subset_size={kid_subset_size} must lie between 2 and num_samples={num_samples}. Lower it, draw "
                "more samples, or leave it at None."
            )
        check_choice("class_labels", class_labels, (None, "uniform"))
        if num_classes is not None and class_labels is None:
            raise ValueError(f"num_classes={num_classes} has no effect without class_labels='uniform'. Add that.")
        if every_n_epochs is None and every_n_train_steps is None and not at_end:
            raise ValueError(
                "every_n_epochs=None, every_n_train_steps=None, at_end=False: nothing would ever be evaluated. Set one."
            )
        self.reference = reference
        self.num_samples = num_samples
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps
        self.batch_size = batch_size
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.at_end = at_end
        self.features = features
        self.inception_weights = inception_weights
        self.kid = kid
        self.kid_subsets = kid_subsets
        self.kid_subset_size = kid_subset_size
        self.seed = seed
        self.class_labels = class_labels
        self.num_classes = num_classes
        self.decode = decode
        self.denoiser = denoiser
        self.cache_dir = cache_dir
        self.progress = progress

        self.results: list[dict[str, Any]] = []
        self._extractor: FeatureExtractor | None = None
        self._statistics: FeatureStatistics | None = None
        self._probe: DenoiserProbe | None = None
        self._call: DenoiserCall | None = None
        self._checked = False
        self._told_of_split = False

    @property
    @override
    def state_key(self) -> str:
        # A fit may have one for its course and another, of more samples, for its end.
        names = [str(self.num_samples), str(self.features) if isinstance(self.features, str) else "features"]
        return f"{type(self).__qualname__}[{', '.join(names)}]"

    # --- hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or is_rehearsal(trainer):
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"strategy={type(trainer.strategy).__name__}: SampleQuality samples on every rank by itself, and takes "
                "one device, DDP or MultiTicketStrategy. Evaluate the saved model: "
                "python -m lightning_earlybird.evaluation."
            )
        if self.decode is not None and self.reference is None:
            raise MisconfigurationException(
                "reference=None with decode=: the training data are latents, and samples are compared as images. Give "
                "the images that the latents were made of, reference=IMAGES."
            )
        self._call, self._statistics, self._checked, self._told_of_split = None, None, False, False
        if begins_anew(trainer, pl_module, self):
            self.results = []
        with _undisturbed(trainer):
            try:
                self._extractor = load_features(self.features, self.inception_weights)
            except (ModuleNotFoundError, OSError, ValueError) as error:
                raise MisconfigurationException(f"SampleQuality: {error}") from error

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._extractor is None or is_rehearsal(trainer):
            return
        if self.denoiser is not None:
            check_name(pl_module, self.denoiser)
        # A fit that goes on may hold samplers already that tell what does not fit.
        statistics = self._prepare(trainer)
        warning = caution(self.num_samples, statistics.count, statistics.num_features)
        if warning is not None:
            rank_zero_warn(f"SampleQuality: {warning}")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._extractor is None or self._checked or find_ensemble(pl_module) is not None:
            return
        self._stop_probe()  # that of a batch that was skipped
        self._probe = DenoiserProbe(pl_module, self._name(trainer))
        self._probe.start()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._look(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._probe is None or self._probe.called:  # else the batch was skipped
            self._look(trainer, pl_module)
        step, every = trainer.global_step, self.every_n_train_steps
        if every is not None and step > 0 and step % every == 0:
            self._evaluate(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        every = self.every_n_epochs
        if every is not None and (trainer.current_epoch + 1) % every == 0:
            self._evaluate(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in on_train_end: there the tickets of other ranks are still elsewhere, and nothing may keep the pruner
        # from writing its ensemble.
        if self.at_end:
            self._evaluate(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_probe()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop_probe()

    # --- preparing

    def _name(self, trainer: pl.Trainer) -> str | None:
        """The denoiser's name, from whoever knows."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [each.denoiser for each in callbacks if isinstance(each, TimestepAwarePruner | EarlyBirdDetector)]
        return next((name for name in (self.denoiser, *others) if name is not None), None)

    def _prepare(self, trainer: pl.Trainer) -> FeatureStatistics:
        """The statistics of the reference, measured if need be."""
        if self._statistics is not None:
            return self._statistics
        assert self._extractor is not None
        reference = self.reference
        if reference is None:
            reference = trainer.train_dataloader
        with _undisturbed(trainer):
            device = trainer.strategy.root_device
            try:
                self._statistics = reference_statistics(
                    reference,
                    self._extractor.to(device),
                    device=device,
                    batch_size=self.batch_size,
                    cache_dir=self.cache_dir,
                    progress=self._shows_progress(trainer),
                    rank=trainer.global_rank,
                    world_size=trainer.world_size,
                )
            except (OSError, ValueError) as error:
                raise MisconfigurationException(f"SampleQuality: {error}") from error
            finally:
                self._extractor.to(torch.device("cpu"))
        return self._statistics

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In the first batch: what is the denoiser, and will its samples be such that they can be compared?"""
        if self._extractor is None or self._checked:
            return
        if self._probe is not None:
            probe = self._probe
            self._stop_probe()
            self._call = probe.resolve()
        self._checked = True
        sampler, _ = self._sampler(trainer, pl_module)
        if sampler is None:
            return
        self._count_classes(sampler)
        self._check_scheduler(sampler, pl_module)
        statistics = self._prepare(trainer)
        with _undisturbed(trainer):
            shape = sampler._sample_shape()
            try:
                nothing = torch.zeros(1, *shape, device=sampler.device, dtype=sampler.dtype)
                found = tuple(decoded(nothing, self.decode).shape[1:])
            except (ValueError, RuntimeError) as error:
                raise MisconfigurationException(f"SampleQuality: {error}") from error
        if found != tuple(statistics.image_shape):
            raise MisconfigurationException(
                f"reference: its images have shape {tuple(statistics.image_shape)}, and samples have {found} "
                "(channels, height, width). Give images as the denoiser makes them"
                + (", or decode= where it makes latents." if self.decode is None else ", or another decode=.")
            )

    def _count_classes(self, sampler: TicketEnsembleSampler) -> int | None:
        """How many classes samples are drawn of; None where the denoiser takes no labels."""
        denoiser = sampler.tickets[0]
        labelled = takes_labels(denoiser)
        name, configured = (configured_classes(denoiser) if labelled else None) or ("", None)
        if self.class_labels is None:
            if labelled:
                how = "class_embed_type" if configured is None else f"{name}={configured}"
                raise MisconfigurationException(
                    f"class_labels=None: the denoiser is class-conditional ({how}). Pass "
                    "class_labels='uniform', and num_classes= where not all of them are classes."
                )
            return None
        classes = self.num_classes if self.num_classes is not None else configured
        if classes is None:
            raise MisconfigurationException(
                "class_labels='uniform', num_classes=None: the denoiser's configuration has no num_class_embeds or "
                "num_embeds_ada_norm, which would tell the number of classes. Pass num_classes=."
            )
        if labelled is False:
            raise MisconfigurationException(
                f"class_labels='uniform', num_classes={classes}: the denoiser takes no class labels. Leave both out."
            )
        if configured is not None and classes > configured:
            raise MisconfigurationException(
                f"num_classes={classes} must be at most {configured}, the classes of the denoiser "
                f"({name}={configured}). Lower it, or leave it out."
            )
        return classes

    def _check_scheduler(self, sampler: TicketEnsembleSampler, pl_module: pl.LightningModule) -> None:
        """Sets the steps of a copy of the scheduler, as each evaluation does."""
        scheduler = self.scheduler if self.scheduler is not None else default_scheduler(pl_module)
        try:
            owners_of(sampler.partition, prepared(scheduler, self.num_inference_steps))
        except Exception as error:  # schedulers raise anything
            raise MisconfigurationException(
                f"num_inference_steps={self.num_inference_steps}: SampleQuality cannot sample with the scheduler "
                f"{type(scheduler).__name__} ({error}). Change num_inference_steps= or scheduler=."
            ) from error

    def _sampler(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> tuple[TicketEnsembleSampler | None, Literal["dense", "tickets"]]:
        """What the module holds at this moment, with averaged weights where there are such."""
        module = _averaged(trainer) or pl_module
        found = find_ensemble(module)
        if found is not None:
            return ensemble_sampler(found[1]), "tickets"
        if self._call is None:
            return None, "dense"
        denoiser = unwrap(module.get_submodule(self._call.name))
        return dense_sampler(denoiser, self._call.timesteps, self._call.sample_shape), "dense"

    def _stop_probe(self) -> None:
        if self._probe is not None:
            self._probe.stop()
            self._probe = None

    # --- evaluating

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        done = bool(self.results) and self.results[-1]["step"] == step
        if self._extractor is None or is_rehearsal(trainer) or done:
            return
        strategy = trainer.strategy
        if isinstance(strategy, MultiTicketStrategy) and strategy.is_split:
            if not self._told_of_split:
                self._told_of_split = True
                rank_zero_info(
                    "SampleQuality: ranks train different tickets, and none can sample with all of them. The next "
                    "evaluation comes at the end of the fit."
                )
            return
        sampler, network = self._sampler(trainer, pl_module)
        if sampler is None:
            rank_zero_warn(
                "SampleQuality: no training batch has been seen in this process, so that the denoiser is not known, "
                f"and nothing is evaluated at step {step}."
            )
            return
        statistics = self._prepare(trainer)
        started = time.perf_counter()
        with _undisturbed(trainer):
            scores = self._score(trainer, pl_module, sampler, statistics)
        suffix = metric_suffix(self.num_samples, self._extractor.label)
        metrics: dict[str, float | None] = {f"fid_{suffix}": scores.fid}
        if scores.kid is not None:
            metrics[f"kid_{suffix}"] = scores.kid
        result: dict[str, Any] = {"step": step, "epoch": trainer.current_epoch, "network": network}
        result |= metrics | {"seconds": time.perf_counter() - started}
        if scores.kid_std is not None:
            result[f"kid_{suffix}_std"] = scores.kid_std
        self.results.append(result)
        finite = {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
        log_metrics(trainer, finite)
        for name, value in finite.items():
            trainer.callback_metrics[name] = torch.tensor(value)

    def _score(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        sampler: TicketEnsembleSampler,
        statistics: FeatureStatistics,
    ) -> Scores:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        assert self._extractor is not None
        device, rank, world_size = trainer.strategy.root_device, trainer.global_rank, trainer.world_size
        if sampler.device != device:  # after the fit Lightning has taken the module from its device
            sampler = copy.deepcopy(sampler).to(device)
        extract = self._extractor.to(device)
        most = min(self.num_samples, statistics.count, KID_ROWS)
        meter = QualityMeter(
            statistics if rank == 0 else None,
            statistics.num_features,
            kid_subsets=self.kid_subsets if self.kid else 0,
            kid_subset_size=min(self.kid_subset_size or 1000, most),
            device=device,
        )
        own = share(self.num_samples, self.batch_size, rank, world_size)
        broken = 0
        name = metric_suffix(self.num_samples, extract.label)
        with (
            evaluating(pl_module),
            evaluating(sampler),
            tqdm(
                total=len(own),
                desc=f"samples for fid_{name}",
                unit="image",
                leave=False,
                disable=not (self._shows_progress(trainer) and rank == 0),
            ) as bar,
        ):
            for images in drawn(
                sampler,
                own,
                scheduler=self.scheduler if self.scheduler is not None else default_scheduler(pl_module),
                num_inference_steps=self.num_inference_steps,
                batch_size=self.batch_size,
                seed=self.seed,
                num_classes=self._count_classes(sampler),
                decode=self.decode,
            ):
                whole, missing = finite_uint8(images)
                broken += missing
                if len(whole) > 0:
                    meter.add(extract(whole))
                bar.update(len(images))
                if isinstance(trainer.strategy, MultiTicketStrategy):
                    trainer.strategy.note_progress()
        extract.to(torch.device("cpu"))
        broken = int(trainer.strategy.reduce(torch.tensor(float(broken), device=device), reduce_op="sum"))
        if broken > 0:
            rank_zero_warn(
                f"SampleQuality: {broken} of {self.num_samples} samples at step {trainer.global_step} hold NaN or "
                "infinity, and there is no score of such. The training has diverged, or the scheduler does not fit it "
                "(betas, prediction_type)."
            )
            return Scores(math.nan, math.nan if self.kid else None)
        return meter.compute(self.seed)

    def _shows_progress(self, trainer: pl.Trainer) -> bool:
        return self.progress and trainer.progress_bar_callback is not None

    # --- state

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"format_version": 1, "results": copy.deepcopy(self.results)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with reading_state(self):
            check_state_version(self, state_dict, newest=1)
            results = taken(state_dict, "results", list)
            for result in results:
                taken(result, "step", int)
            self.results = copy.deepcopy(results)


@contextmanager
def _undisturbed(trainer: pl.Trainer) -> Iterator[None]:
    """Whatever is drawn inside, the training goes on with the random numbers that it would have had."""
    states = capture_random_states(trainer)
    try:
        yield
    finally:
        restore_random_states(trainer, {"random": states})


def _averaged(trainer: pl.Trainer) -> nn.Module | None:
    """The averaged copy of the module; None where there is none yet."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel) and int(average.n_averaged) > 0:
            found: nn.Module = average.module
            return found
    return None
