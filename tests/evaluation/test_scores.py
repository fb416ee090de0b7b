import math

import pytest
import torch

from lightning_earlybird.evaluation.scores import QualityMeter, caution, metric_suffix
from lightning_earlybird.evaluation.statistics import FeatureStatistics, StatisticsMeter


def statistics(features, **settings):
    meter = StatisticsMeter(len(features))
    for start in range(0, len(features), 7):
        meter.add(features[start : start + 7], start)
    known = {"image_shape": (1, 8, 8), "extractor": "test", "source": "test"}
    return FeatureStatistics(len(features), meter.total, meter.products, torch.cat(meter.rows), **(known | settings))


def with_moments(count, mean, deviations, seed):
    """Features whose sample mean and covariance are exactly these."""
    raw = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    raw -= raw.mean(0)
    root = torch.linalg.cholesky(raw.T @ raw / (count - 1))
    white = torch.linalg.solve_triangular(root, raw.T, upper=False).T
    return white * torch.tensor(deviations) + torch.tensor(mean)


def score(reference, features, **settings):
    meter = QualityMeter(statistics(reference), reference.shape[1], **settings)
    for part in features.split(11):
        meter.add(part)
    return meter.compute()


def test_fid_is_the_distance_of_gaussians_in_closed_form() -> None:
    # |mean difference|^2 + the squares of the differences of deviations, where covariances are diagonal.
    reference = with_moments(200, [0.0, 1.0, -2.0], [1.0, 2.0, 0.5], seed=0)
    samples = with_moments(150, [1.0, 1.0, 0.0], [3.0, 1.0, 0.5], seed=1)
    expected = (1 + 0 + 4) + (4 + 1 + 0)
    assert score(reference, samples, kid_subsets=0).fid == pytest.approx(expected, abs=1e-6)
    assert score(reference, reference, kid_subsets=0).fid == pytest.approx(0, abs=1e-6)
    assert score(reference, samples, kid_subsets=0).kid is None


def test_fid_of_correlated_gaussians_is_that_of_their_covariances_square_roots() -> None:
    generator = torch.Generator().manual_seed(3)
    mix = [torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    sets = [with_moments(300, [0.0] * 4, [1.0] * 4, seed=i) @ mix[i] for i in range(2)]
    a, b = (m.T @ m for m in mix)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ values.sqrt().diag() @ vectors.T
    expected = a.trace() + b.trace() - 2 * torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    assert score(*sets, kid_subsets=0).fid == pytest.approx(float(expected), rel=1e-6)


def test_kid_is_the_unbiased_estimate_of_the_squared_discrepancy() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(12, 5, generator=generator) + shift for shift in (0.0, 0.4))

    def kernel(x, y):
        return (float(x @ y) / 5 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(kernel(s[i], s[j]) for s in (real, fake) for i, j in pairs if i != j) / (12 * 11)
    across = sum(kernel(real[i], fake[j]) for i, j in pairs) / 12**2
    # Subsets of all samples are the same sample, whatever their order.
    found = score(real, fake, kid_subsets=3, kid_subset_size=12)
    assert found.kid == pytest.approx(within - 2 * across, rel=1e-4)
    assert found.kid_std == pytest.approx(0, abs=1e-5)


def test_subsets_depend_on_the_seed_alone_and_leave_the_random_state() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(40, 5, generator=generator) for _ in range(2))
    before = torch.get_rng_state()
    first = score(real, fake, kid_subsets=4, kid_subset_size=10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert score(real, fake, kid_subsets=4, kid_subset_size=10) == first
    assert first.kid_std > 0


def test_metric_names_have_the_count_and_any_features_but_inceptions() -> None:
    assert metric_suffix(10_000, "") == "10k"
    assert metric_suffix(50_000, "") == "50k"
    assert metric_suffix(500, "") == "500"
    assert metric_suffix(2500, "") == "2500"
    assert metric_suffix(10_000, "classifier") == "10k_classifier"


def test_few_samples_are_cautioned_of() -> None:
    assert caution(50_000, 50_000, 2048) is None
    assert "num_samples=10000 is below the 50000 of published scores" in caution(10_000, 50_000, 2048)
    assert "singular" not in caution(10_000, 50_000, 2048)
    assert "1000 samples are not enough for the covariance of 2048 features" in caution(1000, 50_000, 2048)
    assert "60 reference images are not enough for the covariance of 64 features" in caution(50_000, 60, 64)


def test_a_rank_without_samples_of_its_own_still_counts_nothing() -> None:
    meter = QualityMeter(None, 3, kid_subsets=2, kid_subset_size=2)
    assert int(meter._fid.fake_features_num_samples) == 0
    assert math.isclose(float(meter._fid.real_features_num_samples), 0)
