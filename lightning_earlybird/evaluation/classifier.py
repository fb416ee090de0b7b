"""Features of a small classifier trained on the spot, for places without Inception's weights."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lightning_earlybird.arguments import check_positive
from lightning_earlybird.durable import file_written_aside
from lightning_earlybird.sampling import evaluating

FORMAT = "lightning-earlybird features"
FORMAT_VERSION = 1
LARGEST_SETTING = 1 << 16
"""Of width, channels and classes in a file, which is built before it is compared with what the file holds."""


class ClassifierFeatures(nn.Module):
    """A small convolutional classifier; as a feature extractor it gives what its last layer sees.

    For images of any size from 8 pixels on, with the channels that it was trained with.

    Args:
        channels: Channels of the images.
        num_classes: Classes that it tells apart.
        width: Channels of the first layer; there are four times as many features.

    Attributes:
        num_features: How many features there are.
        test_accuracy: Share of held-out images that it classified rightly, in [0, 1]; None if none were held out.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        check_positive(channels=channels, num_classes=num_classes, width=width)
        self.channels = channels
        self.num_classes = num_classes
        self.width = width
        self.num_features = 4 * width
        self.test_accuracy: float | None = None
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("deviation", torch.ones(channels, 1, 1))
        self.body = nn.Sequential(
            # The stride of the first layer is what makes this bearable on a CPU.
            *_block(channels, width, stride=2),
            *_block(width, 2 * width),
            nn.MaxPool2d(2),
            *_block(2 * width, 4 * width),
            nn.MaxPool2d(2, ceil_mode=True),
            *_block(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: uint8, shape (batch_size, channels, height, width).

        Returns:
            Shape (batch_size, num_features).

        Raises:
            ValueError: If the images have other channels than those that it was trained on.
        """
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, and this classifier was trained on images with "
                f"{self.channels} channel(s): shape (batch_size, {self.channels}, height, width). Train one for these."
            )
        mean, deviation = self.get_buffer("mean"), self.get_buffer("deviation")
        # Values up to 255 are more than float16 and bfloat16 can tell apart after a division.
        scaled = ((images.float() - mean.float()) / deviation.float()).to(mean.dtype)
        features: Tensor = self.body(scaled.contiguous(memory_format=torch.channels_last))
        return features

    def logits(self, images: Tensor) -> Tensor:
        """Scores of the classes, shape (batch_size, num_classes)."""
        scores: Tensor = self.head(self(images))
        return scores

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the classifier as a safetensors file, which ``features="classifier:PATH"`` reads.

        Args:
            path: The file; replaced where there is one. Its directory is made.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        facts = {"channels": self.channels, "num_classes": self.num_classes, "width": self.width}
        metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION)} | {k: str(v) for k, v in facts.items()}
        if self.test_accuracy is not None:
            metadata["test_accuracy"] = repr(self.test_accuracy)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with file_written_aside(target) as file:
            file.write(save(state, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassifierFeatures:
        """Reads what :meth:`save` wrote; nothing is unpickled. In evaluation mode, on the CPU.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is something else, damaged, or of a newer format.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"features={str(path)!r}: there is no such file. Train a classifier: "
                "python -m lightning_earlybird.evaluation features --data IMAGES --output FILE."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except Exception as error:  # the library raises anything over a damaged file
            raise ValueError(f"features={str(path)!r} is not a safetensors file ({error}).") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"features={str(path)!r} holds no classifier that train_features made, but {metadata.get('format')!r}."
            )
        try:
            version, *settings = (
                int(metadata[name]) for name in ("format_version", "channels", "num_classes", "width")
            )
            if version > FORMAT_VERSION:
                raise ValueError(f"its format version is {version}, and this version reads up to {FORMAT_VERSION}")
            if not all(1 <= value <= LARGEST_SETTING for value in settings) or settings[2] > 4096:
                raise ValueError(f"its channels, classes and width are {settings}")
            with torch.device("meta"):
                network = cls(*settings)
            # Assigning compares the shapes, so that no memory is taken for what the file does not hold.
            network.load_state_dict(load_file(path), assign=True)
            accuracy = metadata.get("test_accuracy")
            network.test_accuracy = None if accuracy is None else float(accuracy)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"features={str(path)!r} is damaged or of a newer version: {error}.") from error
        network.requires_grad_(False)
        return network.eval()


