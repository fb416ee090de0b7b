"""Images are decoded once; the file of the cache is whole, or made anew, whatever happens to it."""

import dataclasses
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import image_files as files
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_earlybird.images import ImageSet, cache, read_images
from lightning_earlybird.images.decoding import Decoder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were decoded, each time that some were."""
    counts: list[int] = []
    chunks = Decoder.chunks

    def counting(self: Decoder):  # type: ignore[no-untyped-def]
        counts.append(len(self.indices))
        return chunks(self)

    monkeypatch.setattr(Decoder, "chunks", counting)
    return counts


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return files.write_zip(tmp_path / "data.zip")


def read(data: Path, **settings: object) -> ImageSet:
    return read_images(data, **{"cache_dir": data.parent / "cache", "progress": False, **settings})  # type: ignore[arg-type]


def cached_file(data: Path) -> Path:
    (file,) = (data.parent / "cache").glob("*.safetensors")
    return file


def assert_equal(first: ImageSet, second: ImageSet) -> None:
    assert torch.equal(first.images, second.images)
    assert first.labels is not None
    assert second.labels is not None
    assert torch.equal(first.labels, second.labels)
    for field in ("class_names", "source", "fingerprint", "notes"):
        assert getattr(first, field) == getattr(second, field)


def test_images_are_decoded_once(data: Path, decoded: list[int]) -> None:
    first = read(data)
    assert_equal(first, read(data))
    assert decoded == [6]


def test_other_settings_are_other_images(data: Path, decoded: list[int]) -> None:
    settings = [{}, {"size": 8}, {"crop": 8}, {"channels": "L"}, {"limit": 2}]
    fingerprints = {read(data, **each).fingerprint for each in settings}
    assert len(fingerprints) == len(decoded) == 5
    for each in settings:
        read(data, **each)
    assert len(decoded) == 5


def test_the_cached_file_is_mapped_and_never_written_to(data: Path) -> None:
    images = read(data)
    before = cached_file(data).read_bytes()
    images.images.zero_()
    assert cached_file(data).read_bytes() == before
    assert read(data).images.any()
    assert str(cached_file(data)) in Path("/proc/self/maps").read_text()


def test_the_cached_file_is_a_safetensors_file(data: Path) -> None:
    images = read(data)
    tensors = load_file(cached_file(data))
    assert torch.equal(tensors["images"], images.images)
    with safe_open(cached_file(data), "pt") as file:
        assert file.metadata()["fingerprint"] == images.fingerprint


DAMAGE = {
    "cut off": (lambda content: content[:-100], "is damaged"),
    "empty": (lambda content: b"", "is damaged"),
    "one bit": (lambda content: content[:-7] + bytes([content[-7] ^ 1]) + content[-6:], r"is damaged \(its checksum"),
    "a label": (lambda content: content.replace(b"\1\0\0\0\0\0\0\0" * 3, bytes(24)), r"is damaged \(its checksum"),
    "another format": (lambda content: content.replace(b"version 1", b"version 0"), "was written by another version"),
    "no class names": (lambda content: content.replace(b'"class_names"', b'"class_games"'), "is damaged"),
    "bad class names": (lambda content: content.replace(b'\\"cat', b'cat\\"'), "is damaged"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_made_anew_with_a_message(
    data: Path, decoded: list[int], caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes], message: str
) -> None:
    whole = dataclasses.replace(images := read(data), images=images.images.clone())
    content = cached_file(data).read_bytes()
    assert damage(content) != content
    # In the place of the old file, not into it: that one is still mapped here.
    replacement = data.parent / "replacement"
    replacement.write_bytes(damage(content))
    replacement.replace(cached_file(data))
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        assert_equal(read(data), whole)
    assert decoded == [6, 6]
    (record,) = caplog.records
    assert re.search(message, record.getMessage())
    assert record.getMessage().endswith("; it is made anew.")


def test_a_changed_source_is_decoded_anew_with_a_message(
    tmp_path: Path, decoded: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    sources = {
        "zip": lambda seed: files.write_zip(tmp_path / "data.zip", files.folder_files(seed=seed)),
        "folder": lambda seed: files.write_image_folder(tmp_path / "folder", files.folder_files(seed=seed)),
        "tar": lambda seed: files.write_tar(tmp_path / "data.tar", files.folder_files(seed=seed)),
        "cifar": lambda seed: files.write_cifar10_binary(tmp_path / "cifar-10-batches-bin", 2, seed=seed),
    }
    for write in sources.values():
        decoded.clear()
        caplog.clear()
        first = read(write(0))
        second = read(write(1))
        assert not torch.equal(first.images, second.images)
        assert first.fingerprint != second.fingerprint
        with caplog.at_level("INFO", logger="lightning.pytorch"):
            third = read(write(2))
        assert "is of other data: the source has changed since; it is made anew" in caplog.text
        assert len({each.fingerprint for each in (first, second, third)}) == 3
        assert len(decoded) == 3
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == len(sources)


def test_a_changed_list_of_splits_is_another_source(tmp_path: Path, decoded: list[int]) -> None:
    celeba = files.write_celeba(tmp_path / "celeba", 8)
    assert len(read(celeba, size=8)) == 4
    lines = (celeba / "list_eval_partition.txt").read_text().splitlines()
    (celeba / "list_eval_partition.txt").write_text("\n".join(line[:-1] + "0" for line in lines))
    assert len(read(celeba, size=8)) == 8


def test_a_copy_elsewhere_has_the_same_fingerprint(tmp_path: Path) -> None:
    one, two = (read(files.write_zip(tmp_path / name / "data.zip")) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert one.source != two.source


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"LIGHTNING_EARLYBIRD_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own/images"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/lightning-earlybird/images"),
        ({}, "home/.cache/lightning-earlybird/images"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    data: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for name in ("LIGHTNING_EARLYBIRD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(data.parent / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, str(data.parent / value))
    read_images(data, progress=False)
    assert len(list((data.parent / folder).glob("*.safetensors"))) == 1


def _read_in_a_process(data: Path, slow: bool, results: object) -> None:
    if slow:
        chunks = Decoder.chunks

        def slowly(self: Decoder):  # type: ignore[no-untyped-def]
            Path(data.parent / f"decoding-{os.getpid()}").touch()
            time.sleep(0.5)
            yield from chunks(self)

        Decoder.chunks = slowly  # type: ignore[method-assign]
    results.put(read(data).images.sum().item())  # type: ignore[attr-defined]


def test_of_several_processes_one_decodes(data: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_read_in_a_process, args=(data, True, results)) for _ in range(4)]
    for process in processes:
        process.start()
    sums = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert sums == {read(data).images.sum().item()}
    assert len(list(data.parent.glob("decoding-*"))) == 1


def test_a_process_killed_while_it_decodes_leaves_nothing_half_and_no_lock(data: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_read_in_a_process, args=(data, True, results))
    process.start()
    deadline = time.monotonic() + 60
    while not list(data.parent.glob("decoding-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert not list((data.parent / "cache").glob("*.safetensors"))
    assert len(read(data)) == 6
    assert not list((data.parent / "cache").glob("*.partial"))


def test_without_locks_each_process_writes_the_same_file(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def unsupported(*_: object, **__: object) -> None:
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", unsupported)
    assert len(read(data)) == 6


def test_an_error_while_decoding_leaves_no_file(data: Path, tmp_path: Path) -> None:
    bad = files.write_zip(tmp_path / "bad.zip", files.folder_files() | {"dog/0003.png": b"no image"})
    with pytest.raises(ValueError, match=r"dog/0003\.png \(8 bytes\) cannot be decoded"):
        read(bad)
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    assert not list((tmp_path / "cache").glob(".*.partial"))


def test_a_file_that_other_programs_wrote_is_not_taken_for_ours(data: Path, decoded: list[int]) -> None:
    read(data)
    path = cached_file(data)
    save_file({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, path)
    assert cache.load(path, "0") == "was written by another version of this package"
    assert len(read(data)) == 6
    assert decoded == [6, 6]
