"""FID and KID of features, by torchmetrics."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from lightning_earlybird.evaluation.statistics import FeatureStatistics

PUBLISHED_SAMPLES = 50_000
"""How many samples published scores are of."""


@dataclass(frozen=True)
class Scores:
    """How far samples are from the reference.

    Args:
        fid: Squared Frechet distance of Gaussians fitted to the features; few samples make it larger.
        kid: Squared maximum mean discrepancy under a cubic kernel; unbiased, so that it may be below 0. None if not
            asked for.
        kid_std: Standard deviation of ``kid`` over the subsets.
    """

    fid: float
    kid: float | None = None
    kid_std: float | None = None


class QualityMeter:
    """Takes in the features of samples, in batches and on any number of ranks, and compares them with a reference.

    Args:
        reference: The reference on the first rank; None on all others, so that it counts once.
        num_features: Length of a feature vector.
        kid_subsets: Subsets that KID is averaged over; 0 leaves KID out.
        kid_subset_size: Images in each.
        device: Where the sums are kept; CPU where the device has no float64.
    """

    def __init__(
        self,
        reference: FeatureStatistics | None,
        num_features: int,
        *,
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        device: torch.device | None = None,
    ) -> None:
        self._device = torch.device("cpu") if device is None or device.type == "mps" else device
        passed = _Passed(num_features)
        self._fid = FrechetInceptionDistance(feature=passed).to(self._device)
        self._kid: KernelInceptionDistance | None = None
        if kid_subsets > 0:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
                self._kid = KernelInceptionDistance(passed, subsets=kid_subsets, subset_size=kid_subset_size)
            self._kid = self._kid.to(self._device)
        if reference is not None:
            self._fid.real_features_sum = reference.total.to(self._device, copy=True)
            self._fid.real_features_cov_sum = reference.products.to(self._device, copy=True)
            self._fid.real_features_num_samples = torch.tensor(reference.count, device=self._device)
        if self._kid is not None:
            rows = reference.rows if reference is not None else torch.zeros(0, num_features)
            self._kid.real_features = [rows.to(self._device)]
        # A rank without a share has its part in what ranks do together as well.
        self.add(torch.zeros(0, num_features))

    def add(self, features: Tensor) -> None:
        """Takes in features of samples, float32, shape (batch_size, num_features)."""
        features = features.to(self._device)
        self._fid.update(features.double(), real=False)
        if self._kid is not None:
            self._kid.update(features, real=False)

    def compute(self, seed: int = 0) -> Scores:
        """The scores of the samples of all ranks, the same on each; to be called on all.

        Args:
            seed: Of the subsets of KID. The global random state is left as it was.
        """
        fid = float(self._fid.compute())
        if self._kid is None:
            return Scores(fid)
        # One tensor a rank, since torchmetrics gathers entry by entry.
        self._kid.fake_features = [torch.cat(self._kid.fake_features)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            kid, kid_std = self._kid.compute()
        return Scores(fid, float(kid), float(kid_std))


class _Passed(nn.Module):
    """In the place of torchmetrics' extractor: what it is given are the features, taken once for both scores."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def metric_suffix(num_samples: int, label: str) -> str:
    """What follows ``fid_`` and ``kid_``: the number of samples, and the features if they are not Inception's.

    Args:
        num_samples: How many samples; thousands are written with a k.
        label: Of the extractor; empty for Inception.

    Returns:
        ``10k``, ``500``, ``50k_classifier``.
    """
    count = f"{num_samples // 1000}k" if num_samples % 1000 == 0 else str(num_samples)
    return f"{count}_{label}" if label else count


def caution(num_samples: int, num_reference: int, num_features: int) -> str | None:
    """What is to be known about scores of so few images; None if there are enough."""
    parts = []
    if num_samples < PUBLISHED_SAMPLES:
        parts.append(
            f"num_samples={num_samples} is below the {PUBLISHED_SAMPLES} of published scores: fewer samples make FID "
            "larger, so compare it with others of as many samples only (the number is in the metric's name)"
        )
    for name, number in (("samples", num_samples), ("reference images", num_reference)):
        if number <= num_features:
            parts.append(
                f"{number} {name} are not enough for the covariance of {num_features} features, which is singular "
                f"then, and FID means little: take more than {num_features}"
            )
    return "; ".join(parts) + "." if parts else None
