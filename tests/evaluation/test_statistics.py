import pytest
import torch
from safetensors.torch import save_file

from lightning_earlybird.evaluation import statistics as module
from lightning_earlybird.evaluation.statistics import FeatureStatistics, StatisticsMeter, measured


def example(count=20, features=3):
    rows = torch.randn(count, features, generator=torch.Generator().manual_seed(0))
    meter = measured([(0, rows[:8]), (8, rows[8:])], count, lambda x: x)
    return rows, FeatureStatistics(
        count, meter.total, meter.products, torch.cat(meter.rows), (3, 8, 8), "net", "folder"
    )


def test_sums_give_mean_and_covariance() -> None:
    rows, statistics = example()
    torch.testing.assert_close(statistics.mean, rows.double().mean(0))
    torch.testing.assert_close(statistics.covariance, torch.cov(rows.double().T))
    assert statistics.num_features == 3


def test_the_kept_rows_are_so_many_of_all_and_the_same_however_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KID_ROWS", 6)
    rows = torch.arange(20.0)[:, None]
    kept = []
    for size in (3, 20):
        meter = StatisticsMeter(20)
        for start in range(0, 20, size):
            meter.add(rows[start : start + size], start)
        kept.append(torch.cat(meter.rows).flatten().tolist())
    assert kept[0] == kept[1]
    assert len(set(kept[0])) == 6
    assert kept[0] != [0, 1, 2, 3, 4, 5]


def test_a_file_gives_back_what_was_saved(tmp_path) -> None:
    _, statistics = example()
    statistics.save(tmp_path / "new" / "reference.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "new" / "reference.safetensors")
    for name in ("total", "products", "rows"):
        assert torch.equal(getattr(loaded, name), getattr(statistics, name))
    for name in ("count", "image_shape", "extractor", "source"):
        assert getattr(loaded, name) == getattr(statistics, name)


def test_files_that_are_something_else_are_refused(tmp_path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        FeatureStatistics.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        FeatureStatistics.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no statistics of this package, but None"):
        FeatureStatistics.load(path)
    _, statistics = example()
    statistics.save(path)
    whole = path.read_bytes()
    for old, new in (
        (b'"format_version":"1"', b'"format_version":"7"'),
        (b'"count":"20"', b'"count":"1 "'),
        (b'"image_shape":"3x8x8"', b'"image_shape":"3y8y8"'),
        (b'"rows"', b'"pows"'),
    ):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match="is damaged or of a newer version"):
            FeatureStatistics.load(path)


def test_statistics_that_cannot_be_are_refused() -> None:
    total, products, rows = torch.zeros(2).double(), torch.zeros(2, 2).double(), torch.zeros(3, 2)
    facts = {"image_shape": (3, 8, 8), "extractor": "net", "source": "folder"}
    with pytest.raises(ValueError, match="do not fit together"):
        FeatureStatistics(3, total, products[:1], rows, **facts)
    with pytest.raises(ValueError, match="do not fit together"):
        FeatureStatistics(3, total.float(), products, rows, **facts)
    for count in (1, 2):
        with pytest.raises(ValueError, match=f"count={count} must be at least 2, and not below the 3 rows"):
            FeatureStatistics(count, total, products, rows, **facts)
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics(3, total * torch.nan, products, rows, **facts)


def test_a_bit_that_has_changed_is_noticed(tmp_path) -> None:
    path = tmp_path / "file.safetensors"
    _, statistics = example()
    statistics.save(path)
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged or of a newer version: its numbers are not those that were saved"):
        FeatureStatistics.load(path)
