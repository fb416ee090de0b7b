"""Denoisers that users train, in real fits through the switch: conditional, latent, transformers, flow matching."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from modules import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zoo.diffusers_models import conditional_unet, dit, sd3

from lightning_earlybird import EarlyBirdDetector, TicketEnsembleSampler, TimestepAwarePruner

ROWS = 8


class Training(pl.LightningModule):
    """What the three have in common; ``data`` are tensors with one row per sample, the noisy samples' first."""

    scheduler: Any = DDIMScheduler()

    def __init__(self, model: nn.Module, *data: Tensor) -> None:
        super().__init__()
        self.model = model
        self.data = data

    def conditions(self, rest: list[Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        samples, *rest = batch
        noise = torch.randn_like(samples)
        steps = torch.randint(1000, (len(samples),))
        noisy = self.scheduler.add_noise(samples, noise, steps)
        prediction = self.model(noisy, timestep=steps, **self.conditions(rest)).sample
        return nn.functional.mse_loss(prediction[:, : noise.shape[1]], noise)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.data), batch_size=4)


class TextToLatent(Training):
    """A conditional U-Net on latents, as in latent diffusion."""

    def __init__(self) -> None:
        super().__init__(conditional_unet().network, torch.randn(ROWS, 4, 8, 8), torch.randn(ROWS, 5, 24))

    def conditions(self, rest: list[Tensor]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": rest[0]}


class ClassToLatent(Training):
    """A class-conditional DiT, which predicts a variance beside the noise."""

    def __init__(self) -> None:
        super().__init__(dit().network, torch.randn(ROWS, 4, 8, 8), torch.randint(10, (ROWS,)))

    def conditions(self, rest: list[Tensor]) -> dict[str, Tensor]:
        return {"class_labels": rest[0]}


class FlowMatching(Training):
    """A Stable Diffusion 3 transformer on a rectified flow, with times that are sigmas times 1000."""

    scheduler = FlowMatchEulerDiscreteScheduler()

    def __init__(self) -> None:
        super().__init__(sd3().network, torch.randn(ROWS, 4, 8, 8), torch.randn(ROWS, 5, 12), torch.randn(ROWS, 20))

    def conditions(self, rest: list[Tensor]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": rest[0], "pooled_projections": rest[1]}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        samples, *rest = batch
        noise = torch.randn_like(samples)
        sigmas = torch.rand(len(samples)).view(-1, 1, 1, 1)
        velocity = self.model(
            hidden_states=(1 - sigmas) * samples + sigmas * noise,
            timestep=1000 * sigmas.flatten(),
            **self.conditions(rest),
        ).sample
        return nn.functional.mse_loss(velocity, noise - samples)


@pytest.mark.parametrize("kind", [TextToLatent, ClassToLatent, FlowMatching])
@pytest.mark.parametrize(
    "settings",
    [
        {"target": "params"},
        {"target": "macs", "scope": "global", "heads": "whole", "norm": "exact"},
    ],
    ids=["by parameters", "by MACs, globally, whole heads, exact norms"],
)
def test_a_fit_goes_through_the_switch_and_its_ensemble_is_loaded_from_disk(
    kind: type[Training], settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = kind()
    pruner = TimestepAwarePruner([(0, 400, 0.3), (400, 1000, 0.6)], round_to=1, dirpath=tmp_path, **settings)
    detector = EarlyBirdDetector([0.3, 0.6], every_n_train_steps=1, window=2, threshold=1.0)
    trainer = quiet_trainer(detector, pruner, max_steps=6)

    trainer.fit(module)

    assert pruner.switched_at == 2
    for fact in pruner.facts:
        achieved = fact.achieved_parameters if settings["target"] == "params" else fact.achieved_macs
        assert achieved == pytest.approx(fact.region.sparsity, rel=0.01)
    here = TicketEnsembleSampler.from_trainer(trainer)
    there = TicketEnsembleSampler.from_pretrained(tmp_path / "ensemble")
    conditions = module.conditions([tensor[:3] for tensor in module.data[1:]])
    steps = torch.tensor([10, 500, 900]) if kind is not FlowMatching else torch.tensor([10.0, 500.0, 900.0])
    with torch.no_grad():
        expected = here(module.data[0][:3], timestep=steps, **conditions).sample
        assert torch.equal(there(module.data[0][:3], timestep=steps, **conditions).sample, expected)
    if kind is not ClassToLatent:  # DDIM takes no variance
        images = there.sample(3, scheduler=module.scheduler, num_inference_steps=4, progress=False, **conditions)
        assert images.shape == (3, 4, 8, 8) and images.isfinite().all()
