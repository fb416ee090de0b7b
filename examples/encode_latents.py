"""Encodes images with a diffusers autoencoder, once, for training on latents.

    python examples/encode_latents.py --data IMAGES --vae stabilityai/sd-vae-ft-mse --output latents.safetensors
    python examples/encode_latents.py --data IMAGES --vae VAE --output latents/     # in parts; goes on where it stopped

IMAGES is whatever `lightning_earlybird.images.read_images` reads: a folder, an archive, a name on the hub. VAE is a
name on the hub or a folder: an AutoencoderKL, AutoencoderTiny or VQModel. What is written are the tensors ``latents``
(N, C, H, W), as the autoencoder gives them, and ``labels`` (N,) where there are classes; the metadata name the
autoencoder and the factors by which `LatentDataModule` scales them, and by which samples must be scaled back before
they are decoded.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from lightning import seed_everything
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from lightning_earlybird.durable import file_written_aside
from lightning_earlybird.evaluation.command import chosen_device
from lightning_earlybird.images import ImageDataError, ImageSet, read_images

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_autoencoder(name: str, subfolder: str | None, told_by: str = "encode_latents.py: --vae") -> nn.Module:
    """An autoencoder of whichever class its configuration names; ``told_by`` is what a user gave its name to."""
    part = " --subfolder=vae takes it out of a pipeline." if told_by.endswith("--vae") else ""
    place = {} if subfolder is None else {"subfolder": subfolder}
    try:
        config: Any = diffusers.AutoencoderKL.load_config(name, **place)
        kind = getattr(diffusers, config.get("_class_name", ""), None)
        if kind is None or not hasattr(kind, "encode"):
            sys.exit(
                f"{told_by}={name!r} is a {config.get('_class_name')}, which encodes no images; give an "
                f"AutoencoderKL, AutoencoderTiny or VQModel.{part}"
            )
        return kind.from_pretrained(name, **place).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        sys.exit(
            f"{told_by}={name!r} cannot be loaded ({str(error).strip().splitlines()[0]}). Give a folder that holds "
            "config.json and the weights, or a name on the hub; without a network only what is in the Hugging Face "
            f"cache is found.{part}"
        )


@torch.inference_mode()
def encode(autoencoder: nn.Module, images: Tensor, sample: bool) -> Tensor:
    """Latents of images of shape (N, C, H, W), uint8; of a distribution its mean, or a draw from it."""
    weights = next(autoencoder.parameters())
    pixels = images.to(weights.device).to(weights.dtype) / 127.5 - 1
    output = autoencoder.encode(pixels)
    if hasattr(output, "latent_dist"):
        return output.latent_dist.sample() if sample else output.latent_dist.mean
    return output.latents


def facts_of(autoencoder: Any, images: ImageSet, options: argparse.Namespace) -> dict[str, str]:
    """What the files say of themselves."""
    config = autoencoder.config
    return {
        # Who trains on the latents may do so from another directory.
        "autoencoder": str(Path(options.vae).resolve()) if Path(options.vae).is_dir() else options.vae,
        "autoencoder_subfolder": options.subfolder or "",
        "scaling_factor": str(float(getattr(config, "scaling_factor", None) or 1.0)),
        "shift_factor": str(float(getattr(config, "shift_factor", None) or 0.0)),
        "class_names": json.dumps(images.class_names),
        "source": images.source,
        "fingerprint": images.fingerprint,
        "posterior": options.posterior,
        "flips": json.dumps(options.flips),
        "dtype": options.dtype,
    }


def is_done(file: Path, facts: dict[str, str], count: int) -> bool:
    """Whether a part has been written with the same settings; a whole one, as parts appear whole or not at all."""
    if not file.exists():
        return False
    try:
        with safe_open(file, "pt") as opened:
            if opened.metadata() == facts and opened.get_slice("latents").get_shape()[0] == count:
                return True
    except (SafetensorError, OSError):
        pass
    print(f"{file} was written with other settings, or is damaged; it is encoded again.")
    return False


def write_part(
    file: Path, autoencoder: nn.Module, images: ImageSet, rows: range, facts: dict[str, str], options: Any, bar: tqdm
) -> None:
    """Encode some of the images into a file, followed by their mirror images where those are wanted."""
    encoded: list[Tensor] = []
    for mirrored in (False, True) if options.flips else (False,):
        for start in range(rows.start, rows.stop, options.batch_size):
            batch = images.images[start : min(start + options.batch_size, rows.stop)]
            batch = batch.flip(-1) if mirrored else batch
            encoded.append(encode(autoencoder, batch, options.posterior == "sample").to("cpu", DTYPES[options.dtype]))
            bar.update(len(batch))
    tensors = {"latents": torch.cat(encoded).contiguous()}
    if images.labels is not None:
        tensors["labels"] = images.labels[rows.start : rows.stop].repeat(2 if options.flips else 1)
    if not tensors["latents"].isfinite().all():
        sys.exit(
            f"encode_latents.py: some latents are not finite in {options.dtype}; use --dtype float32 or bfloat16, or "
            "look at the autoencoder."
        )
    with file_written_aside(file) as opened:
        opened.write(save(tensors, metadata=facts))


def read_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder, archive or hub name of the images")
    parser.add_argument("--vae", required=True, help="folder or hub name of the autoencoder")
    parser.add_argument("--subfolder", help="where the autoencoder is in it, as in a pipeline: vae")
    parser.add_argument("--output", required=True, type=Path, help="a .safetensors file, or a folder for parts")
    parser.add_argument("--size", type=int, help="side of the images in pixels")
    parser.add_argument("--crop", help="side of a centred square, left,top,right,bottom or celeba")
    parser.add_argument("--split", default="train")
    parser.add_argument("--limit", type=int, help="at most so many images")
    parser.add_argument("--cache-dir", help="where decoded images are kept")
    parser.add_argument("--flips", action="store_true", help="encode the mirror images, too")
    parser.add_argument("--posterior", choices=("mean", "sample"), default="mean", help="of an AutoencoderKL")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--part-size", type=int, default=10_000, help="images a part, where --output is a folder")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="of the latents on disk")
    parser.add_argument("--device", help="default: what there is")
    parser.add_argument("--seed", type=int, default=0, help="for --posterior sample")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "part_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.crop is not None and options.crop != "celeba":
        try:
            numbers = [int(number) for number in options.crop.split(",")]
        except ValueError:
            parser.error(f"--crop={options.crop}: expected a number, four numbers with commas between them, or celeba")
        options.crop = numbers[0] if len(numbers) == 1 else tuple(numbers)
    return options


def main(arguments: list[str]) -> None:
    options = read_options(arguments)
    seed_everything(options.seed, verbose=False)
    try:
        device = chosen_device(options.device)
        autoencoder = load_autoencoder(options.vae, options.subfolder).to(device)
        images = read_images(
            options.data,
            size=options.size,
            crop=options.crop,
            split=options.split,
            limit=options.limit,
            cache_dir=options.cache_dir,
        )
    except (ImageDataError, ValueError) as error:
        sys.exit(f"encode_latents.py: {error}")
    print(images.describe())
    facts = facts_of(autoencoder, images, options)
    single = options.output.suffix == ".safetensors"
    try:
        (options.output.parent if single else options.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"encode_latents.py: --output={str(options.output)!r} cannot be written to ({error}); give another.")
    if single:
        parts = {options.output: range(len(images))}
    else:
        starts = range(0, len(images), options.part_size)
        parts = {
            options.output / f"latents-{n + 1:05d}-of-{len(starts):05d}.safetensors": range(
                start, min(start + options.part_size, len(images))
            )
            for n, start in enumerate(starts)
        }
        for other in sorted(set(options.output.glob("*.safetensors")) - set(parts)):
            sys.exit(
                f"encode_latents.py: --output={str(options.output)!r} holds {other.name}, which is no part of these "
                "latents; give another folder, or remove what is in it."
            )
    times = 2 if options.flips else 1
    with tqdm(total=len(images) * times, desc="encoding", unit=" images") as bar:
        for file, rows in parts.items():
            if is_done(file, facts, len(rows) * times):
                bar.update(len(rows) * times)
            else:
                write_part(file, autoencoder, images, rows, facts, options, bar)
    with safe_open(next(iter(parts)), "pt") as opened:
        shape = opened.get_slice("latents").get_shape()[1:]
    print(f"{len(images) * times:,} latents of shape {tuple(shape)} are in {str(options.output)!r}.")


if __name__ == "__main__":
    main(sys.argv[1:])
