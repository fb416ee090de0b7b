from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_earlybird.evaluation.features import load_features
from lightning_earlybird.evaluation.reference import default_cache, reference_statistics
from lightning_earlybird.evaluation.statistics import FeatureStatistics

IMAGES = torch.randint(256, (30, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
CPU = torch.device("cpu")


class Corner(nn.Module):
    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size
        self.calls = 0

    def extra_repr(self) -> str:
        return f"size={self.size}"

    def forward(self, images):
        self.calls += 1
        return images[:, :, : self.size, : self.size].float().flatten(1)


def measure(reference, network=None, **settings):
    network = network if network is not None else Corner()
    known = {"device": CPU, "batch_size": 8, "progress": False}
    return reference_statistics(reference, load_features(network), **(known | settings)), network.calls


def test_statistics_are_those_of_all_images(tmp_path: Path) -> None:
    statistics, calls = measure(IMAGES, cache_dir=tmp_path)
    features = IMAGES[:, :, :2, :2].flatten(1).double()
    torch.testing.assert_close(statistics.mean, features.mean(0))
    torch.testing.assert_close(statistics.covariance, torch.cov(features.T))
    assert torch.equal(statistics.rows, features.float())
    assert (statistics.count, statistics.image_shape, calls) == (30, (1, 8, 8), 4)


def test_they_are_measured_once_for_the_same_images_and_features(tmp_path: Path) -> None:
    first, _ = measure(IMAGES, cache_dir=tmp_path)
    again, calls = measure(IMAGES.clone(), cache_dir=tmp_path)
    assert calls == 0
    assert torch.equal(again.products, first.products)
    assert measure(IMAGES.flip(0), cache_dir=tmp_path)[1] > 0
    assert measure(IMAGES, Corner(3), cache_dir=tmp_path)[1] > 0
    assert measure(SimpleNamespace(images=IMAGES, fingerprint="own"), cache_dir=tmp_path)[1] > 0
    # The fingerprint speaks for the images.
    assert measure(SimpleNamespace(images=IMAGES.flip(0), fingerprint="own"), cache_dir=tmp_path)[1] == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_file_of_the_cache_is_measured_again(tmp_path: Path) -> None:
    measure(IMAGES, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be used and are measured again"):
        assert measure(IMAGES, cache_dir=tmp_path)[1] > 0
    assert measure(IMAGES, cache_dir=tmp_path)[1] == 0


def test_a_cache_that_cannot_be_written_to_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="could not be kept in .* Give a directory that can be written to"):
        statistics, _ = measure(IMAGES, cache_dir=tmp_path / "file")
    assert statistics.count == 30


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_EARLYBIRD_CACHE", "/own")
    assert default_cache() == Path("/own/references")
    monkeypatch.delenv("LIGHTNING_EARLYBIRD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_cache() == Path("/cache/lightning-earlybird/references")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "lightning-earlybird" / "references"


def test_saved_statistics_are_taken_if_they_are_of_the_same_features(tmp_path: Path) -> None:
    statistics, _ = measure(IMAGES, cache_dir=tmp_path / "cache")
    statistics.save(tmp_path / "reference.safetensors")
    for given in (tmp_path / "reference.safetensors", str(tmp_path / "reference.safetensors"), statistics):
        loaded, calls = measure(given)
        assert calls == 0
        assert torch.equal(loaded.total, statistics.total)
    with pytest.raises(ValueError, match=r"were measured with .*Corner:.* and features= means .*Corner:"):
        measure(statistics, Corner(3))
    assert isinstance(loaded, FeatureStatistics)
