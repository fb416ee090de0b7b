"""Denoising loss of several models, region by region, on the same images, timesteps and noise.

    python benchmarks/region_losses.py --data test.zip --regions 0 240 440 1000 runs/a/ensemble runs/b/dense b.ckpt

A model is a saved ensemble, a diffusers model, or a checkpoint with tickets (averaged weights where it has such). The
loss is that of DDPM: the mean squared error of the predicted noise, with linear betas from 1e-4 to 0.02, of one draw of
timestep and noise for each image and region. Beside each mean stands the standard error of the difference to the first
model, over the same draws.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from lightning_earlybird import TicketEnsembleSampler
from lightning_earlybird.images import read_images


def load(path: Path) -> nn.Module:
    if path.is_file():
        return TicketEnsembleSampler.from_checkpoint(path)
    if (path / "ensemble.json").exists():
        return TicketEnsembleSampler.from_pretrained(path)
    return UNet2DModel.from_pretrained(path).eval()


@torch.inference_mode()
def losses(model: nn.Module, images: Tensor, start: int, stop: int, seed: int, batch_size: int) -> Tensor:
    """Loss of each image in a region, shape (N,)."""
    generator = torch.Generator().manual_seed(seed)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    timesteps = torch.randint(start, stop, (len(images),), generator=generator)
    found = []
    for first in range(0, len(images), batch_size):
        part, steps = images[first : first + batch_size], timesteps[first : first + batch_size]
        noise = torch.randn(part.shape, generator=generator)
        prediction = model(scheduler.add_noise(part, noise, steps), steps).sample
        found.append((prediction - noise).square().flatten(1).mean(1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--data", required=True, help="images that were not trained on")
    parser.add_argument("--split", default="train", help="of the data: an archive without splits is one")
    parser.add_argument("--regions", nargs="+", type=int, default=[0, 240, 440, 1000], help="their bounds")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = read_images(options.data, split=options.split, limit=options.images)
    images = data.images.float() / 127.5 - 1
    regions = list(zip(options.regions[:-1], options.regions[1:], strict=True))
    width = max(len(str(path)) for path in options.models)
    print(f"{len(images)} images of {data.source}, seed {options.seed}")
    print(f"{'model':<{width}}" + "".join(f"{f'[{a}, {b})':>24}" for a, b in regions) + f"{'seconds':>9}")
    first: list[Tensor] = []
    for path in options.models:
        started = time.perf_counter()
        model = load(path)
        found = [losses(model, images, a, b, options.seed + a, options.batch_size) for a, b in regions]
        first = first or found
        cells = [
            f"{each.mean():>13.5f} ({(each - base).std() / len(each) ** 0.5:.5f})"
            for each, base in zip(found, first, strict=True)
        ]
        print(
            f"{path!s:<{width}}" + "".join(f"{cell:>24}" for cell in cells) + f"{time.perf_counter() - started:>9.0f}"
        )


if __name__ == "__main__":
    main()
