import random
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_earlybird.evaluation.sources import image_source, to_uint8

BYTES = torch.randint(256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
FLOATS = BYTES.float() / 127.5 - 1


def all_of(source, size=4):
    starts, parts = zip(*source.batches(0, source.count, size), strict=True)
    assert list(starts) == list(range(0, source.count, size))
    return torch.cat(parts)


def test_images_become_bytes_as_files_would_hold_them() -> None:
    assert torch.equal(to_uint8(FLOATS), BYTES)
    assert to_uint8(torch.tensor([-1.5, -1, 0, 1, 1.5])).tolist() == [0, 0, 128, 255, 255]


class Module(pl.LightningDataModule):
    def setup(self, stage):
        assert stage == "fit"
        self.images = TensorDataset(FLOATS, torch.arange(10))

    def train_dataloader(self):
        return DataLoader(self.images, batch_size=2, shuffle=True)


def labelled(samples):
    return {"label": 0, "image": torch.stack([image for image, _ in samples])}


@pytest.mark.parametrize(
    "reference",
    [
        BYTES,
        FLOATS,
        SimpleNamespace(images=BYTES, fingerprint="abc", source="a folder"),
        TensorDataset(FLOATS, torch.arange(10)),
        DataLoader(TensorDataset(FLOATS, torch.arange(10)), batch_size=3, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(FLOATS, torch.arange(10)), batch_size=3, collate_fn=labelled),
        DataLoader(TensorDataset(BYTES), batch_size=3),
        Module(),
    ],
    ids=["uint8", "float", "ImageSet", "Dataset", "DataLoader", "collate", "uint8 loader", "DataModule"],
)
def test_all_images_come_in_order_from_whatever_they_are_in(reference) -> None:
    source = image_source(reference)
    assert source.count == 10
    assert torch.equal(all_of(source), BYTES)
    assert torch.equal(torch.cat([part for _, part in source.batches(3, 8, 4)]), BYTES[3:8])
    assert list(source.batches(5, 5, 4)) == []
    known = "abc" if isinstance(reference, SimpleNamespace) else image_source(BYTES).fingerprint()
    assert source.fingerprint() == known


def test_images_are_read_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_EARLYBIRD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for number, image in enumerate(BYTES):
        Image.fromarray(np.asarray(image.permute(1, 2, 0))).save(tmp_path / "images" / f"{number}.png")
    source = image_source(tmp_path / "images", progress=False)
    assert torch.equal(all_of(source), BYTES)


class Flipped(TensorDataset):
    def __getitem__(self, index):
        image = super().__getitem__(index)[0]
        draw = torch.rand(()) + random.random() + np.random.rand()
        return image.flip(-1) if draw < 1.5 else image


def test_random_augmentation_is_the_same_each_time_and_on_any_share_of_the_images() -> None:
    source = image_source(DataLoader(Flipped(FLOATS), batch_size=4, shuffle=True))
    seen = all_of(source)
    assert torch.equal(torch.cat([images for _, images in source.batches(4, 10, 3)]), seen[4:])
    assert 0 < sum(torch.equal(one, other) for one, other in zip(seen, BYTES, strict=True)) < len(BYTES)
    assert source.fingerprint() == image_source(DataLoader(Flipped(FLOATS), batch_size=2)).fingerprint()


def test_other_images_have_another_fingerprint() -> None:
    assert image_source(BYTES).fingerprint() != image_source(BYTES.flip(0)).fingerprint()
    assert image_source(BYTES).fingerprint() != image_source(BYTES.reshape(10, 3, 4, 16)).fingerprint()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(FLOATS)


def test_what_holds_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="reference is a int, expected images"):
        image_source(5)
    with pytest.raises(ValueError, match="Stream, which cannot be read by index"):
        image_source(DataLoader(Stream()))
    with pytest.raises(ValueError, match="batch_size=None"):
        image_source(DataLoader(TensorDataset(FLOATS), batch_size=None))
    with pytest.raises(ValueError, match=r"torch.int64 of shape \(10, 3, 8, 8\), expected images"):
        image_source(BYTES.long())
    with pytest.raises(ValueError, match=r"of shape \(3, 8, 8\), expected images"):
        image_source(BYTES[0])
    with pytest.raises(ValueError, match=r"has 1 image\(s\); give at least two"):
        image_source(BYTES[:1])
    with pytest.raises(ValueError, match="batches without a tensor of images"):
        all_of(image_source(TensorDataset(torch.zeros(4, 2))))


def test_values_outside_of_minus_one_to_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"values from 0 to 255.*lie in \[-1, 1\]"):
        image_source(BYTES.float())
    with pytest.raises(ValueError, match=r"as images in \[0, 1\] have"):
        image_source(BYTES.float() / 255)
    with pytest.raises(ValueError, match="values from nan to nan"):
        image_source(FLOATS * torch.nan)
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
        all_of(image_source(TensorDataset(BYTES.float())))
