"""What is sampled in the course of a fit: pictures to look at, and images to measure."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor

from lightning_earlybird import SampleLogger
from lightning_earlybird.evaluation import SampleQuality
from shared.outputs import mistakes_told

Decode = Callable[[Tensor], Tensor]


def build_sampling(
    config: DictConfig,
    scheduler: Any,
    reference: Any,
    *,
    num_classes: int | None = None,
    decode: Decode | None = None,
) -> list[Callback]:
    """Callbacks that sample, as ``SamplingSettings`` and ``EvaluationSettings`` say.

    Args:
        config: ``Settings``.
        scheduler: A diffusers scheduler.
        reference: Images, or a path to some, that samples are compared with.
        num_classes: Of a class-conditional denoiser; None for any other.
        decode: Makes images of latents.
    """
    sampling, evaluation = config.sampling, config.evaluation
    callbacks: list[Callback] = []
    intervals = {name: sampling[name] for name in ("every_n_epochs", "every_n_train_steps") if sampling[name]}
    with mistakes_told():
        if intervals:
            labels = None if num_classes is None else [i % num_classes for i in range(sampling.num_samples)]
            callbacks.append(
                SampleLogger(
                    sampling.num_samples,
                    **intervals,
                    batch_size=sampling.batch_size,
                    scheduler=scheduler,
                    num_inference_steps=sampling.num_inference_steps,
                    seed=config.seed,
                    class_labels=labels,
                    decode=decode,
                )
            )
        if evaluation.num_samples:
            callbacks.append(
                SampleQuality(
                    evaluation.reference or reference,
                    num_samples=evaluation.num_samples,
                    scheduler=scheduler,
                    num_inference_steps=sampling.num_inference_steps,
                    batch_size=evaluation.batch_size,
                    every_n_epochs=evaluation.every_n_epochs,
                    features=evaluation.features,
                    inception_weights=evaluation.weights_path,
                    kid=evaluation.kid,
                    seed=config.seed,
                    class_labels=None if num_classes is None else "uniform",
                    num_classes=num_classes,
                    decode=decode,
                )
            )
    return callbacks
