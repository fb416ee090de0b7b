"""Pickled batches give their arrays and labels, whoever wrote them, and never anything else."""

import pickle
import resource
import struct
from collections.abc import Iterator

import image_files as files
import numpy as np
import pytest

from lightning_earlybird.images import ImageDataError, batch_pickles
from lightning_earlybird.images.batch_pickles import read_batch

PYTHON2 = files.cifar10_python_files(3)["data_batch_1"]


def test_what_python_2_wrote_is_read_as_pickle_itself_would() -> None:
    expected = pickle.loads(PYTHON2, encoding="latin1")
    found = read_batch(PYTHON2, "batch")
    assert found.keys() == expected.keys()
    assert np.array_equal(found["data"], expected["data"])
    assert found["data"].dtype == np.uint8
    assert found["labels"] == expected["labels"]
    assert found["filenames"] == [name.encode() for name in expected["filenames"]]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_python_3_wrote_is_read_in_every_protocol(protocol: int, order: str) -> None:
    data = np.array(np.random.default_rng(0).integers(0, 256, (5, 3072), np.uint8), order=order)  # type: ignore[call-overload]
    found = read_batch(pickle.dumps({"data": data, "labels": [1, 2, 3, 4, 5]}, protocol=protocol), "batch")
    assert np.array_equal(found["data"], data)
    assert found["labels"] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3, np.float32), "an array in it does not consist of bytes"),
        (np.array([None, 1]), "an array in it does not consist of bytes"),
        (np.zeros(3, np.dtype([("a", "u1")])), "an array in it does not consist of bytes"),
    ],
)
def test_arrays_of_anything_but_bytes_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(ImageDataError, match=message):
        read_batch(pickle.dumps({"data": array}, protocol=4), "batch")


def test_arrays_that_are_not_as_large_as_they_say_are_refused() -> None:
    data = pickle.dumps({"data": np.zeros((2, 8), np.uint8)}, protocol=2)
    with pytest.raises(
        ImageDataError, match=r"batch: an array in it says that its shape is \(2, 9\), but holds 16 bytes"
    ):
        read_batch(data.replace(b"K\x02K\x08", b"K\x02K\x09"), "batch")
    kind = b"cnumpy\ndtype\nX\2\0\0\0u1\x85R"
    lacking = b"cnumpy.core.multiarray\n_reconstruct\n)R(K\1K\2\x85" + kind + b"I00\nNtb"
    lacking = b"\x80\x02}X\4\0\0\0data" + lacking + b"s."
    with pytest.raises(ImageDataError, match="batch: an array in it has no data"):
        read_batch(lacking, "batch")


def test_other_names_encodings_and_states_are_refused() -> None:
    with pytest.raises(ImageDataError, match=r"batch: its pickle refers to builtins\.eval"):
        read_batch(b"\x80\x02cbuiltins\neval\n.", "batch")
    with pytest.raises(ImageDataError, match="batch: a text in it is encoded as none of CIFAR's is"):
        read_batch(b"\x80\x02c_codecs\nencode\nX\1\0\0\0aX\5\0\0\0utf_7\x86R.", "batch")
    with pytest.raises(ImageDataError, match="batch: its pickle sets the state of something that is no array"):
        read_batch(b"\x80\x02c_codecs\nencode\n}X\1\0\0\0aK\1sb.", "batch")
    assert not hasattr(batch_pickles._encode, "a")


@pytest.fixture
def little_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("little_memory")
def test_a_short_pickle_cannot_ask_for_much_memory() -> None:
    # To remember the dictionary as number 2^30, for which the reader in C takes 16 GiB.
    assert read_batch(b"\x80\x02}r" + struct.pack("<I", 1 << 30) + b".", "batch") == {}
    for long in (b"\x8a", b"\x8b", b"X", b"B", b"T", b"\x8d", b"\x8e", b"\x96"):
        size = {b"\x8a": b"\xff", b"\x8d": b"", b"\x8e": b"", b"\x96": b""}.get(long, struct.pack("<i", 0x7FFFFFFF))
        with pytest.raises(ImageDataError, match="batch is damaged or cut off"):
            read_batch(b"\x80\x05" + long + (size or struct.pack("<q", 1 << 60)) + b"abc", "batch")


def test_pickles_with_changed_bytes_are_read_or_refused() -> None:
    whole, draws = np.frombuffer(PYTHON2, np.uint8), np.random.default_rng(0)
    ends = np.r_[:300, len(whole) - 300 : len(whole)]
    refused = 0
    for _ in range(600):
        data = whole.copy()
        data[draws.choice(ends, 3)] = draws.integers(0, 256, 3)
        try:
            assert isinstance(read_batch(data.tobytes(), "batch"), dict)
        except ImageDataError:
            refused += 1
    assert 200 < refused < 600
