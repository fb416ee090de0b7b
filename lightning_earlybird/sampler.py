"""Sampling from tickets as from one model, with any diffusers scheduler."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_earlybird.checkpoint_tickets import PathLike, Weights, load_tickets
from lightning_earlybird.ensemble import TicketEnsemble, map_tensors
from lightning_earlybird.tickets import load_ensemble, save_ensemble

if TYPE_CHECKING:
    import lightning as L


class TicketEnsembleSampler(TicketEnsemble):
    """The trained tickets as one model: samples, saves, loads, and stands in for ``unet`` in diffusers pipelines.

    Args:
        tickets: The extracted networks, one per region, in region order. Not copied.
        partition: The regions of the time axis.
        timesteps: Where the tickets' ``forward`` takes the timesteps.

    Raises:
        ValueError: If the number of tickets is not the number of regions.

    Example::

        sampler = TicketEnsembleSampler.from_trainer(trainer)
        images = sampler.sample(64, scheduler=DDIMScheduler(num_train_timesteps=1000), num_inference_steps=100)
        sampler.save_pretrained("ensemble/")
    """

    @classmethod
    def from_trainer(cls, trainer: L.Trainer) -> TicketEnsembleSampler:
        """A sampler with copies of the tickets that a Trainer has trained, in evaluation mode.

        The weights are the averaged ones where a ``WeightAveraging`` callback keeps such. The trainer is left alone.

        Args:
            trainer: A Trainer whose fit has turned the denoiser into tickets.

        Raises:
            RuntimeError: If its module holds no ensemble of tickets, several, or one whose other tickets are being
                trained by other ranks.
        """
        from lightning.pytorch.callbacks import WeightAveraging

        module: nn.Module | None = trainer.lightning_module
        if module is None:
            raise RuntimeError("the trainer has no LightningModule yet; call trainer.fit(module) first.")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's callback connector
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                module = callback._average_model.module
        ensembles = [each for each in module.modules() if isinstance(each, TicketEnsemble)]
        if len(ensembles) != 1:
            remedy = (
                "build a TicketEnsembleSampler from the one that you mean"
                if ensembles
                else "the denoiser becomes tickets within the fit, once its masks have settled or max_search_steps is "
                "reached; train longer, or set max_search_steps"
            )
            raise RuntimeError(f"the trainer's module holds {len(ensembles)} ticket ensembles, expected one; {remedy}.")
        if len(ensembles[0].hosted) < len(ensembles[0].tickets):
            raise RuntimeError(
                f"the trainer's module holds the tickets {list(ensembles[0].hosted)} of {len(ensembles[0].tickets)}: "
                "other ranks train the rest. They come together at the end of the fit; sample after it."
            )
        return cls._of(copy.deepcopy(ensembles[0]))

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], denoiser: Callable[[], nn.Module] | None = None
    ) -> TicketEnsembleSampler:
        """A sampler from a directory that :meth:`save_pretrained` wrote; see :func:`~.tickets.load_ensemble`.

        Args:
            directory: The ensemble's directory.
            denoiser: Builds the dense network; needed where that is not a diffusers model.

        Raises:
            EnsembleFormatError: If the directory is damaged, truncated, foreign or of a newer format.
            ValueError: If the network is not a diffusers model and ``denoiser`` is None.
        """
        return cls._of(load_ensemble(directory, denoiser))

    @classmethod
    def from_checkpoint(
        cls,
        path: PathLike | Sequence[PathLike],
        denoiser: Callable[[], nn.Module] | None = None,
        *,
        weights: Weights = "auto",
    ) -> TicketEnsembleSampler:
        """A sampler from a Lightning checkpoint that was taken after the switch, without Trainer and module.

        Nothing is unpickled, and of the file only the tickets are read. The random state of the CPU is left as it was.

        Args:
            path: The checkpoint. Where groups of ranks trained different tickets (:class:`MultiTicketStrategy`), a list
                with one of each group; they may be of different steps.
            denoiser: Builds the dense network; needed where that is not a diffusers model.
            weights: ``"ema"`` for those that a ``WeightAveraging`` callback kept, ``"raw"`` for the live ones;
                ``"auto"`` is averaged where there are such, as in :meth:`from_trainer`.

        Raises:
            EnsembleFormatError: If the file is damaged, or of a newer format; the message names the field.
            ValueError: If the checkpoint holds no tickets, a part of them only, or not those weights; if they do not
                fit the network; or if the network is not a diffusers model and ``denoiser`` is None.
        """
        paths = [path] if isinstance(path, str | os.PathLike) else list(path)
        if not paths:
            raise ValueError("path=[] must name at least one checkpoint.")
        return cls._of(load_tickets(paths, denoiser, weights))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the ensemble as safetensors and JSON; see :func:`~.tickets.save_ensemble`.

        Args:
            directory: Where to write; new, empty, or a saved ensemble, which is replaced.

        Raises:
            FileExistsError: If something else is there.
            ValueError: If the sampler was put together by hand and has no ``record``.
        """
        if self.record is None:
            raise ValueError(
                "record=None: this sampler does not know how its tickets differ from the dense network; get it with "
                "from_trainer or from_pretrained, or set `record` to an EnsembleRecord."
            )
        save_ensemble(
            directory,
            self,
            denoiser=self.record.denoiser,
            edits=self.record.edits,
            masks=self.record.masks,
            facts=self.record.facts,
            sample_shape=self.record.sample_shape,
        )

    @property
    def device(self) -> torch.device:
        """The device of the tickets."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the tickets."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    @torch.no_grad()
    def sample(
        self,
        num_images: int,
        *,
        scheduler: Any,
        num_inference_steps: int = 100,
        generator: torch.Generator | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        **model_kwargs: Any,
    ) -> Tensor:
        """Draws samples; each step calls the one ticket whose region holds the scheduler's timestep.

        Args:
            num_images: How many.
            scheduler: Any diffusers scheduler whose timesteps are in the unit of the regions. It is not changed.
            num_inference_steps: Steps for ``scheduler.set_timesteps``. The paper samples with 100 DDIM steps.
            generator: Source of all noise; the starting noise is drawn on its device.
            class_labels: For class-conditional denoisers: one label for all images, or one per image.
            batch_size: Images sampled at once; None for all. With one generator, other sizes give other images.
            progress: Whether to show a progress bar.
            **model_kwargs: Passed to the tickets; tensors with one row per image are split into the same batches.

        Returns:
            Images, shape (num_images, C, H, W), values in [-1, 1], in the tickets' dtype and on their device.

        Raises:
            TypeError: If the scheduler has no ``set_timesteps`` or ``step``, or the tickets return no tensor.
            ValueError: If a number is below 1, there is not one label per image, the shape of a sample is not known, or
                a timestep of the scheduler lies outside the regions.
        """
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        for name, value in (("num_images", num_images), ("num_inference_steps", num_inference_steps)):
            _check_positive(name, value)
        if batch_size is not None:
            _check_positive("batch_size", batch_size)
        for method in ("set_timesteps", "step"):
            if not hasattr(scheduler, method):
                raise TypeError(
                    f"scheduler is a {type(scheduler).__name__} without {method}(); pass a diffusers scheduler such as "
                    "DDIMScheduler(num_train_timesteps=1000)."
                )
        shape = self._sample_shape()
        if class_labels is not None:
            model_kwargs["class_labels"] = _labels(class_labels, num_images)
        model_kwargs = map_tensors(model_kwargs, lambda tensor: tensor.to(self.device))
        size = batch_size or num_images
        starts = range(0, num_images, size)

        # All regions are looked up beforehand: a wrong time unit shows at once, and no step waits for the device.
        owners = self.partition.lookup(_prepared(scheduler, num_inference_steps).timesteps).tolist()
        images = []
        with evaluating(self), tqdm(total=len(starts) * len(owners), disable=not progress, unit="step") as bar:
            for start in starts:
                stop = min(start + size, num_images)

                def part(tensor: Tensor, start: int = start, stop: int = stop) -> Tensor:
                    return tensor[start:stop] if tensor.dim() > 0 and len(tensor) == num_images else tensor

                # Multistep schedulers remember earlier steps, so that each batch gets one of its own.
                own = _prepared(scheduler, num_inference_steps, self.device)
                kwargs = map_tensors(model_kwargs, part)
                images.append(self._denoise((stop - start, *shape), own, owners, generator, kwargs, bar))
        return torch.cat(images)

    def _denoise(
        self,
        shape: tuple[int, ...],
        scheduler: Any,
        owners: list[int],
        generator: torch.Generator | None,
        kwargs: dict[str, Any],
        bar: Any,
    ) -> Tensor:
        """One batch from noise to images; ``owners`` holds the ticket of each of the scheduler's steps."""
        noise_device = self.device if generator is None else generator.device
        sample = torch.randn(shape, generator=generator, device=noise_device, dtype=self.dtype).to(self.device)
        sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
        step_kwargs = _accepted(scheduler.step, generator=generator)
        for number, timestep in zip(owners, scheduler.timesteps, strict=True):
            region = self.regions[number]
            bar.set_description_str(
                f"sampling: ticket {number + 1} of {len(self.tickets)}, region [{region.start:g}, {region.stop:g})",
                refresh=False,
            )
            scaled = (
                scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
            )
            prediction = self._predict(number, scaled, timestep.to(self.device), kwargs)
            sample = scheduler.step(prediction, timestep, sample, **step_kwargs).prev_sample
            bar.update()
        return sample.clamp(-1, 1)

    def _predict(self, number: int, sample: Tensor, timestep: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Calls a ticket the way the denoiser is called in training: with one timestep per sample."""
        steps = timestep.expand(len(sample)).view(-1, *[1] * self.timesteps.trailing)
        name, position = self.timesteps.name, self.timesteps.position
        if position in (0, 1):
            output = self.tickets[number](*((steps, sample) if position == 0 else (sample, steps)), **kwargs)
        elif name is not None:
            output = self.tickets[number](sample, **{name: steps}, **kwargs)
        else:
            raise ValueError(
                f"timesteps={self.timesteps}: the sampler passes the sample and the timesteps as first arguments; "
                "give the timesteps a name, or wrap the denoiser."
            )
        found = output[0] if isinstance(output, (tuple, list)) and output else getattr(output, "sample", output)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"tickets[{number}] returned a {type(output).__name__}, expected a tensor, a tuple that starts with "
                "one, or an output with a tensor `sample`; wrap the denoiser."
            )
        return found

    def _sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, as recorded in training or else from the network's configuration."""
        if self.record is not None and self.record.sample_shape is not None:
            return self.record.sample_shape
        config = getattr(self, "config", None)
        channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
        if channels is None or size is None:
            raise ValueError(
                "record.sample_shape=None: the shape of a sample is neither recorded nor in the network's "
                "configuration (in_channels, sample_size); set `record` to an EnsembleRecord with a sample_shape."
            )
        return (channels, size, size) if isinstance(size, int) else (channels, *size)

    @classmethod
    def _of(cls, ensemble: TicketEnsemble) -> TicketEnsembleSampler:
        sampler = cls(list(ensemble.tickets), ensemble.partition, ensemble.timesteps)
        sampler.record = ensemble.record
        return sampler.eval()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode; afterwards every sub-module is in the mode that it was in."""
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


def _labels(labels: int | Sequence[int] | Tensor, num_images: int) -> Tensor:
    tensor = torch.as_tensor(labels)
    if tensor.dim() == 0:
        return tensor.expand(num_images)
    if len(tensor) != num_images:
        raise ValueError(
            f"class_labels has {len(tensor)} entries for num_images={num_images}; pass one label, or one per image."
        )
    return tensor


def _prepared(scheduler: Any, num_inference_steps: int, device: torch.device | None = None) -> Any:
    """A copy of the scheduler with its timesteps set."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps, **_accepted(scheduler.set_timesteps, device=device))
    return scheduler


def _accepted(function: Callable[..., Any], **kwargs: Any) -> dict[str, Any]:
    """Those keyword arguments that the function has a parameter for: schedulers differ in what they take."""
    return {name: value for name, value in kwargs.items() if name in inspect.signature(function).parameters}


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
