"""Data that are missing, incomplete, damaged or hostile: an error says what was expected, found, and what to do."""

import functools
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import image_files as files
import numpy as np
import pytest
from PIL import Image

from lightning_earlybird.images import ImageDataError, ImageSet, read_images
from lightning_earlybird.images.archives import LARGEST_MEMBER_BYTES


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ImageSet]:
    return functools.partial(read_images, cache_dir=tmp_path / "cache", progress=False)


def cut(path: Path, share: float = 0.5) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_a_missing_path_names_the_nearest_folder_and_the_forms(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    files.write_zip(tmp_path / "train.zip")
    with pytest.raises(
        ImageDataError, match=r"nearest folder that does is .* \(it holds 'train.zip'\)\. Expected a folder"
    ):
        read(tmp_path / "cifar" / "train.zip")


def test_a_missing_path_below_a_folder_here_is_not_asked_of_the_hub(
    read: Callable[..., ImageSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(ImageDataError, match=r"'data/cifar10' does not exist; .*/data' \(it holds nothing\)"):
        read("data/cifar10")
    with pytest.raises(ImageDataError, match=r"'elsewhere/train\.zip' does not exist"):
        read("elsewhere/train.zip")


def test_an_empty_folder_says_what_was_expected(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("text")
    with pytest.raises(ImageDataError, match=r"holds no images \(1 other files\); expected files that end with \.jpg"):
        read(tmp_path / "data")


def test_images_beside_class_folders_are_refused(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    content = files.folder_files() | {"stray.png": files.encoded(files.pictures(1)[0], "png")}
    with pytest.raises(ImageDataError, match=r"holds 1 images beside its folders 'cat', 'dog'; expected one folder a"):
        read(files.write_image_folder(tmp_path / "data", content))


@pytest.mark.parametrize("kind", ["data.zip", "data.tar.gz"])
def test_a_split_that_is_not_there_is_refused(read: Callable[..., ImageSet], tmp_path: Path, kind: str) -> None:
    write = files.write_zip if kind.endswith("zip") else files.write_tar
    path = write(tmp_path / kind, files.folder_files())
    with pytest.raises(ImageDataError, match=r"split='test': .* is not divided into splits; give the path of the test"):
        read(path, split="test")
    path = write(tmp_path / kind, {f"train/{name}": data for name, data in files.folder_files().items()})
    with pytest.raises(ImageDataError, match=r"split='test': .* has no such part, only 'train'"):
        read(path, split="test")


def test_splits_that_other_sources_do_not_have_are_refused(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    files.write_zip(tmp_path / "zips" / "train.zip")
    with pytest.raises(ImageDataError, match=r"split='test': the folder .* has no archive of it, only 'train\.zip'"):
        read(tmp_path / "zips", split="test")
    with pytest.raises(
        ImageDataError, match=r"split='validation': the python version of CIFAR-10 .* 'train' and 'test'"
    ):
        read(files.write_cifar10_python(tmp_path / "cifar-10-batches-py", 2), split="valid")
    celeba = files.write_celeba(tmp_path / "celeba", 2)
    with pytest.raises(ImageDataError, match=r"split='test': the list of splits .* none of its 2 images there; it has"):
        read(celeba, split="test")


def test_a_damaged_list_of_splits_is_refused_by_its_line(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    celeba = files.write_celeba(tmp_path / "celeba", 2)
    (celeba / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 7\n")
    with pytest.raises(ImageDataError, match=r"list_eval_partition\.txt, line 2: expected a file name and 0 \(train\)"):
        read(celeba)


IMPOSTORS = {
    "empty": (b"", "it is empty: download or copy it again"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 170498071\n",
        "it is a Git LFS pointer, not the file itself: run `git lfs pull`",
    ),
    "web page": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "it is a web page, not the file itself"),
    "zeros": (bytes(4096), "it begins with zeros only, as half a download does"),
}


@pytest.mark.parametrize("name", ["train.zip", "cifar-10-python.tar.gz", "data"])
@pytest.mark.parametrize(("content", "message"), IMPOSTORS.values(), ids=IMPOSTORS)
def test_what_is_there_instead_of_the_data_is_named(
    read: Callable[..., ImageSet], tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageDataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(("content", "message"), IMPOSTORS.values(), ids=IMPOSTORS)
def test_what_is_there_instead_of_an_image_is_named(
    read: Callable[..., ImageSet], tmp_path: Path, content: bytes, message: str
) -> None:
    folder = files.write_image_folder(tmp_path / "data", files.folder_files() | {"cat/0002.png": content})
    with pytest.raises(
        ImageDataError, match=rf"data/cat/0002\.png \({len(content):,} bytes\) cannot be decoded: {message}"
    ):
        read(folder)


def test_other_files_are_refused(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(
        ImageDataError, match=r"notes\.txt' is none of the forms that are understood\. Expected a folder"
    ):
        read(tmp_path / "notes.txt")
    (tmp_path / "one.png").write_bytes(files.encoded(files.pictures(1)[0], "png"))
    with pytest.raises(ImageDataError, match=r"one\.png' is a single image; give the folder that holds the images"):
        read(tmp_path / "one.png")


def test_half_a_zip_archive_is_refused(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    path = cut(files.write_zip(tmp_path / "data.zip"))
    with pytest.raises(
        ImageDataError, match=r"is no whole zip archive \([\d,]+ bytes\): its list of files, .* is missing"
    ):
        read(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("name", ["data.tar.gz", "data.tar", "data.tar.xz"])
def test_half_a_tar_archive_is_refused(read: Callable[..., ImageSet], tmp_path: Path, name: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    content = {f"{n % 2}/{n}.png": files.encoded(each, "png") for n, each in enumerate(noise)}
    path = cut(files.write_tar(tmp_path / name, content), share)
    with pytest.raises(
        ImageDataError, match=r"is no whole tar archive .* as in half a download: download or copy it again"
    ):
        read(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["python", "binary"])
def test_half_an_original_archive_is_refused_with_its_checksum(
    read: Callable[..., ImageSet], tmp_path: Path, kind: str, share: float
) -> None:
    write = files.write_cifar10_python if kind == "python" else files.write_cifar10_binary
    path = cut(write(tmp_path / f"cifar-10-{kind}.tar.gz", 4), share)
    with pytest.raises(
        ImageDataError, match=r"MD5 is [0-9a-f]{32}, that of the original is c[0-9a-f]{31}: download cifar"
    ):
        read(path)


def test_an_original_archive_that_lacks_a_batch_is_refused(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    path = files.write_cifar10_python(tmp_path / "cifar-10-batches-py", 2)
    (path / "data_batch_3").unlink()
    with pytest.raises(
        ImageDataError, match=r"lacks data_batch_3 \(expected data_batch_1, .*extract cifar-10-python\.tar"
    ):
        read(path)


def test_half_a_batch_is_refused(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    cut(files.write_cifar10_python(tmp_path / "cifar-10-batches-py", 2) / "data_batch_2")
    with pytest.raises(
        ImageDataError, match=r"data_batch_2 is damaged or cut off \(.*: download or copy the archive again"
    ):
        read(tmp_path / "cifar-10-batches-py")
    cut(files.write_cifar10_binary(tmp_path / "cifar-10-batches-bin", 3) / "data_batch_2.bin")
    with pytest.raises(
        ImageDataError, match=r"data_batch_2\.bin: its 4,609 bytes are no whole number of records of 3073"
    ):
        read(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").write_bytes(b"\xff" * 3073)
    with pytest.raises(ImageDataError, match=r"data_batch_2\.bin: expected labels from 0 to 99, found 255"):
        read(tmp_path / "cifar-10-batches-bin")
    for path in (tmp_path / "cifar-10-batches-bin").glob("data_batch_*"):
        path.write_bytes(b"")
    with pytest.raises(ImageDataError, match="holds no images in split 'train': extract"):
        read(tmp_path / "cifar-10-batches-bin")


BATCHES = {
    "no data": ({"labels": [0]}, r"expected under 'data' an array of shape \(N, 3072\), found NoneType"),
    "other shape": ({"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]}, r"shape \(N, 3072\), found \(2, 5\)"),
    "few labels": ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "as many whole numbers as images \\(2\\)"),
    "large labels": ({"data": np.zeros((1, 3072), np.uint8), "labels": [999]}, "from 0 to 99, found 999 to 999"),
    "no dictionary": ([1, 2], "holds no batch of CIFAR but one list"),
    "pointer": (IMPOSTORS["pointer"][0], "data_batch_1: it is a Git LFS pointer"),
}


@pytest.mark.parametrize(("content", "message"), BATCHES.values(), ids=BATCHES)
def test_a_batch_that_is_none_is_refused(
    read: Callable[..., ImageSet], tmp_path: Path, content: object, message: str
) -> None:
    path = files.write_cifar10_python(tmp_path / "cifar-10-batches-py", 2)
    data = content if isinstance(content, bytes) else files.python2_batch(content)  # type: ignore[arg-type]
    (path / "data_batch_1").write_bytes(data)
    with pytest.raises(ImageDataError, match=message):
        read(path)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_batch_that_would_run_code_is_refused_and_does_not(
    read: Callable[..., ImageSet], tmp_path: Path, protocol: int
) -> None:
    path = files.write_cifar10_python(tmp_path / "cifar-10-batches-py", 2)
    attack = pickle.dumps({"data": Hostile(tmp_path / "ran"), "labels": [0]}, protocol=protocol)
    (path / "data_batch_1").write_bytes(attack)
    with pytest.raises(
        ImageDataError, match=r"data_batch_1: its pickle refers to .*; it was not loaded, as it could run"
    ):
        read(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(attack)
    assert (tmp_path / "ran").exists()  # which the attack does where it is let


def test_images_of_several_sizes_need_a_size(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    content = files.folder_files() | {"dog/0009.png": files.encoded(files.pictures(1, 40, 36)[0], "png")}
    path = files.write_image_folder(tmp_path / "data", content)
    with pytest.raises(
        ImageDataError, match=r"dog/0009\.png is 36 x 40 pixels large \(width x height\), and .* 32 x 32: give"
    ):
        read(path)
    assert read(path, size=16).images.shape == (7, 3, 16, 16)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp"])
def test_half_an_image_is_refused_by_name(read: Callable[..., ImageSet], tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    folder = files.write_image_folder(tmp_path / "data", {f"cat.{kind}": files.encoded(noise, kind)})
    for share in (0.1, 0.5, 0.9):
        cut(folder / f"cat.{kind}", share)
        with pytest.raises(
            ImageDataError, match=rf"data/cat\.{kind} \([\d,]+ bytes\) cannot be decoded: it is damaged or cut"
        ):
            read(folder)


def test_images_with_flipped_bytes_decode_or_are_refused(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    """Whatever Pillow raises for them, it is ours."""
    draws = np.random.default_rng(0)
    refused = 0
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "ppm", "webp"):
        whole = np.frombuffer(files.encoded(files.pictures(1)[0], kind), np.uint8)
        for number in range(12):
            data = whole.copy()
            places = draws.integers(0, min(len(data), 400), 6)
            data[places] = draws.integers(0, 256, len(places))
            folder = files.write_image_folder(tmp_path / f"{kind}{number}", {f"cat.{kind}": data.tobytes()})
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # Pillow's own
                    read(folder, size=8)
            except ImageDataError:
                refused += 1
    assert refused > 20


def test_an_archive_damaged_in_the_middle_is_refused_by_the_files_name(
    read: Callable[..., ImageSet], tmp_path: Path
) -> None:
    path = files.write_zip(tmp_path / "data.zip")
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT", data.index(b"dog/0001.png"))
    data[place + 6] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(
        ImageDataError, match=r"data\.zip: dog/0001\.png cannot be read out of the archive \(Bad CRC-32"
    ):
        read(path)


@pytest.mark.parametrize("write", [files.write_zip, files.write_tar])
def test_a_path_in_an_archive_leads_nowhere(tmp_path: Path, write: Callable[..., Path]) -> None:
    image = files.encoded(files.pictures(1)[0], "png")
    path = write(tmp_path / "in" / "data", {"a/1.png": image, "/b/2.png": image, "../../c/3.png": image})
    before = {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*")}
    assert read_images(path, cache_dir=tmp_path / "in" / "cache", progress=False).class_names == ("a", "b")
    after = {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*")}
    assert {each.relative_to(tmp_path / "in").parts[0] for each in after.keys() - before.keys()} == {"cache"}


def test_a_file_in_an_archive_that_would_fill_the_memory_is_refused(
    read: Callable[..., ImageSet], tmp_path: Path
) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("bomb.png", "w") as file:
        block = bytes(1 << 24)
        for _ in range((LARGEST_MEMBER_BYTES >> 24) + 1):
            file.write(block)
    with pytest.raises(ImageDataError, match=r"bomb\.png would be 285,212,672 bytes large, more than any image"):
        read(path)


def test_an_image_that_would_fill_the_memory_is_refused(read: Callable[..., ImageSet], tmp_path: Path) -> None:
    data = bytearray(files.encoded(files.pictures(1)[0], "bmp"))
    for side in (10_000, 60_000):  # Pillow warns of the one and refuses the other
        data[18:26] = struct.pack("<ii", side, side)
        folder = files.write_image_folder(tmp_path / f"data{side}", {"bomb.bmp": bytes(data)})
        with pytest.raises(ImageDataError, match=r"bomb\.bmp would be too large once decoded .*MAX_IMAGE_PIXELS"):
            read(folder)


@pytest.mark.parametrize("kind", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(read: Callable[..., ImageSet], tmp_path: Path, kind: str) -> None:
    (tmp_path / "data").mkdir()
    Image.new(kind, (8, 8)).save(tmp_path / "data" / "deep.tiff")
    with pytest.raises(ImageDataError, match=rf"deep\.tiff has more than 8 bits a pixel \(Pillow's mode '{kind}'\)"):
        read(tmp_path / "data")


def test_no_network_says_what_else_can_be_given(
    read: Callable[..., ImageSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    with pytest.raises(
        ImageDataError, match=r"'uoft-cs/cifar10' of the Hugging Face hub cannot be loaded .* no file or"
    ) as e:
        read("uoft-cs/cifar10")
    assert "hf download uoft-cs/cifar10 --repo-type dataset --local-dir FOLDER" in str(e.value)
    assert "HF_HUB_OFFLINE=1" in str(e.value)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    files.write_zip(tmp_path / "data.zip")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ImageDataError, match=r"cache_dir='.*/file/cache': .* set the environment variable LIGHTNING_EARLY"
    ):
        read_images(tmp_path / "data.zip", cache_dir=tmp_path / "file" / "cache")


def test_a_full_disk_is_told_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    files.write_zip(tmp_path / "data.zip")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        ImageDataError, match=r"cannot be kept there \(0 MiB are needed and 0 MiB free\); give a cache_dir"
    ):
        read_images(tmp_path / "data.zip", cache_dir=tmp_path / "cache", progress=False)
    monkeypatch.undo()
    assert len(read_images(tmp_path / "data.zip", cache_dir=tmp_path / "cache", progress=False)) == 6


BAD = {
    "size": ({"size": 0}, "size=\\(0, 0\\) must be a number of pixels, at least 1, or two"),
    "sizes": ({"size": (8, 8, 3)}, "size=\\(8, 8, 3\\) must be"),
    "crop": ({"crop": "center"}, "crop='center' must be the side of a centred square in pixels"),
    "box": ({"crop": (8, 0, 4, 8)}, "crop=\\(8, 0, 4, 8\\) must be"),
    "channels": ({"channels": "RGBA"}, "channels='RGBA' must be 'RGB' or 'L'"),
    "limit": ({"limit": 0}, "limit=0 must be a number of images, at least 1, or None for all"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_arguments_that_mean_nothing_are_refused(
    read: Callable[..., ImageSet], tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(files.write_zip(tmp_path / "data.zip"), **arguments)
