"""A DiT on latents that were computed beforehand, class-conditional: one fit to three timestep-region tickets.

python examples/encode_latents.py --data IMAGES --vae stabilityai/sd-vae-ft-mse --output latents.safetensors
python examples/latent.py data.path=latents.safetensors
python examples/latent.py recipe=smoke data.path=latents.safetensors   # minutes on a CPU
"""

import sys

from encode_latents import load_autoencoder
from shared.latents import Decoder
from shared.module import DiffusionModule, build_transformer
from shared.run import begin, laid_out, train
from shared.sampling import build_sampling
from shared.settings import CONFIGS, LatentImageSettings, read_settings
from shared.sources import latent_data


def main(arguments: list[str]) -> None:
    config = read_settings(CONFIGS / "latent.yaml", arguments, LatentImageSettings)
    output, checkpoint = begin(config)
    data = latent_data(config.data)
    _, channels, size, _ = data.train.samples.shape
    classes = data.num_classes or 1
    transformer = build_transformer(config.model, size=size, channels=channels, num_classes=classes)
    module = DiffusionModule(
        laid_out(transformer, config.model), config.diffusion, config.optimizer, one_class=data.num_classes is None
    )
    scheduler = module.sampling_scheduler(config.sampling)
    place = data.autoencoder if config.vae is None else (config.vae, None)
    if place is None:
        sys.exit(f"latent.py: {config.data.path} does not name its autoencoder; give vae=NAME_OR_FOLDER.")
    decode = Decoder(load_autoencoder(*place, "latent.py: vae"), data.train)
    # A network without classes is told class 0 of one, in training and in sampling.
    sampling = build_sampling(config, scheduler, config.evaluation.reference, num_classes=classes, decode=decode)
    train(config, module, data, output, checkpoint, sampling)


if __name__ == "__main__":
    main(sys.argv[1:])
