"""Every form in which image data come is read as exactly the images, labels and names that were written."""

import functools
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import image_files as files
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_earlybird.images import ImageSet, read_images


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ImageSet]:
    return functools.partial(read_images, cache_dir=tmp_path / "cache", progress=False)


def pictures(count: int, *size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(files.pictures(count, *size, seed=seed)).permute(0, 3, 1, 2)


WRITERS = {
    "folder": lambda path, content: files.write_image_folder(path / "data", content),
    "zip": lambda path, content: files.write_zip(path / "data.zip", content),
    "tar": lambda path, content: files.write_tar(path / "data.tar", content),
    "tar.gz": lambda path, content: files.write_tar(path / "data.tar.gz", content),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("around", ["", "./", "data/v1/"])
def test_one_folder_a_class_gives_images_labels_and_names(
    read: Callable[..., ImageSet], tmp_path: Path, write: Callable[..., Path], around: str
) -> None:
    content = {f"{around}{name}": data for name, data in files.folder_files(("cat", "dog"), 3).items()}
    images = read(write(tmp_path, content))
    assert torch.equal(images.images, pictures(6))
    assert images.images.dtype == torch.uint8
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.class_names == ("cat", "dog")
    assert len(images) == 6


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_images_in_one_folder_have_no_labels(
    read: Callable[..., ImageSet], tmp_path: Path, write: Callable[..., Path]
) -> None:
    content = {f"faces/{n}.png": files.encoded(each, "png") for n, each in enumerate(files.pictures(4))}
    images = read(write(tmp_path, content))
    assert torch.equal(images.images, pictures(4))
    assert images.labels is None
    assert images.class_names == ()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("around", ["", "data/"])
@pytest.mark.parametrize(("folder", "split"), [("test", "test"), ("val", "validation"), ("valid", "val")])
def test_folders_named_after_splits_are_told_apart(
    read: Callable[..., ImageSet], tmp_path: Path, write: Callable[..., Path], around: str, folder: str, split: str
) -> None:
    content = {f"{around}train/{name}": data for name, data in files.folder_files(per_class=2).items()}
    content |= {f"{around}{folder}/{name}": data for name, data in files.folder_files(per_class=1, seed=1).items()}
    path = write(tmp_path, content)
    assert torch.equal(read(path).images, pictures(4))
    held_out = read(path, split=split)
    assert torch.equal(held_out.images, pictures(2, seed=1))
    assert held_out.class_names == ("cat", "dog")


def test_archives_named_after_splits_are_told_apart(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    files.write_zip(tmp_path / "data" / "train.zip")
    files.write_zip(tmp_path / "data" / "test.zip", files.folder_files(per_class=1, seed=1))
    assert len(read(tmp_path / "data")) == 6
    assert torch.equal(read(tmp_path / "data", split="test").images, pictures(2, seed=1))
    assert torch.equal(read(tmp_path / "data" / "test.zip", split="test").images, pictures(2, seed=1))


def test_files_that_are_no_images_are_left_out_and_counted(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    content = files.folder_files() | {
        "README.md": b"text",
        "cat/list.txt": b"",
        ".DS_Store": b"\0",
        "cat/._1.jpg": b"\0",
    }
    images = read(files.write_image_folder(tmp_path / "data", content))
    assert len(images) == 6
    assert images.notes == ("2 files are no images and were left out.",)
    assert "2 files are no images" in images.describe()


def test_links_are_followed_and_their_circles_are_not(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    files.write_image_folder(tmp_path / "elsewhere")
    data = tmp_path / "data"
    data.mkdir()
    os.symlink(tmp_path / "elsewhere" / "cat", data / "cat")
    os.symlink(tmp_path / "elsewhere" / "dog", data / "dog")
    os.symlink(data, tmp_path / "elsewhere" / "dog" / "all")
    assert read(data).labels.tolist() == [0, 0, 0, 1, 1, 1]  # type: ignore[union-attr]


CIFAR = {
    "python archive": lambda path: files.write_cifar10_python(path / "cifar-10-python.tar.gz", 4),
    "python archive by another name": lambda path: files.write_cifar10_python(path / "downloaded.tgz", 4),
    "python folder": lambda path: files.write_cifar10_python(path / "cifar-10-batches-py", 4),
    "binary archive": lambda path: files.write_cifar10_binary(path / "cifar-10-binary.tar.gz", 4),
    "binary folder": lambda path: files.write_cifar10_binary(path / "cifar-10-batches-bin", 4),
    "folder around": lambda path: files.write_cifar10_python(path / "data" / "cifar-10-batches-py", 4).parent,
    "folder around the archive": lambda path: (
        files.write_cifar10_binary(path / "d" / "cifar-10-binary.tar.gz", 4).parent
    ),
}


@pytest.mark.parametrize("write", CIFAR.values(), ids=CIFAR)
def test_the_forms_of_cifar10_hold_the_same(
    read: Callable[..., ImageSet], tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    path = write(tmp_path)
    train, test = read(path), read(path, split="test")
    assert torch.equal(train.images, torch.cat([pictures(4, seed=batch) for batch in range(5)]))
    assert torch.equal(test.images, pictures(4, seed=5))
    labels = [int(n) for batch in range(5) for n in np.random.default_rng(batch).permutation(4)]
    assert train.labels is not None
    assert train.labels.tolist() == labels
    assert train.class_names == files.CIFAR10_CLASSES
    assert train.notes == ("20 images, where the original has 50,000.",)


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar100_has_its_fine_labels(read: Callable[..., ImageSet], tmp_path: Path, kind: str) -> None:
    content = files.cifar100_python_files() if kind == "python" else files.cifar100_binary_files()
    for path in (
        files.write_image_folder(tmp_path / "extracted", content),
        files.write_tar(
            tmp_path / f"cifar-100-{kind}.tar.gz", {f"cifar-100-{kind}/{n}": d for n, d in content.items()}
        ),
    ):
        images = read(path, split="test")
        assert torch.equal(images.images, pictures(20, seed=1))
        assert images.labels is not None
        assert images.labels.tolist() == list(range(20))
        assert images.class_names[:2] == ("fine0", "fine1")


def test_cifar_can_be_resized_and_made_grey(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    path = files.write_cifar10_binary(tmp_path / "cifar-10-batches-bin", 4)
    small = read(path, size=8, channels="L").images
    assert small.shape == (20, 1, 8, 8)
    first = Image.fromarray(files.pictures(4)[0]).convert("L").resize((8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(small[0, 0].numpy(), np.asarray(first))


def test_cifar_without_the_names_of_its_classes_has_numbers(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    path = files.write_cifar10_python(tmp_path / "cifar-10-batches-py", 10)
    (path / "batches.meta").unlink()
    assert read(path).class_names == tuple("0123456789")


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("direct", [False, True], ids=["around", "itself"])
def test_celeba_is_cropped_and_divided_as_its_authors_say(
    read: Callable[..., ImageSet], tmp_path: Path, zipped: bool, direct: bool
) -> None:
    root = files.write_celeba(tmp_path / "celeba", 12, zipped=zipped)
    path = root / ("img_align_celeba.zip" if zipped else "img_align_celeba") if direct else root
    counts = {split: len(read(path, size=64, crop="celeba", split=split)) for split in ("train", "valid", "test")}
    assert counts == {"train": 6, "valid": 3, "test": 3}
    images = read(path, size=64, crop="celeba")
    assert images.images.shape == (6, 3, 64, 64)
    assert images.labels is None
    source = Image.open(_first_celeba(root)).crop((25, 57, 153, 185)).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(images.images[0].permute(1, 2, 0).numpy(), np.asarray(source))


def _first_celeba(root: Path) -> Path:
    if (root / "img_align_celeba.zip").exists():
        with zipfile.ZipFile(root / "img_align_celeba.zip") as archive:
            archive.extract("img_align_celeba/000001.jpg", root / "taken_out")
        return root / "taken_out" / "img_align_celeba" / "000001.jpg"
    return root / "img_align_celeba" / "000001.jpg"


def test_celeba_without_the_list_is_one_split_and_says_so(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    images = read(files.write_celeba(tmp_path / "celeba", 4, partition=False), size=64)
    assert len(images) == 4
    assert images.notes == ("No list_eval_partition.txt beside the images: all of them are taken as one split.",)


def test_a_limit_keeps_the_shares_of_the_classes(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    path = files.write_zip(tmp_path / "data.zip", files.folder_files(("a", "b", "c"), 6))
    images = read(path, limit=6)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(images.images, pictures(18)[::3])
    assert len(read(path, limit=100)) == 18


def test_the_first_look_names_counts_shape_values_and_classes(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    images = read(files.write_zip(tmp_path / "data.zip"))
    assert images.describe().splitlines() == [
        f"The zip archive '{tmp_path}/data.zip', split 'train'",
        "6 images, 3 x 32 x 32 (channels x height x width), uint8, 0.0 MiB",
        f"values {images.images.min()} to {images.images.max()}, mean "
        + " ".join(f"{each:.1f}" for each in images.images.float().mean((0, 2, 3)))
        + ", standard deviation "
        + " ".join(f"{each:.1f}" for each in images.images.float().std((0, 2, 3))),
        "label  class  images",
        "-----  -----  ------",
        "    0  cat         3",
        "    1  dog         3",
    ]


def test_many_classes_are_summed_up(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    path = files.write_zip(tmp_path / "data.zip", files.folder_files([f"c{n:02d}" for n in range(21)], 1))
    lines = read(path).describe().splitlines()
    assert lines[3] == "21 classes of 1 to 1 images; the first 10:"
    assert len(lines) == 3 + 1 + 2 + 10


def test_a_folder_is_read_in_any_place(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    """The order does not depend on how the file system lists a folder."""
    names = [f"{n}.png" for n in (10, 9, 1, 2)]
    for name, each in zip(names, files.pictures(4), strict=True):
        files.write_image_folder(tmp_path / "data", {name: files.encoded(each, "png")})
    expected = pictures(4)[[names.index(name) for name in sorted(names)]]
    assert torch.equal(read(tmp_path / "data").images, expected)
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    assert torch.equal(read(tmp_path / "copy").images, expected)
