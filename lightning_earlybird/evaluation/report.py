"""Everything that is measured of a saved model, as a table and as files."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_earlybird.class_labels import configured_classes, takes_labels
from lightning_earlybird.durable import settle, written_aside
from lightning_earlybird.evaluation.drawing import drawn, finite_uint8
from lightning_earlybird.evaluation.features import FeatureExtractor
from lightning_earlybird.evaluation.models import Factory, load_dense, load_model
from lightning_earlybird.evaluation.scores import QualityMeter, Scores, caution, metric_suffix
from lightning_earlybird.evaluation.statistics import KID_ROWS, FeatureStatistics
from lightning_earlybird.evaluation.timing import calls_per_region, sampling_seconds
from lightning_earlybird.files import EnsembleFormatError, is_plain_file, read_json
from lightning_earlybird.sampler import TicketEnsembleSampler
from lightning_earlybird.text import aligned

FORMAT = "lightning-earlybird evaluation"
REPORT_FILE = "evaluation.json"
GRID_FILES = {"tickets": "samples.png", "dense": "samples_dense.png"}
SHOWN = 64
"""Images in a grid of samples."""


@dataclass
class Evaluation:
    """A saved model and what it is sampled with.

    Args:
        source: Where it was read.
        samplers: ``"tickets"`` and ``"dense"``, one or both.
        trained: Names of those whose weights were trained; a dense network without weights is only timed.
        scheduler: A diffusers scheduler.
        num_inference_steps: Its steps.
        output: Directory of the report.
        device: Where everything runs.
    """

    source: str
    samplers: dict[str, TicketEnsembleSampler]
    trained: tuple[str, ...]
    scheduler: Any
    num_inference_steps: int
    output: Path
    device: torch.device

    @classmethod
    def prepare(
        cls,
        source: str | os.PathLike[str],
        *,
        dense: str | os.PathLike[str] | None = None,
        denoiser: Factory | None = None,
        scheduler: str | os.PathLike[str] | None = None,
        spacing: str = "quadratic",
        num_inference_steps: int = 100,
        output: str | os.PathLike[str] | None = None,
        device: torch.device | None = None,
    ) -> Evaluation:
        """Reads models and scheduler, and looks at the output directory, before anything is computed.

        Args:
            source: See :func:`~.models.load_model`.
            dense: Weights of the dense network: see :func:`~.models.load_dense`.
            denoiser: Builds the dense network, where it is not a diffusers model.
            scheduler: Directory of a diffusers scheduler, whose betas and kind of prediction are taken.
            spacing: ``"quadratic"`` or ``"uniform"``.
            num_inference_steps: Steps of the scheduler.
            output: Directory of the report; None puts it beside the model, with ``-evaluation`` added to its name.
            device: Where everything runs; None is the CPU.

        Raises:
            FileExistsError: If something else than a report is in the output directory.
            FileNotFoundError: If there is no such model.
            ValueError: If a model or the scheduler cannot be used.
        """
        path = Path(source)
        target = Path(output) if output is not None else path.parent / f"{path.stem}-evaluation"
        check_output(target)
        main, is_dense = load_model(path, denoiser)
        samplers = {"dense" if is_dense else "tickets": main}
        trained = ["dense" if is_dense else "tickets"]
        if is_dense and dense is not None:
            raise ValueError(
                f"dense={str(dense)!r}: {str(source)!r} is dense itself. Give the ensemble, and this beside it."
            )
        if not is_dense:
            beside = load_dense(dense, main, denoiser)
            if beside is not None:
                samplers["dense"] = beside
            if dense is not None:
                trained.append("dense")
        place = device if device is not None else torch.device("cpu")
        return cls(
            source=str(source),
            samplers={name: sampler.to(place).eval() for name, sampler in samplers.items()},
            trained=tuple(trained),
            scheduler=_scheduler(scheduler, spacing, main),
            num_inference_steps=num_inference_steps,
            output=target,
            device=place,
        )

    def count_classes(self, given: int | None) -> int | None:
        """How many classes samples are drawn of; None where the denoiser takes no labels.

        Args:
            given: As somebody wishes; None takes the number of the denoiser's configuration.

        Raises:
            ValueError: If the denoiser takes no labels, has fewer classes, or does not tell how many it has.
        """
        if given is not None and given < 1:
            raise ValueError(f"--classes {given} must be at least 1.")
        classes = given
        for name, sampler in self.samplers.items():
            network = sampler.tickets[0]
            labelled = takes_labels(network)
            told = configured_classes(network) if labelled else None
            if given is not None and labelled is False:
                raise ValueError(f"--classes {given}: the {name} network takes no class labels. Leave --classes out.")
            if given is not None and told is not None and given > told[1]:
                raise ValueError(
                    f"--classes {given} must be at most {told[1]}, the classes of the {name} network "
                    f"({told[0]}={told[1]}). Lower it."
                )
            if given is None and labelled:
                if told is None:
                    raise ValueError(
                        f"the {name} network is class-conditional, and its configuration does not tell the number of "
                        "classes. Pass --classes."
                    )
                classes = told[1] if classes is None else min(classes, told[1])
        return classes

    def run(
        self,
        extractor: FeatureExtractor,
        reference: FeatureStatistics,
        *,
        num_samples: int = 10_000,
        batch_size: int = 256,
        num_classes: int | None = None,
        seed: int = 0,
        kid_subsets: int = 100,
        timing_images: int = 16,
        timing_repeats: int = 3,
        progress: bool = True,
    ) -> str:
        """Samples, scores, times, and writes ``evaluation.json`` and grids of samples.

        Args:
            extractor: What images are compared by, on the device.
            reference: Of the images to compare with.
            num_samples: Samples of each trained model.
            batch_size: Samples drawn at once.
            num_classes: For class-conditional denoisers; None takes the number of the configuration.
            seed: Of the noise.
            kid_subsets: Subsets of KID.
            timing_images: Images of the batch that sampling is timed on.
            timing_repeats: How often, the models taking turns; 0 leaves it out.
            progress: Whether to show progress bars.

        Returns:
            A table.

        Raises:
            ValueError: If samples are not finite, or do not have the shape of the reference's images.
        """
        for name, value in (("samples", num_samples), ("batch_size", batch_size), ("steps", self.num_inference_steps)):
            if value < (2 if name == "samples" else 1):
                raise ValueError(f"{name}={value} must be at least {2 if name == 'samples' else 1}.")
        num_classes = self.count_classes(num_classes)
        suffix = metric_suffix(num_samples, extractor.label)
        scores: dict[str, Scores] = {}
        shown: dict[str, Tensor] = {}
        for name in self.trained:
            scores[name], shown[name] = self._score(
                name, extractor, reference, num_samples, batch_size, num_classes, seed, kid_subsets, progress
            )
        classes = None if num_classes is None else torch.arange(timing_images) % num_classes
        seconds = sampling_seconds(
            self.samplers, self.scheduler, self.num_inference_steps, timing_images, timing_repeats, classes
        )
        report = {
            "format": FORMAT,
            "format_version": 1,
            "model": self.source,
            "metrics": {name: _named(each, suffix) for name, each in scores.items()},
            "num_samples": num_samples,
            "caution": caution(num_samples, reference.count, reference.num_features),
            "features": {"identity": extractor.identity, "num_features": reference.num_features},
            "reference": {"source": reference.source, "count": reference.count},
            "scheduler": {"class": type(self.scheduler).__name__, "config": _plain(self.scheduler.config)},
            "num_inference_steps": self.num_inference_steps,
            "batch_size": batch_size,
            "seed": seed,
            "calls": calls_per_region(self.samplers[self.trained[0]], self.scheduler, self.num_inference_steps),
            "sampling": {
                "images": timing_images,
                "seconds": {name: statistics.median(each) for name, each in seconds.items()},
                "all_seconds": seconds,
                "dense_weights": "trained" if "dense" in self.trained else "random",
            },
            "machine": {
                "device": str(self.device),
                "name": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        }
        self._write(report, shown)
        return f"{self._table(report, suffix)}\nwritten to {str(self.output)!r}"

    def _score(
        self,
        name: str,
        extractor: FeatureExtractor,
        reference: FeatureStatistics,
        num_samples: int,
        batch_size: int,
        num_classes: int | None,
        seed: int,
        kid_subsets: int,
        progress: bool,
    ) -> tuple[Scores, Tensor]:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        meter = QualityMeter(
            reference,
            reference.num_features,
            kid_subsets=kid_subsets,
            kid_subset_size=min(1000, num_samples, len(reference.rows), KID_ROWS),
            device=self.device,
        )
        kept: list[Tensor] = []
        with tqdm(total=num_samples, desc=f"sampling: {name}", unit="image", disable=not progress) as bar:
            for images in drawn(
                self.samplers[name],
                range(num_samples),
                scheduler=self.scheduler,
                num_inference_steps=self.num_inference_steps,
                batch_size=batch_size,
                seed=seed,
                num_classes=num_classes,
            ):
                whole, broken = finite_uint8(images)
                if broken:
                    raise ValueError(
                        f"{broken} of {len(images)} samples of the {name} network hold NaN or infinity. Its training "
                        "has diverged, or the scheduler does not fit it (betas, prediction_type): --scheduler "
                        "DIRECTORY."
                    )
                if tuple(whole.shape[1:]) != tuple(reference.image_shape):
                    raise ValueError(
                        f"reference: its images have shape {tuple(reference.image_shape)}, and samples have "
                        f"{tuple(whole.shape[1:])} (channels, height, width). Read them with --size and --channels as "
                        "they were trained on."
                    )
                meter.add(extractor(whole))
                if sum(map(len, kept)) < SHOWN:
                    kept.append(whole.cpu())
                bar.update(len(images))
        return meter.compute(seed), torch.cat(kept)[:SHOWN]

    def _write(self, report: Mapping[str, Any], shown: Mapping[str, Tensor]) -> None:
        from PIL import Image

        from lightning_earlybird.images import grid_image

        check_output(self.output)
        with written_aside(self.output) as folder:
            for name, images in shown.items():
                Image.fromarray(grid_image(images).numpy()).save(folder / GRID_FILES[name])
            text = json.dumps(report, indent=1, allow_nan=False)
            (folder / REPORT_FILE).write_text(f"{text}\n", encoding="utf-8")

    def _table(self, report: Mapping[str, Any], suffix: str) -> str:
        names = list(self.samplers)
        metrics, sampling = report["metrics"], report["sampling"]
        rows = [
            [metric, *(f"{metrics[name][metric]:.4g}" if name in metrics else "-" for name in names)]
            for metric in metrics[self.trained[0]]
        ]
        if sampling["seconds"]:
            rows.append(
                [f"seconds for {sampling['images']} images", *(f"{sampling['seconds'][name]:.3g}" for name in names)]
            )
        rows += [
            [f"calls in {each['region']}", str(each["calls"]), *["" for _ in names[1:]]] for each in report["calls"]
        ]
        table = aligned(["", *names], rows, left={0})
        notes = [report["caution"]] if report["caution"] else []
        if "dense" in names and "dense" not in self.trained:
            notes.append("The dense network has random weights (--dense gives it some): it is only timed.")
        return "\n".join([table, *notes])


def check_output(directory: Path) -> None:
    """Makes sure that a report may be written to a directory.

    Raises:
        FileExistsError: If something is there that is neither an empty directory nor an earlier report.
    """
    settle(directory)
    if not directory.exists():
        return
    remedy = "choose another directory with --output, or remove what is there"
    if not directory.is_dir():
        raise FileExistsError(f"output={str(directory)!r} must be a directory, but a file is there; {remedy}.")
    present = {path.name for path in directory.iterdir()}
    if not present:
        return
    others = present - {REPORT_FILE, *GRID_FILES.values()}
    try:
        ours = not others and read_json(directory / REPORT_FILE)["format"].text() == FORMAT
    except EnsembleFormatError:
        ours = False
    if not ours or not all(is_plain_file(directory / name) for name in present):
        raise FileExistsError(
            f"output={str(directory)!r} must be new, empty, or hold an earlier evaluation to replace, and it holds "
            f"{', '.join(sorted(others or present)[:5])}; {remedy}."
        )


def _scheduler(directory: str | os.PathLike[str] | None, spacing: str, sampler: TicketEnsembleSampler) -> Any:
    """DDIM with a spacing, on the time axis of the regions; with the betas of a saved scheduler where there is one."""
    from lightning_earlybird.schedulers import SpacedDDIMScheduler

    if directory is None:
        stop = sampler.partition.stop
        length = int(stop) if math.isfinite(stop) and stop == int(stop) and stop > 1 else 1000
        return SpacedDDIMScheduler(length, spacing=spacing)
    try:
        config = SpacedDDIMScheduler.load_config(str(directory), local_files_only=True)
        if "beta_start" not in config:
            import diffusers

            # Flows have no betas, and steps of their own.
            return getattr(diffusers, config["_class_name"]).from_config(config)
        return SpacedDDIMScheduler.from_config(config, spacing=spacing)
    except (OSError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(
            f"scheduler={str(directory)!r} is not the directory of a diffusers scheduler ({error})."
        ) from error


def _named(scores: Scores, suffix: str) -> dict[str, float]:
    return {
        f"{name.removesuffix('_std')}_{suffix}{'_std' if name.endswith('_std') else ''}": value
        for name, value in asdict(scores).items()
        if value is not None
    }


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON can carry them, without diffusers' own notes."""
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    text = json.dumps(plain, default=str)
    read: dict[str, Any] = json.loads(text)
    return read
