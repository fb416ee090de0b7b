"""CIFAR-10 by the paper's recipe: one fit from DDPM's U-Net to three timestep-region tickets.

python examples/cifar10.py                                             # examples/configs/cifar10.yaml: the paper's
python examples/cifar10.py recipe=smoke                                # minutes on a CPU
python examples/cifar10.py recipe=conditional                          # class-conditional
python examples/cifar10.py trainer.devices=3 pruner.overlap=20 data.path=cifar-10-python.tar.gz
python examples/cifar10.py resume=true                                 # goes on where it was stopped or killed
"""

import sys

import lightning as L
import torch
from shared.data import ImageDataModule
from shared.module import DiffusionModule, build_unet
from shared.outputs import prepare_output
from shared.run import train
from shared.settings import CONFIGS, ImageSettings, read_settings


def main(arguments: list[str], base: str = "cifar10.yaml") -> None:
    config = read_settings(CONFIGS / base, arguments, ImageSettings)
    output, checkpoint = prepare_output(config)
    L.seed_everything(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = ImageDataModule(config.data, output)
    unet = build_unet(config.model, size=config.data.size, channels=data.channels, num_classes=data.num_classes)
    if config.model.channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    if config.model.compile:
        unet = torch.compile(unet)
    train(config, DiffusionModule(unet, config.diffusion, config.optimizer), data, output, checkpoint)


if __name__ == "__main__":
    main(sys.argv[1:])
