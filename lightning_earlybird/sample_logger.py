"""SampleLogger: what the denoiser of the moment draws, from the same noise each time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_earlybird.arguments import check_positive, reading_state, taken
from lightning_earlybird.class_labels import configured_classes, takes_labels
from lightning_earlybird.conversion import find_ensemble
from lightning_earlybird.current import current_sampler
from lightning_earlybird.pruner import TimestepAwarePruner
from lightning_earlybird.reporting.images import image_sheet, log_image, save_image
from lightning_earlybird.untouched import isolated_rng
from lightning_earlybird.writing import is_rehearsal


class SampleLogger(pl.Callback):
    """Draws samples now and then: from the dense denoiser before the switch, from the tickets after it.

    The weights are the averaged ones where a ``WeightAveraging`` callback keeps such. Every sheet starts from the same
    noise, so that the same place shows the same image in the making. It goes to W&B and TensorBoard as ``samples``, and
    to a PNG file for each step. Only the first rank draws; under :class:`MultiTicketStrategy` the tickets of other
    ranks are missing between the switch and the end, and samples come at the end. The course of the training is left
    alone; drawing that fails is warned about and not tried again.

    Args:
        num_samples: Samples to draw.
        every_n_epochs: Draw at the end of every so many epochs.
        every_n_train_steps: Draw after every so many optimizer steps instead.
        scheduler: A diffusers scheduler; None takes the one that the module has for an attribute.
        num_inference_steps: Sampling steps.
        seed: Of the noise.
        class_labels: For class-conditional denoisers: one label for all samples, or one for each.
        decode: Makes images in [-1, 1], shape (N, C, H, W), of samples, such as latents; called without gradients.
        columns: Images in a row; None makes the sheet as square as possible.
        batch_size: Samples drawn at once; None for all.
        denoiser: Dotted name of the denoiser; None takes the one that the :class:`EarlyBirdDetector` has found.
        dirpath: Where PNG files go; None means ``samples`` in the pruner's directory, or, without a pruner, beside the
            logger's files or in ``default_root_dir``.

    Attributes:
        directory: Where PNG files go; None before the fit.

    Raises:
        ValueError: If a number is not positive, or there is not one label for each sample.
        MisconfigurationException: In ``setup``, if there is no scheduler.

    Example::

        samples = SampleLogger(16, every_n_epochs=10, scheduler=DDIMScheduler(num_train_timesteps=1000))
        L.Trainer(callbacks=[EMAWeightAveraging(), pruner, samples]).fit(module)
    """

    def __init__(
        self,
        num_samples: int = 16,
        *,
        every_n_epochs: int = 10,
        every_n_train_steps: int | None = None,
        scheduler: Any | None = None,
        num_inference_steps: int = 50,
        seed: int = 0,
        class_labels: int | Sequence[int] | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        columns: int | None = None,
        batch_size: int | None = None,
        denoiser: str | None = None,
        dirpath: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_samples=num_samples, every_n_epochs=every_n_epochs, every_n_train_steps=every_n_train_steps)
        check_positive(num_inference_steps=num_inference_steps, columns=columns, batch_size=batch_size)
        if isinstance(class_labels, Sequence) and len(class_labels) != num_samples:
            raise ValueError(
                f"class_labels has {len(class_labels)} entries for num_samples={num_samples}; give one label, or one "
                "for each sample."
            )
        self.num_samples = num_samples
        self.every_n_epochs = every_n_epochs
        self.every_n_train_steps = every_n_train_steps
        self.scheduler = scheduler
        self.num_inference_steps = num_inference_steps
        self.seed = seed
        self.class_labels = class_labels
        self.decode = decode
        self.columns = columns
        self.batch_size = batch_size
        self.denoiser = denoiser
        self.dirpath = dirpath
        self.directory: Path | None = None
        self._last_step = 0
        self._failed = self._waits = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._failed = self._waits = False
        self._last_step = 0
        if self._scheduler(pl_module) is None:
            raise MisconfigurationException(
                f"scheduler=None, and {type(pl_module).__name__} has no attribute that is a diffusers scheduler. Give "
                "the SampleLogger one, such as DDIMScheduler(num_train_timesteps=1000)."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.directory = self._directory(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Several optimizers move the step on by more than one: what counts is that a multiple has been passed.
        every = self.every_n_train_steps
        if every is not None and trainer.global_step // every > self._last_step // every:
            self.draw(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_train_steps is None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.draw(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Here and not at the end of the training, where tickets that were trained apart come together after us.
        if trainer.global_step > self._last_step or self._waits:
            self._waits = False
            self.draw(trainer, pl_module)

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw a sheet now.

        Args:
            trainer: The Trainer of the fit.
            pl_module: Its LightningModule.
        """
        self._last_step = trainer.global_step
        if not trainer.is_global_zero or self._failed or self._waits:
            return
        if getattr(trainer.strategy, "is_split", False):
            self._waits = True
            rank_zero_info("SampleLogger: tickets train on different ranks from here on; samples come at the end.")
            return
        try:
            images, tickets = self._sample(trainer, pl_module)
            sheet = image_sheet(images, self.columns)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            self._failed = True
            rank_zero_warn(f"SampleLogger: no samples can be drawn, and it is not tried again in this fit: {error}")
            return
        what = "dense" if tickets is None else f"{tickets} tickets"
        log_image(trainer, "samples", sheet, caption=f"step {trainer.global_step}, {what}")
        if self.directory is not None and not is_rehearsal(trainer):
            path = self.directory / f"step_{trainer.global_step:07d}.png"
            try:
                save_image(sheet, path)
            except OSError as error:
                rank_zero_warn(f"The samples {str(path)!r} could not be written ({error}). Training goes on.")

    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[Tensor, int | None]:
        """Images, and the number of tickets that drew them; None for the dense denoiser."""
        sampler = current_sampler(trainer, pl_module, denoiser=self.denoiser)
        self._check_labels(sampler.tickets[0])
        # Schedulers may draw without a generator; compiled code would be compiled anew for this batch size.
        with isolated_rng(), torch.compiler.set_stance("force_eager"), torch.no_grad():
            images = sampler.sample(
                self.num_samples,
                scheduler=self._scheduler(pl_module),
                num_inference_steps=self.num_inference_steps,
                generator=torch.Generator().manual_seed(self.seed),
                class_labels=None if self.class_labels is None else torch.as_tensor(self.class_labels),
                batch_size=self.batch_size,
                clip=self.decode is None,
                progress=False,
            )
            if self.decode is not None:
                images = self.decode(images)
        return images, None if find_ensemble(pl_module) is None else len(sampler.tickets)

    def _check_labels(self, denoiser: nn.Module) -> None:
        """Refuses labels that the denoiser has no classes for; on a GPU they would end the process's work there.

        Raises:
            ValueError: If there are such, or labels are missing.
        """
        labelled = takes_labels(denoiser)
        if self.class_labels is None:
            if labelled:
                raise ValueError("class_labels=None: the denoiser is class-conditional. Pass class_labels=.")
            return
        if labelled is False:
            raise ValueError(f"class_labels={self.class_labels}: the denoiser takes no class labels. Leave them out.")
        told = configured_classes(denoiser)
        if told is None:
            return
        name, count = told
        # A DiT has one label more than classes, for none of them.
        last = count if name == "num_embeds_ada_norm" else count - 1
        labels = torch.as_tensor(self.class_labels)
        if int(labels.min()) < 0 or int(labels.max()) > last:
            raise ValueError(f"class_labels={self.class_labels} must lie in 0 to {last} ({name}={count}).")

    def _scheduler(self, module: pl.LightningModule) -> Any | None:
        """The scheduler that was given, or the module's."""
        if self.scheduler is not None:
            return self.scheduler
        own = [value for value in vars(module).values() if hasattr(value, "set_timesteps") and hasattr(value, "step")]
        return own[0] if own else None

    def _directory(self, trainer: pl.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, TimestepAwarePruner) and callback.directory is not None:
                return callback.directory / "samples"
        return Path(trainer.log_dir or trainer.default_root_dir) / "samples"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with reading_state(self):
            self._last_step = taken(state_dict, "last_step", int)
