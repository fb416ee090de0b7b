"""CelebA at 64x64: one fit from the dense U-Net to two timestep-region tickets.

python examples/celeba.py                                              # examples/configs/celeba.yaml
python examples/celeba.py recipe=smoke data.path=img_align_celeba.zip  # minutes on a CPU
python examples/celeba.py trainer.devices=2 data.path=img_align_celeba
python examples/celeba.py resume=true                                  # goes on where it was stopped or killed
"""

import sys

from cifar10 import main

if __name__ == "__main__":
    main(sys.argv[1:], "celeba.yaml")
