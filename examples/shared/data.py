"""Image data of the examples."""

import io
import zipfile
from pathlib import Path

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class Images(Dataset[Tensor]):
    """Images in memory, uint8 of shape (N, C, H, W), taken batch by batch."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.images[torch.tensor(indices)]


class ImageDataModule(L.LightningDataModule):
    """Images of a zip archive, flipped at random, values in [-1, 1]."""

    channels = 3
    num_classes = None

    def __init__(self, settings: DictConfig, output: Path) -> None:
        super().__init__()
        self.settings = settings
        with zipfile.ZipFile(settings.path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[: settings.limit]
            decoded = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
        self.images = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(
            Images(self.images), self.settings.batch_size, shuffle=True, drop_last=True, collate_fn=self._prepared
        )

    def _prepared(self, images: Tensor) -> tuple[Tensor]:
        values = images.float() / 127.5 - 1
        if self.settings.flips:
            flipped = torch.rand(len(values)) < 0.5
            values[flipped] = values[flipped].flip(-1)
        return (values,)
