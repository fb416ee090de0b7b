"""CIFAR-10 by the paper's recipe: one fit from DDPM's U-Net to three timestep-region tickets.

python examples/cifar10.py                                             # examples/configs/cifar10.yaml: the paper's
python examples/cifar10.py recipe=smoke                                # minutes on a CPU
python examples/cifar10.py recipe=conditional                          # class-conditional
python examples/cifar10.py trainer.devices=3 pruner.overlap=20 data.path=cifar-10-python.tar.gz
python examples/cifar10.py resume=true                                 # goes on where it was stopped or killed
"""

import sys

from shared.module import DiffusionModule, build_unet
from shared.run import begin, laid_out, train
from shared.sampling import build_sampling
from shared.settings import CONFIGS, ImageSettings, read_settings
from shared.sources import image_data


def main(arguments: list[str], base: str) -> None:
    config = read_settings(CONFIGS / base, arguments, ImageSettings)
    output, checkpoint = begin(config)
    data = image_data(config.data)
    channels = data.train.images.shape[1]
    unet = build_unet(config.model, size=config.data.size, channels=channels, num_classes=data.num_classes)
    module = DiffusionModule(laid_out(unet, config.model), config.diffusion, config.optimizer)
    scheduler = module.sampling_scheduler(config.sampling)
    sampling = build_sampling(config, scheduler, data.train, num_classes=data.num_classes)
    train(config, module, data, output, checkpoint, sampling)


if __name__ == "__main__":
    main(sys.argv[1:], "cifar10.yaml")
