"""Sampling from tickets as from one model, with any diffusers scheduler."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_earlybird.checkpoint_tickets import PathLike, Weights, load_tickets
from lightning_earlybird.ensemble import TicketEnsemble, map_tensors
from lightning_earlybird.hub import find_ensemble, upload_ensemble
from lightning_earlybird.loader_options import check_loading, convert, device_of
from lightning_earlybird.sampling import (
    check_positive,
    denoise,
    describe_unvisited,
    evaluating,
    labels_of,
    owners_of,
    prepared,
)
from lightning_earlybird.stand_in import StandIn
from lightning_earlybird.tickets import load_ensemble, save_ensemble

if TYPE_CHECKING:
    import lightning as L


class TicketEnsembleSampler(StandIn):
    """The trained tickets as one model: samples, saves, loads, and stands in for ``unet`` in diffusers pipelines.

    Args:
        tickets: The extracted networks, one per region, in region order. Not copied.
        partition: The regions of the time axis.
        timesteps: Where the tickets' ``forward`` takes the timesteps.
        offload: Whether to keep only the ticket that is called on the device that the sampler is moved to, and the
            others in the CPU's memory. In a descending schedule each ticket moves there once.
        blend: Whether to blend the outputs of neighbours linearly inside the overlap, in evaluation mode, instead of
            switching at the boundary as the paper does; see :meth:`TimestepPartition.blend`. Steps in there cost two
            calls.

    Raises:
        ValueError: If the number of tickets is not the number of regions, or there is no overlap to blend in.

    Example::

        sampler = TicketEnsembleSampler.from_trainer(trainer)
        images = sampler.sample(64, scheduler=DDIMScheduler(num_train_timesteps=1000), num_inference_steps=100)
        sampler.save_pretrained("ensemble/")
        DDPMPipeline(unet=sampler, scheduler=scheduler).save_pretrained("pipeline/")
    """

    @classmethod
    def from_trainer(cls, trainer: L.Trainer, *, offload: bool = False, blend: bool = False) -> TicketEnsembleSampler:
        """A sampler with copies of the tickets that a Trainer has trained, in evaluation mode.

        The weights are the averaged ones where a ``WeightAveraging`` callback keeps such. The trainer is left alone.

        Args:
            trainer: A Trainer whose fit has turned the denoiser into tickets.
            offload: See the class.
            blend: See the class.

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
        return cls._of(copy.deepcopy(ensembles[0]), offload, blend)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        denoiser: Callable[[], nn.Module] | None = None,
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        offload: bool = False,
        blend: bool = False,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **loading: Any,
    ) -> TicketEnsembleSampler:
        """A sampler from what :meth:`save_pretrained` wrote; see :func:`~.tickets.load_ensemble`.

        Args:
            directory: The ensemble's directory, or the name of a repository on the Hugging Face hub.
            denoiser: Builds the dense network; needed where that is not a diffusers model.
            subfolder: Where the ensemble is inside the directory, such as ``"unet"`` in a pipeline's.
            dtype: Floating dtype to convert the tickets to; None leaves them as they were saved.
            device_map: A device to move the tickets to, also as ``{"": device}``.
            offload: See the class.
            blend: See the class.
            revision: Of the repository; like the rest, it has no effect on a local directory.
            cache_dir: Where downloaded files are kept.
            token: For repositories that are not public.
            force_download: Whether to download again.
            local_files_only: Whether to look into the cache only.
            **loading: What diffusers tells all networks about loading: ``torch_dtype``, its former name of ``dtype``,
                and ``low_cpu_mem_usage`` and the like, which make no difference to an ensemble.

        Raises:
            EnsembleFormatError: If the directory is damaged, truncated, foreign or of a newer format.
            FileNotFoundError: If it is a repository that could not be had.
            TypeError: If there is an argument that neither we nor diffusers know.
            ValueError: If the network is not a diffusers model and ``denoiser`` is None, or if something is asked for
                that ensembles cannot do.
        """
        former_name = loading.pop("torch_dtype", None)
        dtype = former_name if dtype is None else dtype
        check_loading(dtype, loading)
        device = device_of(device_map)
        folder = find_ensemble(
            directory,
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        ensemble = load_ensemble(folder, denoiser)
        if dtype is not None:
            for ticket in ensemble.tickets:
                convert(ticket, dtype)
        sampler = cls._of(ensemble, offload, blend)
        if device is not None:
            sampler.to(device)
        return sampler

    @classmethod
    def from_checkpoint(
        cls,
        path: PathLike | Sequence[PathLike],
        denoiser: Callable[[], nn.Module] | None = None,
        *,
        weights: Weights = "auto",
        offload: bool = False,
        blend: bool = False,
    ) -> TicketEnsembleSampler:
        """A sampler from a Lightning checkpoint that was taken after the switch, without Trainer and module.

        Nothing is unpickled, and of the file only the tickets are read. The random state of the CPU is left as it was.

        Args:
            path: The checkpoint. Where groups of ranks trained different tickets (:class:`MultiTicketStrategy`), a list
                with one of each group; they may be of different steps.
            denoiser: Builds the dense network; needed where that is not a diffusers model.
            weights: ``"ema"`` for those that a ``WeightAveraging`` callback kept, ``"raw"`` for the live ones;
                ``"auto"`` is averaged where there are such, as in :meth:`from_trainer`.
            offload: See the class.
            blend: See the class.

        Raises:
            EnsembleFormatError: If the file is damaged, or of a newer format; the message names the field.
            ValueError: If the checkpoint holds no tickets, a part of them only, or not those weights; if they do not
                fit the network; or if the network is not a diffusers model and ``denoiser`` is None.
        """
        paths = [path] if isinstance(path, str | os.PathLike) else list(path)
        if not paths:
            raise ValueError("path=[] must name at least one checkpoint.")
        return cls._of(load_tickets(paths, denoiser, weights), offload, blend)

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Writes the ensemble as safetensors and JSON, with a model card; see :func:`~.tickets.save_ensemble`.

        Args:
            directory: Where to write; new, empty, or a saved ensemble, which is replaced.
            safe_serialization: True; diffusers asks so whether to avoid pickle.
            variant: None; diffusers' name for files of another precision beside the first ones.

        Raises:
            FileExistsError: If something else is there.
            ValueError: If the sampler was put together by hand and has no ``record``, or for other values of the two.
        """
        if not safe_serialization or variant is not None:
            raise ValueError(
                f"safe_serialization={safe_serialization!r}, variant={variant!r}: an ensemble has one set of files, "
                "which are safetensors; save other precisions in directories of their own, without these arguments."
            )
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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Writes the ensemble, with its model card, to the Hugging Face hub.

        Args:
            repo_id: The repository, ``"user/ensemble"``; made where there is none.
            private: Whether a new one is private; None is the owner's default.
            token: To write with; None takes the one of ``hf auth login``.
            commit_message: Of the commit.
            create_pr: Whether to make a pull request instead.

        Returns:
            Address of the commit.

        Raises:
            ValueError: See :meth:`save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload_ensemble(
                Path(folder),
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
            )

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
        clip: bool = True,
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
            clip: Whether to clip images to [-1, 1] at the end. False for latents, which know no bounds; the scheduler's
                own ``clip_sample`` must be False for them, too.
            progress: Whether to show a progress bar.
            **model_kwargs: Passed to the tickets; tensors with one row per image are split into the same batches.

        Returns:
            Images, shape (num_images, C, H, W), values in [-1, 1] unless ``clip=False``, in the tickets' dtype and on
            their device.

        Raises:
            TypeError: If the scheduler has no ``set_timesteps`` or ``step``, or the tickets return no tensor.
            ValueError: If a number is below 1, there is not one label per image, the shape of a sample is not known, or
                a timestep of the scheduler lies outside the regions.
        """
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        check_positive("num_images", num_images)
        if batch_size is not None:
            check_positive("batch_size", batch_size)
        # All regions are looked up beforehand: a wrong time unit shows at once, and no step waits for the device.
        timesteps = self._checked(scheduler, num_inference_steps)
        owners, weights = (each.tolist() for each in self.partition.blend(timesteps))
        shape = self._sample_shape()
        if class_labels is not None:
            model_kwargs["class_labels"] = labels_of(class_labels, num_images)
        model_kwargs = map_tensors(model_kwargs, lambda tensor: tensor.to(self.device))
        size = batch_size or num_images
        starts = range(0, num_images, size)
        noise_device = self.device if generator is None else generator.device
        images = []
        with evaluating(self), tqdm(total=len(starts) * len(owners), disable=not progress, unit="step") as bar:
            for start in starts:
                stop = min(start + size, num_images)

                def part(tensor: Tensor, start: int = start, stop: int = stop) -> Tensor:
                    return tensor[start:stop] if tensor.dim() > 0 and len(tensor) == num_images else tensor

                kwargs = map_tensors(model_kwargs, part)

                def predict(step: int, sample: Tensor, timestep: Tensor, kwargs: dict[str, Any] = kwargs) -> Tensor:
                    region = self.regions[owners[step]]
                    bar.set_description_str(
                        f"sampling: ticket {owners[step] + 1} of {len(self.tickets)}, region "
                        f"[{region.start:g}, {region.stop:g})",
                        refresh=False,
                    )
                    bar.update()
                    timestep = timestep.to(self.device)
                    prediction = self._predict(owners[step], sample, timestep, kwargs)
                    if not self.blend or weights[step] == 1:
                        return prediction
                    return torch.lerp(
                        self._predict(owners[step] - 1, sample, timestep, kwargs), prediction, weights[step]
                    )

                noise = torch.randn((stop - start, *shape), generator=generator, device=noise_device, dtype=self.dtype)
                # Multistep schedulers remember earlier steps, so that each batch gets one of its own.
                own = prepared(scheduler, num_inference_steps, self.device)
                images.append(denoise(predict, noise.to(self.device), own, generator, clip))
        return torch.cat(images)

    def visits(self, scheduler: Any, num_inference_steps: int = 100) -> tuple[int, ...]:
        """How many steps of a scheduler fall into each region, in the order of ``tickets``.

        Args:
            scheduler: As for :meth:`sample`; it is not changed.
            num_inference_steps: Likewise.

        Raises:
            TypeError: If it is no scheduler.
            ValueError: If the number is below 1, or a timestep lies outside the regions.
        """
        owners = owners_of(self.partition, prepared(scheduler, num_inference_steps))
        return tuple(owners.count(number) for number in range(len(self.tickets)))

    def check_scheduler(self, scheduler: Any, num_inference_steps: int = 100) -> None:
        """Warns of regions that no step of a scheduler falls into, as :meth:`sample` does before it begins.

        Call it for a scheduler that a diffusers pipeline will use: the pipeline shows the sampler one step at a time.

        Args:
            scheduler: As for :meth:`sample`; it is not changed.
            num_inference_steps: Likewise.

        Raises:
            TypeError: If it is no scheduler.
            ValueError: If the number is below 1, or a timestep lies outside the regions.
        """
        self._checked(scheduler, num_inference_steps)

    def _checked(self, scheduler: Any, num_inference_steps: int) -> Tensor:
        """The timesteps of a scheduler, on the host; regions without one are warned about."""
        ready = prepared(scheduler, num_inference_steps)
        owners = owners_of(self.partition, ready)
        visits = [owners.count(number) for number in range(len(self.tickets))]
        if told := describe_unvisited(self.partition, visits, ready):
            warnings.warn(told, stacklevel=3)
        return torch.as_tensor(ready.timesteps).cpu()

    def _predict(self, number: int, sample: Tensor, timestep: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Calls a ticket the way the denoiser is called in training: with one timestep per sample."""
        steps = timestep.expand(len(sample)).view(-1, *[1] * self.timesteps.trailing)
        name, position = self.timesteps.name, self.timesteps.position
        if position in (0, 1):
            output = self._ticket(number)(*((steps, sample) if position == 0 else (sample, steps)), **kwargs)
        elif name is not None:
            output = self._ticket(number)(sample, **{name: steps}, **kwargs)
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
    def _of(cls, ensemble: TicketEnsemble, offload: bool, blend: bool) -> TicketEnsembleSampler:
        sampler = cls(list(ensemble.tickets), ensemble.partition, ensemble.timesteps, offload=offload, blend=blend)
        sampler.record = ensemble.record
        return sampler.eval()


# Diffusers writes the name of this module into model_index.json, and looks the class up there.
TicketEnsembleSampler.__module__ = "lightning_earlybird"
