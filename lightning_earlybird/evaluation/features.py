"""What images are compared by: Inception's features, or others that never pass for them."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_earlybird.evaluation.classifier import ClassifierFeatures
from lightning_earlybird.sampling import evaluating

Features: TypeAlias = str | nn.Module | Callable[[], nn.Module]
"""``"inception"``, ``"classifier:PATH"``, ``"package.module:Factory"``, a network, or a function that builds one."""

OTHERS = (
    "features='classifier:FILE' compares by a small classifier of your own "
    "(python -m lightning_earlybird.evaluation features), and features= takes any network"
)


class FeatureExtractor:
    """A network that turns uint8 images into features, with a name that tells them from all others.

    Args:
        network: Takes uint8 images, shape (batch_size, channels, height, width), and returns (batch_size,
            num_features). Put into evaluation mode for its calls only.
        label: What metric names end with; empty for Inception, whose scores are what others publish.
        colours: Whether it takes three channels only; grey images are then repeated.
    """

    def __init__(self, network: nn.Module, label: str, *, colours: bool = False) -> None:
        self.network = network
        self.label = label
        self.colours = colours
        self._identity: str | None = None

    @property
    def identity(self) -> str:
        """What statistics are stored under: class, structure and a digest of all weights."""
        if self._identity is None:
            network = self.network
            digest = hashlib.sha256(repr(network).encode())
            for name, tensor in network.state_dict().items():
                if isinstance(tensor, Tensor):
                    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            self._identity = f"{type(network).__module__}.{type(network).__qualname__}:{digest.hexdigest()[:32]}"
        return self._identity

    def to(self, device: torch.device) -> FeatureExtractor:
        """Moves the network."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: uint8, shape (batch_size, channels, height, width), on the network's device.

        Returns:
            float32, shape (batch_size, num_features).

        Raises:
            ValueError: If the images have a number of channels that the network does not take, or it returns something
                else than one finite vector per image.
        """
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}, expected uint8 (N, C, H, W).")
        if self.colours and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self.colours and images.shape[1] != 3:
            raise ValueError(
                f"images have {images.shape[1]} channels, and Inception takes 3 (or 1, which is repeated). Turn "
                f"latents into images with decode=, or compare by other features: {OTHERS}."
            )
        with evaluating(self.network):
            features = self.network(images)
        if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1] or features.dim() < 2:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"features: {type(self.network).__name__} returned {found} for {len(images)} images, expected a tensor "
                f"of shape ({len(images)}, num_features). Wrap the network."
            )
        flat = features.flatten(1).float()
        if not bool(torch.isfinite(flat).all()):
            raise ValueError(
                f"features: {type(self.network).__name__} returned numbers that are not finite for finite images. "
                "Check its weights; half precision may overflow."
            )
        return flat


def load_features(features: Features, inception_weights: str | os.PathLike[str] | None = None) -> FeatureExtractor:
    """The extractor that an argument ``features`` means.

    Args:
        features: See :data:`Features`.
        inception_weights: File with Inception's weights, for places without a network; of ``"inception"`` only.

    Raises:
        ModuleNotFoundError: If torch-fidelity, which has Inception's architecture, is not installed.
        ConnectionError: If Inception's weights cannot be fetched.
        FileNotFoundError: If a file does not exist.
        ValueError: If the argument means nothing, a file is damaged, or a factory builds no network.
    """
    if inception_weights is not None and features != "inception":
        raise ValueError(
            f"inception_weights={str(inception_weights)!r} has no effect with features={features!r}. Leave one of them "
            "at its default."
        )
    if features == "inception":
        return FeatureExtractor(_inception(inception_weights), "", colours=True)
    if isinstance(features, nn.Module):
        return FeatureExtractor(features, _label_of(features))
    if isinstance(features, str) and features.startswith("classifier:"):
        return FeatureExtractor(ClassifierFeatures.load(features.removeprefix("classifier:")), "classifier")
    if isinstance(features, str):
        features = imported("features", features, "'inception', 'classifier:FILE' or ")
    network = features() if callable(features) else features
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"features={features!r} must be 'inception', 'classifier:FILE', 'package.module:Factory', a torch module, "
            f"or a function that builds one; it gave a {type(network).__name__}."
        )
    return FeatureExtractor(network, _label_of(network))


def _inception(weights: str | os.PathLike[str] | None) -> nn.Module:
    if weights is not None:
        _check_weights(Path(weights))
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        # Without antialiasing it resizes as the original did, which published scores were measured with.
        return NoTrainInceptionV3(
            "inception-v3-compat", ["2048"], None if weights is None else str(weights), antialias=False
        )
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "features='inception' needs the package torch-fidelity, which has the network: pip install "
            f"'lightning-earlybird[fid]'. Without it, {OTHERS}."
        ) from error
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"features='inception': the weights could not be fetched ({error}). Fetch them where there is a network "
            f"and give their file, inception_weights=PATH; or {OTHERS}."
        ) from error
    except RuntimeError as error:  # of load_state_dict
        raise ValueError(
            f"inception_weights={str(weights)!r} does not hold the weights of torch-fidelity's Inception: {error}"
        ) from error


def _check_weights(path: Path) -> None:
    """torch-fidelity unpickles whatever the file holds; here it is read without doing so, first."""
    if not path.is_file():
        raise FileNotFoundError(f"inception_weights={str(path)!r}: there is no such file.")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is not a checkpoint makes torch raise anything
        raise ValueError(
            f"inception_weights={str(path)!r} is not a plain file of weights ({type(error).__name__}); give "
            "weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"inception_weights={str(path)!r} is not a plain file of weights; it holds other things.")


def imported(argument: str, name: str, others: str = "") -> Callable[[], Any]:
    """A function or class by its name.

    Args:
        argument: Which argument names it, for messages.
        name: ``"package.module:Factory"``.
        others: What else the argument may be, for messages.

    Raises:
        ValueError: If nothing of that name can be imported and called.
    """
    module_name, _, path = name.partition(":")
    try:
        if not path:
            raise ValueError("it has no colon")
        factory: Any = importlib.import_module(module_name)
        for part in path.split("."):
            factory = getattr(factory, part)
        if not callable(factory):
            raise ValueError(f"it is a {type(factory).__name__}")
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(
            f"{argument}={name!r} must be {others}'package.module:Factory', a function or class that can be imported "
            f"({error})."
        ) from error
    built: Callable[[], Any] = factory
    return built


def _label_of(network: nn.Module) -> str:
    """``ClassifierFeatures`` is a classifier; ``PixelMeans`` becomes ``pixel_means``."""
    if isinstance(network, ClassifierFeatures):
        return "classifier"
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(network).__name__).lower().strip("_") or "features"
