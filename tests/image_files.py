"""Small data in the formats in which image data sets are published, written as their authors wrote them."""

import io
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def pictures(count: int, height: int = 32, width: int = 32, *, seed: int = 0) -> NDArray[np.uint8]:
    """Soft shapes of random colours, shape (count, height, width, 3), uint8: JPEG keeps them nearly as they are."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][..., None]
    slopes, offsets = draws.uniform(-1, 1, (2, count, 1, 1, 3)), draws.uniform(0.3, 0.7, (count, 1, 1, 3))
    values = offsets + 0.3 * (slopes[0] * (x - 0.5) + slopes[1] * (y - 0.5))
    return (values * 255).round().clip(0, 255).astype(np.uint8)


def encoded(pixels: NDArray[np.uint8], kind: str = "jpeg") -> bytes:
    """An image file of pixels of shape (height, width) or (height, width, channels)."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 95} if kind == "jpeg" else {}))
    return file.getvalue()


def folder_files(
    classes: Sequence[str] = ("cat", "dog"), per_class: int = 3, *, side: int = 32, kind: str = "png", seed: int = 0
) -> dict[str, bytes]:
    """Relative path -> content, one folder a class."""
    images = iter(pictures(len(classes) * per_class, side, side, seed=seed))
    suffix = "jpg" if kind == "jpeg" else kind
    names = [f"{name}/{n:04d}.{suffix}" for name in classes for n in range(1, per_class + 1)]
    return {name: encoded(next(images), kind) for name in names}


def write_image_folder(path: Path, files: dict[str, bytes] | None = None) -> Path:
    """A folder of image files; of two classes if not told otherwise."""
    for name, content in (folder_files() if files is None else files).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_zip(path: Path, files: dict[str, bytes] | None = None) -> Path:
    """A zip archive of folders, with entries for the folders themselves, as most programs write it."""
    files = folder_files() if files is None else files
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for folder in sorted({name.rpartition("/")[0] + "/" for name in files if "/" in name}):
            archive.writestr(folder, b"")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes] | None = None) -> Path:
    """A tar archive, compressed as its name says."""
    kind = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz"}.get(path.suffix, "w")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, kind) as archive:
        for name, content in (folder_files() if files is None else files).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def cifar10_python_files(per_batch: int = 20, *, seed: int = 0) -> dict[str, bytes]:
    """The files of ``cifar-10-batches-py``: pickles as Python 2 wrote them."""
    files = {}
    for index, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        images, labels = _cifar10_batch(per_batch, seed * 100 + index)
        rows = images.transpose(0, 3, 1, 2).reshape(per_batch, 3072)
        names = [f"{CIFAR10_CLASSES[label]}_s_{n:06d}.png" for n, label in enumerate(labels)]
        files[name] = python2_batch({"batch_label": name, "labels": labels, "data": rows, "filenames": names})
    meta = {"num_cases_per_batch": per_batch, "label_names": list(CIFAR10_CLASSES), "num_vis": 3072}
    return {**files, "batches.meta": python2_batch(meta)}


def cifar10_binary_files(per_batch: int = 20, *, seed: int = 0) -> dict[str, bytes]:
    """The files of ``cifar-10-batches-bin``; the same images as those of the python version."""
    files = {}
    for index, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        images, labels = _cifar10_batch(per_batch, seed * 100 + index)
        rows = images.transpose(0, 3, 1, 2).reshape(per_batch, 3072)
        files[name] = np.concatenate([np.array(labels, np.uint8)[:, None], rows], axis=1).tobytes()
    return {**files, "batches.meta.txt": ("\n".join(CIFAR10_CLASSES) + "\n\n").encode()}