def train_features(
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int = 6,
    seed: int = 0,
    width: int = 32,
    batch_size: int = 256,
    flip: bool = True,
    test: tuple[Tensor, Tensor] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> ClassifierFeatures:
    """Trains a small classifier whose features stand in for Inception's where there is no network to fetch those.

    Distances in its features are comparable with each other, and with nothing that others have measured. Random states
    are left as they were; the result depends on the arguments (and on the machine's arithmetic) only. On one CPU core
    50,000 CIFAR-10 images take about 35 seconds an epoch at the default width.

    Args:
        images: uint8, shape (num_images, channels, height, width); it may lie in a mapped file.
        labels: long, shape (num_images,), from 0.
        epochs: Passes through the images.
        seed: Of initial weights, order, flips and shifts.
        width: Channels of the first layer; the features are four times as many.
        batch_size: Images a step.
        flip: Whether images may be mirrored; not for digits and letters.
        test: Held-out images and labels, on which ``test_accuracy`` is measured.
        device: Where to train.
        progress: Whether to show a progress bar.

    Returns:
        The classifier, in evaluation mode, on the CPU.

    Raises:
        ValueError: If images or labels are of another kind, fewer than a batch of two, or of a single class.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    check_positive(epochs=epochs, width=width, batch_size=batch_size)
    _check_labelled(images, labels, "images")
    if test is not None:
        _check_labelled(*test, "test")
    num_classes = int(labels.max()) + 1
    if num_classes < 2:
        raise ValueError("labels are all 0: a classifier needs at least two classes. Give images of several classes.")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ClassifierFeatures(images.shape[1], num_classes, width)
    _set_scale(network, images[torch.randperm(len(images), generator=generator)[:4096].sort().values])
    network.to(device)
    # mypy has no overload for a memory format alone.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = math.ceil(len(images) / batch_size) * epochs
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps, pct_start=0.2)
    with tqdm(total=steps, desc="training features", unit="step", disable=not progress) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator)
            for index in order.split(batch_size):
                if len(index) == 1:
                    index = index.repeat(2)  # batch norm takes no statistics of one image
                batch = _augmented(images[index], flip, generator).to(device)
                loss = nn.functional.cross_entropy(network.logits(batch), labels[index].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    network.eval().requires_grad_(False)
    if test is not None:
        network.test_accuracy = accuracy(network, *test, batch_size=batch_size, device=device)
    return network.cpu()


@torch.no_grad()
def accuracy(
    network: ClassifierFeatures,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> float:
    """Share of images that the classifier puts into their class, in [0, 1]."""
    right = 0
    with evaluating(network):
        for start in range(0, len(images), batch_size):
            scores = network.logits(images[start : start + batch_size].to(device))
            right += int((scores.argmax(1).cpu() == labels[start : start + batch_size]).sum())
    return right / len(images)


def _block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def _set_scale(network: ClassifierFeatures, images: Tensor) -> None:
    values = images.float()
    network.get_buffer("mean").copy_(values.mean((0, 2, 3))[:, None, None])
    # A channel that is the same everywhere would be divided by zero.
    network.get_buffer("deviation").copy_(values.std((0, 2, 3)).clamp(min=1.0)[:, None, None])


def _augmented(images: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, and all shifted by up to an eighth of their size, the same for the batch."""
    if flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    height, width = images.shape[2:]
    reach = max(1, min(height, width) // 8)
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    padded = nn.functional.pad(images, (reach, reach, reach, reach))
    return padded[:, :, down : down + height, right : right + width]


def _check_labelled(images: Any, labels: Any, name: str) -> None:
    if not isinstance(images, Tensor) or images.dim() != 4 or images.dtype != torch.uint8 or min(images.shape[2:]) < 8:
        known = isinstance(images, Tensor)
        found = f"{images.dtype} of shape {tuple(images.shape)}" if known else type(images).__name__
        raise ValueError(
            f"{name} is {found}, expected uint8 images of shape (num_images, channels, height, width), at least 8 "
            "pixels high and wide."
        )
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1] or labels.is_floating_point():
        found = f"a tensor of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        raise ValueError(
            f"the labels of {name} are {found}, expected one integer per image, shape ({len(images)},). A classifier "
            "needs labelled images: folders of classes, or CIFAR-10's own archive."
        )
    if len(images) < 2 or int(labels.min()) < 0:
        raise ValueError(
            f"{name}: there are {len(images)} images with labels from {int(labels.min()) if len(labels) else None}; "
            "give at least two, with labels from 0 on."
        )
