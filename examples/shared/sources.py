"""The data of an example, read before anything else, so that a mistake in it shows at once and in one sentence."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import lightning as L
from omegaconf import DictConfig, OmegaConf

from shared.data import ImageDataModule, LatentDataModule
from shared.outputs import mistakes_told

Data = TypeVar("Data", bound=L.LightningDataModule)


def image_data(settings: DictConfig) -> ImageDataModule:
    """Images as ``DataSettings`` say, of ``path`` or else of the hub."""
    source = settings.path or settings.hub
    if source is None:
        sys.exit(f"{_program()}: data.path=null and data.hub=null: give one of them.")
    crop = OmegaConf.to_container(settings.crop) if OmegaConf.is_config(settings.crop) else settings.crop
    return _set_up(
        lambda: ImageDataModule(
            source,
            size=settings.size,
            crop=tuple(crop) if isinstance(crop, list) else crop,
            channels=settings.channels,
            split=settings.split,
            batch_size=settings.batch_size,
            flips=settings.flips,
            labels=settings.labels,
            limit=settings.limit,
            num_workers=settings.num_workers,
            cache_dir=settings.cache_dir,
        )
    )


def latent_data(settings: DictConfig) -> LatentDataModule:
    """Latents as ``LatentSettings`` say."""
    if settings.path is None:
        sys.exit(f"{_program()}: data.path=null: give the file that examples/encode_latents.py wrote.")
    return _set_up(
        lambda: LatentDataModule(
            settings.path,
            batch_size=settings.batch_size,
            labels=settings.labels,
            limit=settings.limit,
            num_workers=settings.num_workers,
        )
    )


def _set_up(build: Callable[[], Data]) -> Data:
    with mistakes_told():
        data = build()
        data.prepare_data()
        data.setup()
    return data


def _program() -> str:
    return Path(sys.argv[0]).name