def cifar100_python_files(count: int = 20) -> dict[str, bytes]:
    """The files of ``cifar-100-python``."""
    files = {}
    for index, name in enumerate(("train", "test")):
        rows = pictures(count, seed=index).transpose(0, 3, 1, 2).reshape(count, 3072)
        fine = [n % 100 for n in range(count)]
        files[name] = python2_batch({"fine_labels": fine, "coarse_labels": [each // 5 for each in fine], "data": rows})
    fine_names, coarse_names = [f"fine{n}" for n in range(100)], [f"coarse{n}" for n in range(20)]
    return {**files, "meta": python2_batch({"fine_label_names": fine_names, "coarse_label_names": coarse_names})}


def cifar100_binary_files(count: int = 20) -> dict[str, bytes]:
    """The files of ``cifar-100-binary``."""
    files = {}
    for index, name in enumerate(("train.bin", "test.bin")):
        rows = pictures(count, seed=index).transpose(0, 3, 1, 2).reshape(count, 3072)
        fine = np.arange(count) % 100
        files[name] = np.concatenate([(fine // 5)[:, None], fine[:, None], rows], axis=1).astype(np.uint8).tobytes()
    return {**files, "fine_label_names.txt": "\n".join(f"fine{n}" for n in range(100)).encode()}


def write_cifar10_python(path: Path, per_batch: int = 20, *, seed: int = 0) -> Path:
    """``cifar-10-python.tar.gz``; a path without ``.gz`` or ``.tgz`` gets the extracted files."""
    return _write(path, "cifar-10-batches-py", cifar10_python_files(per_batch, seed=seed))


def write_cifar10_binary(path: Path, per_batch: int = 20, *, seed: int = 0) -> Path:
    """``cifar-10-binary.tar.gz``; a path without ``.gz`` or ``.tgz`` gets the extracted files."""
    return _write(path, "cifar-10-batches-bin", cifar10_binary_files(per_batch, seed=seed))


def write_celeba(folder: Path, count: int = 12, *, zipped: bool = False, partition: bool = True) -> Path:
    """``img_align_celeba`` (or the archive of it) in a folder, and the list of splits: of four, two to train."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{n:06d}.jpg" for n in range(1, count + 1)]
    images = pictures(count, 218, 178)
    files = {f"img_align_celeba/{name}": encoded(each) for name, each in zip(names, images, strict=True)}
    if zipped:
        write_zip(folder / "img_align_celeba.zip", files)
    else:
        write_image_folder(folder, files)
    if partition:
        lines = [f"{name} {(0, 0, 1, 2)[n % 4]}\n" for n, name in enumerate(names)]
        (folder / "list_eval_partition.txt").write_text("".join(lines))
    return folder


def write_parquet(folder: Path, count: int = 12) -> Path:
    """A data set as the hub keeps it: parquet files of the splits train and test, with a column of classes."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for index, split in enumerate(("train", "test")):
        rows = [{"bytes": encoded(each, "png"), "path": None} for each in pictures(count, seed=index)]
        data = datasets.Dataset.from_dict({"img": rows, "label": [n % 2 for n in range(count)]}, features=features)
        data.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def _cifar10_batch(count: int, seed: int) -> tuple[NDArray[np.uint8], list[int]]:
    return pictures(count, seed=seed), [int(n) for n in np.random.default_rng(seed).permutation(np.arange(count) % 10)]


def _write(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    if path.suffix in (".gz", ".tgz"):
        return write_tar(path, {f"{folder}/{name}": content for name, content in files.items()})
    return write_image_folder(path, files)


def python2_batch(content: dict[str, object]) -> bytes:
    """A pickle of protocol 2 as Python 2 with NumPy 1 wrote it: texts are ``str``, which are bytes, arrays are rebuilt.

    Python 3 cannot write such pickles, so that their opcodes are put together here.
    """
    data = b"\x80\x02" + _opcodes(content) + b"."
    pickletools.dis(data, out=io.StringIO())  # raises for what is no pickle
    return data


def _opcodes(value: object) -> bytes:
    match value:
        case int():
            return pickle.BININT + struct.pack("<i", value)
        case str():
            raw = value.encode("latin1")
            return pickle.BINSTRING + struct.pack("<i", len(raw)) + raw
        case list():
            return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(_opcodes, value)) + pickle.APPENDS
        case dict():
            items = b"".join(_opcodes(key) + _opcodes(each) for key, each in value.items())
            return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
        case np.ndarray():
            assert value.dtype == np.uint8
            shape = b"".join(map(_opcodes, value.shape))
            call = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + _opcodes(0) + pickle.TUPLE1
            call += _opcodes("b") + pickle.TUPLE3 + pickle.REDUCE
            kind = b"cnumpy\ndtype\n" + _opcodes("u1") + _opcodes(0) + _opcodes(1) + pickle.TUPLE3 + pickle.REDUCE
            kind_state = _opcodes(3) + _opcodes("|") + pickle.NONE * 3 + _opcodes(-1) + _opcodes(-1) + _opcodes(0)
            kind += pickle.MARK + kind_state + pickle.TUPLE + pickle.BUILD
            raw = value.tobytes()
            rows = pickle.BINSTRING + struct.pack("<i", len(raw)) + raw
            state = _opcodes(1) + pickle.MARK + shape + pickle.TUPLE + kind + pickle.NEWFALSE + rows
            return call + pickle.MARK + state + pickle.TUPLE + pickle.BUILD
    raise TypeError(type(value))
