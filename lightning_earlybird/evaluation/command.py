"""The command line: evaluate a saved ensemble, train features, measure a reference.

python -m lightning_earlybird.evaluation ENSEMBLE --reference IMAGES [--dense MODEL] ...
python -m lightning_earlybird.evaluation features --data IMAGES --output FILE ...
python -m lightning_earlybird.evaluation reference --data IMAGES --output FILE ...
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_earlybird.evaluation.classifier import train_features
from lightning_earlybird.evaluation.features import imported, load_features
from lightning_earlybird.evaluation.reference import reference_statistics
from lightning_earlybird.evaluation.report import Evaluation
from lightning_earlybird.files import EnsembleFormatError
from lightning_earlybird.text import duration

PROGRAM = "python -m lightning_earlybird.evaluation"


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit status: 0, or 2 where something is wrong with what was given, which is said in a sentence.
    """
    commands = {"features": (_features_parser, _train), "reference": (_reference_parser, _measure)}
    parser, run = commands.get(arguments[0] if arguments else "", (_evaluation_parser, _evaluate))
    given = arguments[1:] if arguments and arguments[0] in commands else arguments
    options = parser().parse_args(given)
    try:
        run(options)
    except (ValueError, OSError, EnsembleFormatError, MisconfigurationException, ImportError) as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return 2
    return 0


def _evaluation_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Evaluates a saved ensemble: FID, KID, a grid of samples, calls per region, and the time of "
        "sampling against the dense network. `features --help` and `reference --help` describe the other commands.",
    )
    parser.add_argument(
        "ensemble", help="directory of an ensemble; Lightning checkpoint with tickets; or a diffusers model (dense)"
    )
    _add_images(parser, "--reference", "what samples are compared with: images, or saved statistics (.safetensors)")
    _add_extractor(parser)
    parser.add_argument("--samples", type=int, default=10_000, help="samples to draw (default: 10000)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the scheduler (default: 100, as in the paper)")
    parser.add_argument("--spacing", choices=("quadratic", "uniform"), default="quadratic", help="of the DDIM steps")
    parser.add_argument("--scheduler", help="directory of a diffusers scheduler, for other betas or predictions")
    parser.add_argument("--dense", help="dense weights to compare with: Lightning checkpoint or diffusers model")
    parser.add_argument("--denoiser", help="package.module:function that builds the dense network, if not diffusers'")
    parser.add_argument("--classes", type=int, help="of class-conditional denoisers (default: as many as configured)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--timing-images", type=int, default=16, help="batch that sampling is timed on (default: 16)")
    parser.add_argument("--timing-repeats", type=int, default=3, help="how often; 0 leaves it out (default: 3)")
    parser.add_argument("--output", help="directory for evaluation.json and samples.png (default: ENSEMBLE-evaluation)")
    return parser


def _features_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} features",
        description="Trains a small classifier on labelled images; --features classifier:FILE then compares by what "
        "its last layer sees. For places without Inception's weights: its scores compare with each other only.",
    )
    _add_images(parser, "--data", "labelled training images: a folder or archive of classes, or CIFAR-10's own archive")
    parser.add_argument("--test", help="labelled held-out images, on which its accuracy is measured")
    parser.add_argument("--test-split", help="part of them (default: test if they are in --data, else train)")
    parser.add_argument("--output", required=True, help="file to write (.safetensors)")
    parser.add_argument("--epochs", type=int, default=6, help="passes through the images (default: 6)")
    parser.add_argument("--width", type=int, default=32, help="a quarter of the number of features (default: 32)")
    parser.add_argument("--no-flip", action="store_true", help="do not mirror images: for digits and letters")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    _add_device(parser)
    return parser


def _reference_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} reference",
        description="Measures images once; --reference FILE and SampleQuality(reference=FILE) then need them no more.",
    )
    _add_images(parser, "--data", "the images")
    _add_extractor(parser)
    parser.add_argument("--output", required=True, help="file to write (.safetensors)")
    return parser


def _add_images(parser: argparse.ArgumentParser, name: str, described: str) -> None:
    parser.add_argument(name, required=True, help=described)
    parser.add_argument("--split", default="train", help="part of the images (default: train)")
    parser.add_argument("--size", type=int, help="resize images to this height and width")
    parser.add_argument("--crop", help="centred square to cut out first, in pixels, or 'celeba'")
    parser.add_argument("--channels", choices=("RGB", "L"), default="RGB", help="colours, or L for grey")
    parser.add_argument("--limit", type=int, help="read so many images only")


