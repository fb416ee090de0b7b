"""LightningModules of the examples: training and sampling mean the same, up to sign, scale and unit of time.

Where all images are the same one, the best denoiser is known in closed form. It has no loss, and sampling by it gives
that image.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from omegaconf import DictConfig
from safetensors.torch import save_file
from shared.data import LatentDataModule
from shared.latents import Decoder
from shared.module import DiffusionModule, FlowModule, build_transformer, build_unet
from shared.sampling import build_sampling
from shared.settings import CONFIGS, FlowImageSettings, ImageSettings, LatentImageSettings, merge_settings
from torch import Tensor, nn

from lightning_earlybird import TicketEnsembleSampler, TimestepPartition
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.records import EnsembleRecord

IMAGE = torch.linspace(-0.9, 0.7, 3 * 4 * 4).view(3, 4, 4)

SIGNAL = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)
"""Share of the signal in the variance at each timestep (arXiv 2006.11239, section 2), by its definition."""


class BestDenoiser(nn.Module):
    """Knows the one image there is.

    Args:
        image: That image.
        output: What it says of noisy images, given the image and the timesteps, shape (batch_size, 1, 1, 1).
    """

    def __init__(self, image: Tensor, output: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("image", image)
        self.weight = nn.Parameter(torch.zeros(()))
        self.output = output
        self.asked: list[float] = []

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        times = timestep.expand(len(sample)).view(-1, 1, 1, 1)
        self.asked += times.flatten().tolist()
        return SimpleNamespace(sample=self.output(sample, self.image, times) + self.weight)


def signal_and_noise(noisy: Tensor, image: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    signal = SIGNAL[times.long()].float()
    return signal.sqrt(), (1 - signal).sqrt(), (noisy - signal.sqrt() * image) / (1 - signal).sqrt()


def epsilon(noisy: Tensor, image: Tensor, times: Tensor) -> Tensor:
    return signal_and_noise(noisy, image, times)[2]


def velocity(noisy: Tensor, image: Tensor, times: Tensor) -> Tensor:
    signal, spread, noise = signal_and_noise(noisy, image, times)
    return signal * noise - spread * image


def clean(noisy: Tensor, image: Tensor, times: Tensor) -> Tensor:
    return image.expand_as(noisy)


def flow(noisy: Tensor, image: Tensor, times: Tensor) -> Tensor:
    return (noisy - image) / (times / 1000)


def loss_of(module: DiffusionModule, batch: tuple[Tensor, ...]) -> float:
    torch.manual_seed(0)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no Trainer
    return module.training_step(batch, 0).item()


def samples_of(
    module: DiffusionModule, config: DictConfig, partition: TimestepPartition, clip: bool = True
) -> tuple[Tensor, list[list[float]]]:
    """Samples, and the timesteps that each ticket was asked for."""
    tickets = [BestDenoiser(module.model.image, module.model.output) for _ in partition]
    sampler = TicketEnsembleSampler(tickets, partition, TimestepArgument("timestep", 1))
    sampler.record = EnsembleRecord(None, ({},) * len(tickets), sample_shape=tuple(IMAGE.shape))
    samples = sampler.sample(
        2,
        scheduler=module.sampling_scheduler(config.sampling),
        num_inference_steps=config.sampling.num_inference_steps,
        generator=torch.Generator().manual_seed(0),
        clip=clip,
        progress=False,
    )
    return samples, [ticket.asked for ticket in tickets]


@pytest.mark.parametrize("spacing", ["quadratic", "uniform"])
@pytest.mark.parametrize(
    ("prediction", "output"), [("epsilon", epsilon), ("v_prediction", velocity), ("sample", clean)]
)
def test_the_best_denoiser_of_a_diffusion_has_no_loss_and_samples_the_image(
    prediction: str, output: Callable[..., Tensor], spacing: str
) -> None:
    overrides = [f"diffusion.prediction={prediction}", f"sampling.spacing={spacing}"]
    config = merge_settings(CONFIGS / "cifar10.yaml", overrides, ImageSettings)
    module = DiffusionModule(BestDenoiser(IMAGE, output), config.diffusion, config.optimizer)
    assert loss_of(module, (IMAGE.expand(64, -1, -1, -1),)) < 1e-6
    samples, asked = samples_of(module, config, TimestepPartition.of(config.pruner.regions))
    assert torch.allclose(samples, IMAGE.expand_as(samples), atol=1e-4)
    assert all(asked)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
def test_the_best_denoiser_of_a_flow_has_no_loss_and_samples_the_image(density: str, shift: float) -> None:
    overrides = [f"flow.density={density}", f"flow.shift={shift}"]
    config = merge_settings(CONFIGS / "flow.yaml", overrides, FlowImageSettings)
    module = FlowModule(BestDenoiser(IMAGE, flow), config.flow, config.optimizer)
    assert loss_of(module, (IMAGE.expand(64, -1, -1, -1),)) < 1e-6
    samples, asked = samples_of(module, config, TimestepPartition.of(config.pruner.regions))
    assert torch.allclose(samples, IMAGE.expand_as(samples), atol=1e-4)
    # Pure noise, the end of the axis, is the last region's, although regions are half-open.
    assert max(asked[-1]) == 1000.0
    assert min(asked[0]) > 0.0  # no step starts at the image


def test_the_best_denoiser_of_latents_samples_what_decodes_to_the_image(tmp_path: Path) -> None:
    latents = 8 * IMAGE + 3  # far outside of [-1, 1], as those of Stable Diffusion's autoencoder
    facts = {"scaling_factor": "0.5", "shift_factor": "2.0", "class_names": '["a", "b"]'}
    file = tmp_path / "latents.safetensors"
    stored = {"latents": latents.expand(4, -1, -1, -1).contiguous(), "labels": torch.tensor([0, 1, 0, 1])}
    save_file(stored, file, metadata=facts)
    data = LatentDataModule(str(file), batch_size=4, labels=True)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    scaled = (latents - 2.0) * 0.5
    assert torch.equal(batch[0][0], scaled)

    config = merge_settings(CONFIGS / "latent.yaml", [], LatentImageSettings)
    module = DiffusionModule(BestDenoiser(scaled, epsilon), config.diffusion, config.optimizer)
    assert loss_of(module, batch) < 1e-6
    samples, _ = samples_of(module, config, TimestepPartition.of(config.pruner.regions), clip=False)
    assert torch.allclose(samples, scaled.expand_as(samples), atol=1e-3)

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(block_out_channels=(8,), latent_channels=3, norm_num_groups=4).eval()
    assert data.train is not None
    with torch.no_grad():
        expected = autoencoder.decode(latents[None]).sample.clamp(-1, 1)
    images = Decoder(autoencoder, data.train)(samples)
    assert torch.allclose(images, expected.expand_as(images), atol=1e-3)
    assert expected.std() > 0.05  # so that the comparison says something


@pytest.mark.parametrize(
    ("override", "size", "message"),
    [
        ("model.channels=[48,64]", 32, r"every width must be a multiple of model.norm_groups=32; change"),
        ("model.attention=[7]", 32, r"model.attention=\[7\]: .* have the sides \[32, 16, 8, 4\]; list some"),
        ("model.attention=[]", 30, r"halve images 3 times, and their side is 30; take a multiple of 8"),
    ],
)
def test_a_network_that_cannot_be_says_what_to_change(override: str, size: int, message: str) -> None:
    model = merge_settings(CONFIGS / "cifar10.yaml", [override], ImageSettings).model
    with pytest.raises(SystemExit, match=message):
        build_unet(model, size=size, channels=3)


def test_latents_that_do_not_fall_into_patches_are_refused() -> None:
    model = merge_settings(CONFIGS / "latent.yaml", [], LatentImageSettings).model
    with pytest.raises(SystemExit, match=r"model.patch_size=2: latents have the side 7, which must be a multiple"):
        build_transformer(model, size=7, channels=4, num_classes=2)


@pytest.mark.parametrize("override", ["sampling.num_samples=0", "evaluation.batch_size=0", "evaluation.num_samples=-1"])
def test_wrong_numbers_of_samples_end_with_a_sentence(override: str) -> None:
    config = merge_settings(CONFIGS / "cifar10.yaml", ["recipe=smoke", override], ImageSettings)
    with pytest.raises(SystemExit, match=override.partition(".")[2].replace("=", "=.*")):
        build_sampling(config, None, "images")
