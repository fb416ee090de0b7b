"""Data sets that the library `datasets` loads, from folders in the format of the hub."""

import functools
from collections.abc import Callable
from pathlib import Path

import datasets
import image_files as files
import pytest
import torch

from lightning_earlybird.images import ImageDataError, ImageSet, read_images


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ImageSet]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    return functools.partial(read_images, cache_dir=tmp_path / "cache", progress=False)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(files.pictures(count, seed=seed)).permute(0, 3, 1, 2)


def test_parquet_files_hold_images_and_classes(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    folder = files.write_parquet(tmp_path / "data")
    images, again, held_out = read(folder), read(folder), read(folder, split="test")
    assert torch.equal(images.images, pictures(12))
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1] * 6
    assert images.class_names == ("cat", "dog")
    assert again.fingerprint == images.fingerprint != held_out.fingerprint
    assert torch.equal(held_out.images, pictures(12, seed=1))
    with pytest.raises(
        ImageDataError, match=r"split='validation': the data set in .* has no such split, only 'test', 'tr"
    ):
        read(folder, split="val")
    assert torch.equal(read(folder / "train-00000-of-00001.parquet").images, pictures(12))


def test_a_data_set_saved_to_disk_is_read(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    loaded = datasets.load_dataset(str(files.write_parquet(tmp_path / "data")))
    loaded.save_to_disk(tmp_path / "saved")
    assert torch.equal(read(tmp_path / "saved", split="test").images, pictures(12, seed=1))
    loaded["train"].save_to_disk(tmp_path / "one")
    assert torch.equal(read(tmp_path / "one", limit=4).images, pictures(12)[::3])


def test_of_several_columns_of_classes_the_finest_is_taken(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    names = {"coarse": datasets.ClassLabel(names=["x", "y"]), "fine": datasets.ClassLabel(names=["a", "b", "c"])}
    features = datasets.Features({"photo": datasets.Image(), **names})
    rows = [{"bytes": files.encoded(each, "png"), "path": None} for each in files.pictures(3)]
    data = datasets.Dataset.from_dict({"photo": rows, "coarse": [0, 0, 1], "fine": [0, 1, 2]}, features=features)
    data.save_to_disk(tmp_path / "saved")
    images = read(tmp_path / "saved")
    assert images.class_names == ("a", "b", "c")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2]


def test_images_without_classes_have_no_labels(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    rows = [{"bytes": files.encoded(each, "png"), "path": None} for each in files.pictures(3)]
    datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()})).save_to_disk(
        tmp_path / "saved"
    )
    assert read(tmp_path / "saved").labels is None


def test_a_split_whose_classes_are_not_known_has_no_labels(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    row = {"bytes": files.encoded(files.pictures(1)[0], "png"), "path": None}
    data = datasets.Dataset.from_dict({"image": [row, row], "label": [-1, None]}, features=features)
    data.save_to_disk(tmp_path / "unknown")
    images = read(tmp_path / "unknown")
    assert images.labels is None
    assert images.class_names == ()


def test_data_sets_that_hold_no_usable_images_are_refused(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(ImageDataError, match=r"the data set in .*text' has no column of images, only 'text'"):
        read(tmp_path / "text")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    row = {"bytes": files.encoded(files.pictures(1)[0], "png"), "path": None}
    datasets.Dataset.from_dict({"image": [row, None], "label": [0, 0]}, features=features).save_to_disk(
        tmp_path / "gap"
    )
    with pytest.raises(ImageDataError, match=r"gap.*row 1 has no image; remove it"):
        read(tmp_path / "gap")
    datasets.Dataset.from_dict({"image": [row, row], "label": [0, -1]}, features=features).save_to_disk(
        tmp_path / "part"
    )
    with pytest.raises(ImageDataError, match="column 'label' has labels from -1 to 0, outside of its 1 classes"):
        read(tmp_path / "part")
    (tmp_path / "none").mkdir()
    datasets.Dataset.from_dict({"image": [], "label": []}, features=features).to_parquet(
        tmp_path / "none" / "a.parquet"
    )
    with pytest.raises(ImageDataError, match=r"none' cannot be loaded \(.*no data"):
        read(tmp_path / "none")
    folder = files.write_parquet(tmp_path / "cut")
    file = folder / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ImageDataError, match=r"the data set in .*cut' cannot be loaded \(.*\); copy it again"):
        read(folder)