def _add_extractor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features", default="inception", help="inception (default), classifier:FILE or package.module:Factory"
    )
    parser.add_argument("--inception-weights", help="file with Inception's weights, for places without a network")
    parser.add_argument("--cache-dir", help="where statistics of references are kept")
    parser.add_argument("--batch-size", type=int, default=256, help="images at once (default: 256)")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: what there is)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")


def chosen_device(name: str | None) -> torch.device:
    """The device of a name; without one, the accelerator that there is, or else the CPU.

    Raises:
        ValueError: If there is no such device.
    """
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # torch raises anything over a device that is not there
        raise ValueError(f"--device {name} cannot be used here ({error}). Use cpu.") from error
    return device


def read_reference(source: str, options: argparse.Namespace) -> Any:
    """Images, read as the options say, or the path of saved statistics."""
    if Path(source).suffix == ".safetensors":
        return source
    from lightning_earlybird.images import read_images

    crop = options.crop if options.crop is None or not options.crop.isdigit() else int(options.crop)
    return read_images(
        source,
        size=options.size,
        crop=crop,
        split=options.split,
        channels=options.channels,
        limit=options.limit,
        progress=not options.no_progress,
    )


def _evaluate(options: argparse.Namespace) -> None:
    evaluation = Evaluation.prepare(
        options.ensemble,
        dense=options.dense,
        denoiser=None if options.denoiser is None else imported("--denoiser", options.denoiser),
        scheduler=options.scheduler,
        spacing=options.spacing,
        num_inference_steps=options.steps,
        output=options.output,
        device=chosen_device(options.device),
    )
    classes = evaluation.count_classes(options.classes)
    extractor = load_features(options.features, options.inception_weights).to(evaluation.device)
    progress = not options.no_progress
    reference = reference_statistics(
        read_reference(options.reference, options),
        extractor,
        device=evaluation.device,
        batch_size=options.batch_size,
        cache_dir=options.cache_dir,
        progress=progress,
    )
    report = evaluation.run(
        extractor,
        reference,
        num_samples=options.samples,
        batch_size=options.batch_size,
        num_classes=classes,
        seed=options.seed,
        timing_images=options.timing_images,
        timing_repeats=options.timing_repeats,
        progress=progress,
    )
    sys.stdout.write(f"{report}\n")


def _train(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    images = read_reference(options.data, options)
    _check_labelled("--data", options.data, images.labels)
    held_out = None
    if options.test is not None:
        # Where there are no parts, everything is called train.
        split = options.test_split or ("test" if options.test == options.data else "train")
        test = read_reference(options.test, argparse.Namespace(**{**vars(options), "split": split}))
        _check_labelled("--test", options.test, test.labels)
        if test.class_names != images.class_names:
            raise ValueError(
                f"--test {options.test} must have the classes of --data {options.data}, since labels are numbers: it "
                f"has {_named(test.class_names)}, and --data has {_named(images.class_names)}. Give folders of the "
                "same names."
            )
        held_out = (test.images, test.labels)
    network = train_features(
        images.images,
        images.labels,
        epochs=options.epochs,
        seed=options.seed,
        width=options.width,
        flip=not options.no_flip,
        test=held_out,
        device=chosen_device(options.device),
        progress=not options.no_progress,
    )
    network.save(options.output)
    accuracy = "" if network.test_accuracy is None else f", test accuracy {network.test_accuracy:.1%}"
    sys.stdout.write(
        f"{network.num_features} features of {len(images.images)} images in {network.num_classes} classes{accuracy}, "
        f"{duration(time.perf_counter() - started)}: --features classifier:{options.output}\n"
    )


def _check_labelled(option: str, source: str, labels: Any) -> None:
    if labels is None:
        raise ValueError(
            f"{option} {source} has no classes: a classifier needs one folder a class, and at least two of them. "
            "Images that lie in a single folder, or below a single one, are of no class."
        )


def _named(classes: Sequence[str]) -> str:
    shown = ", ".join(map(repr, classes[:10]))
    return f"{shown}, ... ({len(classes)})" if len(classes) > 10 else shown or "none"


def _measure(options: argparse.Namespace) -> None:
    device = chosen_device(options.device)
    extractor = load_features(options.features, options.inception_weights).to(device)
    statistics = reference_statistics(
        read_reference(options.data, options),
        extractor,
        device=device,
        batch_size=options.batch_size,
        cache_dir=options.cache_dir,
        progress=not options.no_progress,
    )
    statistics.save(options.output)
    sys.stdout.write(
        f"{statistics.num_features} features of {statistics.count} images of shape {statistics.image_shape} "
        f"({statistics.source}): --reference {options.output}\n"
    )
