"""CelebA at 64x64: one fit from the dense U-Net to two timestep-region tickets.

python examples/celeba.py                                              # examples/configs/celeba.yaml
python examples/celeba.py recipe=smoke data.path=img_align_celeba.zip  # minutes on a CPU
python examples/celeba.py trainer.devices=2 data.path=img_align_celeba
python examples/celeba.py resume=true                                  # goes on where it was stopped or killed
"""

import sys

from shared.module import DiffusionModule, build_unet
from shared.run import begin, laid_out, train
from shared.sampling import build_sampling
from shared.settings import CONFIGS, ImageSettings, read_settings
from shared.sources import image_data


def main(arguments: list[str]) -> None:
    config = read_settings(CONFIGS / "celeba.yaml", arguments, ImageSettings)
    output, checkpoint = begin(config)
    data = image_data(config.data, output)
    channels = data.train.images.shape[1]
    unet = build_unet(config.model, size=config.data.size, channels=channels, num_classes=data.num_classes)
    module = DiffusionModule(laid_out(unet, config.model), config.diffusion, config.optimizer)
    scheduler = module.sampling_scheduler(config.sampling)
    sampling = build_sampling(config, scheduler, data.train, num_classes=data.num_classes)
    train(config, module, data, output, checkpoint, sampling)


if __name__ == "__main__":
    main(sys.argv[1:])
