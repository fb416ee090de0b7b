"""Data for the examples: batches of images from any source, or of latents that were computed before."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_earlybird.images import ImageSet, grid_figure, read_images
from lightning_earlybird.reporting import save_figure

Batch = tuple[Tensor] | tuple[Tensor, Tensor]


class WholeBatches(Dataset[Batch]):
    """Takes a whole batch out of a tensor at once, rather than sample by sample: one core feeds any device so."""

    def __init__(self, samples: Tensor | Pieces, labels: Tensor | None) -> None:
        self.samples = samples
        self.labels = labels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        samples, *labels = self.__getitems__([index])
        return (samples[0], *(each[0] for each in labels))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of some indices; PyTorch's loaders ask for it where there is such a method."""
        chosen = torch.as_tensor(indices)
        samples = self.scaled(self.samples[chosen])
        return (samples,) if self.labels is None else (samples, self.labels[chosen])

    def scaled(self, samples: Tensor) -> Tensor:
        return samples.float()


class Images(WholeBatches):
    """Images from uint8 to floats in [-1, 1]."""

    def scaled(self, samples: Tensor) -> Tensor:
        return samples.float().div_(127.5).sub_(1.0)


class Pieces:
    """Tensors of several files as if they were one, without reading them: shape, length and batches of indices."""

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self.pieces = pieces
        self.ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        self.shape = torch.Size((int(self.ends[-1]), *pieces[0].shape[1:]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor) -> Tensor:
        batch = self.pieces[0].new_empty((len(indices), *self.shape[1:]))
        places = torch.bucketize(indices, self.ends, right=True)
        for place in places.unique().tolist():
            chosen = places == place
            batch[chosen] = self.pieces[place][indices[chosen] - (self.ends[place] - len(self.pieces[place]))]
        return batch


class Latents(WholeBatches):
    """Latents as the autoencoder gave them, scaled to what the denoiser learns."""

    def __init__(
        self, samples: Tensor | Pieces, labels: Tensor | None, scaling_factor: float, shift_factor: float
    ) -> None:
        super().__init__(samples, labels)
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor

    def scaled(self, samples: Tensor) -> Tensor:
        return samples.float().sub_(self.shift_factor).mul_(self.scaling_factor)


def as_it_is(batch: Batch) -> Batch:
    """Collates nothing: a data set of whole batches has done so."""
    return batch


class ImageDataModule(L.LightningDataModule):
    """Batches ``(images,)`` or ``(images, labels)`` of a folder, an archive or a data set of the Hugging Face hub.

    Images are floats in [-1, 1] of shape (N, C, H, W). Random flips are made on the device and in the main process, so
    that a resumed fit draws the same ones. With ``num_workers=0``, which is fast enough, nothing is drawn elsewhere.

    Args:
        path: The source, see :func:`lightning_earlybird.images.read_images`; so are ``size``, ``crop``, ``channels``,
            ``split``, ``limit`` and ``cache_dir``.
        batch_size: Images a batch, on each device; the last, smaller batch of an epoch is left out.
        validation_split: The split of ``val_dataloader``; ``None`` for none.
        flips: Flip each training image horizontally with probability one half.
        labels: Give labels, too; the source must have classes.
        num_workers: Processes that load.
        first_look: A folder for ``data.png``, a grid of the first images; what the data are is then said, too.
    """

    def __init__(
        self,
        path: str,
        *,
        size: int | tuple[int, int] | None = None,
        crop: int | tuple[int, int, int, int] | Literal["celeba"] | None = None,
        channels: Literal["RGB", "L"] = "RGB",
        split: str = "train",
        validation_split: str | None = None,
        batch_size: int = 128,
        flips: bool = True,
        labels: bool = False,
        limit: int | None = None,
        num_workers: int = 0,
        cache_dir: str | None = None,
        first_look: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.reading = {"size": size, "crop": crop, "channels": channels, "limit": limit, "cache_dir": cache_dir}
        self.split = split
        self.validation_split = validation_split
        self.batch_size = batch_size
        self.flips = flips
        self.labels = labels
        self.num_workers = num_workers
        self.first_look = first_look
        self.train: ImageSet | None = None
        self.validation: ImageSet | None = None
        if validation_split is not None:
            # A method of the class would count as validation data, always, and Lightning would ask where they go.
            self.val_dataloader = self._validation_loader

    def read(self, split: str) -> ImageSet:
        """The images of a split, prepared as for training."""
        return read_images(self.path, split=split, **self.reading)

    def prepare_data(self) -> None:
        """Decode where that has not been done, in one process a machine."""
        for split in filter(None, (self.split, self.validation_split)):
            self.read(split)

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        self.train = self.read(self.split)
        if self.validation_split is not None:
            self.validation = self.read(self.validation_split)
        for images in filter(None, (self.train, self.validation)):
            check_batches(len(images), self.batch_size, images.source, self.path)
            if self.labels and images.labels is None:
                raise MisconfigurationException(
                    f"labels=True, but {images.source} has no classes; give a source with one folder a class, or set "
                    "labels=False."
                )
        if self.first_look is not None and rank_zero_only.rank == 0:
            look(self.train, Path(self.first_look) / "data.png")

    @property
    def num_classes(self) -> int | None:
        """Classes of the labels that batches have; None where they have none."""
        return len(self.train.class_names) if self.train is not None and self.labels else None

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.train is not None
        return self._loader(self.train, train=True)

    def _validation_loader(self) -> DataLoader[Batch]:
        assert self.validation is not None
        return self._loader(self.validation, train=False)

    def _loader(self, images: ImageSet, train: bool) -> DataLoader[Batch]:
        dataset = Images(images.images, images.labels if self.labels else None)
        return batch_loader(dataset, self.batch_size, self.num_workers, train)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if not self.flips or self.trainer is None or not self.trainer.training:
            return batch
        images, *labels = batch
        return (random_flips(images), *labels)


class LatentDataModule(L.LightningDataModule):
    """Batches ``(latents,)`` or ``(latents, labels)`` of files that ``encode_latents.py`` wrote.

    Latents are floats of shape (N, C, H, W), scaled: ``(latents - shift_factor) * scaling_factor``, with the factors
    that the files name (0 and 1 where they name none). What is sampled must go back before it is decoded.

    Args:
        path: A ``.safetensors`` file with ``latents`` (N, C, H, W) and, where there are classes, ``labels`` (N,); or a
            folder of such files, which are taken together in the order of their names.
        batch_size: Latents a batch, on each device; the last, smaller batch of an epoch is left out.
        labels: Give labels, too.
        limit: At most so many latents, evenly spaced over the files.
        num_workers: Processes that load.
    """

    def __init__(
        self,
        path: str,
        *,
        batch_size: int = 128,
        labels: bool = False,
        limit: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.path = path
        self.batch_size = batch_size
        self.labels = labels
        self.limit = limit
        self.num_workers = num_workers
        self.train: Latents | None = None
        self.class_names: tuple[str, ...] = ()
        self.autoencoder: tuple[str, str | None] | None = None  # name and subfolder

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        latents, labels, facts = read_latents(Path(self.path))
        if self.limit is not None and self.limit < len(latents):
            chosen = torch.arange(self.limit) * len(latents) // self.limit
            latents, labels = latents[chosen], None if labels is None else labels[chosen]
        if self.labels and labels is None:
            raise MisconfigurationException(
                f"labels=True, but {self.path!r} holds no labels; encode a source with classes, or set labels=False."
            )
        check_batches(len(latents), self.batch_size, f"{self.path!r}", self.path)
        factors = (float(facts.get(name, default)) for name, default in (("scaling_factor", 1), ("shift_factor", 0)))
        self.train = Latents(latents, labels if self.labels else None, *factors)
        self.class_names = tuple(json.loads(facts.get("class_names", "[]")))
        if "autoencoder" in facts:
            self.autoencoder = (facts["autoencoder"], facts.get("autoencoder_subfolder") or None)

    @property
    def num_classes(self) -> int | None:
        """Classes of the labels that batches have; None where they have none."""
        if self.train is None or self.train.labels is None:
            return None
        return max(len(self.class_names), int(self.train.labels.max()) + 1)

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.train is not None
        return batch_loader(self.train, self.batch_size, self.num_workers, train=True)


def random_flips(images: Tensor) -> Tensor:
    """Each image mirrored with probability one half."""
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flipped, images.flip(-1), images)


def batch_loader(dataset: WholeBatches, batch_size: int, num_workers: int, train: bool) -> DataLoader[Batch]:
    """A plain loader, into which Lightning and MultiTicketStrategy can put samplers for several ranks."""
    return DataLoader(
        dataset,
        batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=num_workers,
        collate_fn=as_it_is,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,  # so that a resumed fit starts them as the stopped one did
    )


def check_batches(count: int, batch_size: int, source: str, path: str) -> None:
    if count < batch_size:
        raise MisconfigurationException(
            f"batch_size={batch_size} is larger than the {count} samples of {source}, so that an epoch would have no "
            f"batch; lower batch_size, or look whether {path!r} is complete."
        )


def look(images: ImageSet, file: Path) -> None:
    """Say what the data are, and write a grid of images that are evenly spaced over them."""
    rank_zero_info(images.describe())
    count = min(64, len(images))
    chosen = torch.arange(count) * len(images) // count
    save_figure(grid_figure(images.images[chosen], title=f"{count} of {len(images):,} images"), file)


def read_latents(path: Path) -> tuple[Tensor | Pieces, Tensor | None, dict[str, str]]:
    """Latents (N, C, H, W), mapped into memory and not read; labels (N,); and the facts that the files name."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise MisconfigurationException(
            f"path={str(path)!r}: there are no latents; expected a .safetensors file or a folder of such files, as "
            "examples/encode_latents.py writes them."
        )
    latents: list[Tensor] = []
    labels: list[Tensor] = []
    facts: list[dict[str, str]] = []
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                names = set(opened.keys())
                if "latents" not in names:
                    raise MisconfigurationException(
                        f"{file}: expected a tensor 'latents' of shape (N, C, H, W), found {sorted(names)}; write it "
                        "with examples/encode_latents.py."
                    )
                latents.append(opened.get_tensor("latents"))
                labels += [opened.get_tensor("labels").long()] if "labels" in names else []
                facts.append(opened.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise MisconfigurationException(
                f"{file} cannot be read ({error}): it is damaged or cut off; encode it again with "
                "examples/encode_latents.py."
            ) from error
    for file, each, fact in zip(files, latents, facts, strict=True):
        if each.ndim != 4 or not each.is_floating_point() or each.shape[1:] != latents[0].shape[1:] or fact != facts[0]:
            raise MisconfigurationException(
                f"{file}: its latents are {each.dtype} of shape {tuple(each.shape)} with {fact}; expected floats of "
                f"shape (N, C, H, W) like those of {files[0]}, {tuple(latents[0].shape)} with {facts[0]}. Encode all "
                "with the same autoencoder and settings."
            )
    if labels and [len(each) for each in labels] != [len(each) for each in latents]:
        raise MisconfigurationException(
            f"path={str(path)!r}: not every latent has a label; encode all files from sources with classes, or none."
        )
    return latents[0] if len(files) == 1 else Pieces(latents), torch.cat(labels) if labels else None, facts[0]
