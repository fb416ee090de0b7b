"""How good samples are: FID and KID, in a fit and from the command line, and what they are measured with."""

from lightning_earlybird.evaluation.callback import SampleQuality
from lightning_earlybird.evaluation.classifier import ClassifierFeatures, train_features
from lightning_earlybird.evaluation.features import FeatureExtractor, load_features
from lightning_earlybird.evaluation.reference import reference_statistics
from lightning_earlybird.evaluation.statistics import FeatureStatistics

__all__ = [
    "ClassifierFeatures",
    "FeatureExtractor",
    "FeatureStatistics",
    "SampleQuality",
    "load_features",
    "reference_statistics",
    "train_features",
]
