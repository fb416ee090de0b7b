"""A DiT on latents that were computed beforehand, class-conditional: one fit to three timestep-region tickets.

python examples/encode_latents.py --data IMAGES --vae stabilityai/sd-vae-ft-mse --output latents.safetensors
python examples/latent.py data.path=latents.safetensors
python examples/latent.py recipe=smoke data.path=latents.safetensors   # minutes on a CPU
"""

import sys

from shared.module import DiffusionModule, build_transformer
from shared.run import begin, laid_out, train
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
    train(config, module, data, output, checkpoint)


if __name__ == "__main__":
    main(sys.argv[1:])
