"""Flow matching in continuous time: regions of real numbers, from data at 0 to noise at 1000.

python examples/flow.py                                                # examples/configs/flow.yaml
python examples/flow.py recipe=smoke data.path=cifar-10-python.tar.gz  # minutes on a CPU
python examples/flow.py flow.density=uniform pruner.overlap=50
"""

import sys

from shared.module import FlowModule, build_unet
from shared.run import begin, laid_out, train
from shared.sampling import build_sampling
from shared.settings import CONFIGS, FlowImageSettings, read_settings
from shared.sources import image_data


def main(arguments: list[str]) -> None:
    config = read_settings(CONFIGS / "flow.yaml", arguments, FlowImageSettings)
    output, checkpoint = begin(config)
    data = image_data(config.data)
    channels = data.train.images.shape[1]
    unet = build_unet(config.model, size=config.data.size, channels=channels, num_classes=data.num_classes)
    module = FlowModule(laid_out(unet, config.model), config.flow, config.optimizer)
    scheduler = module.sampling_scheduler(config.sampling)
    sampling = build_sampling(config, scheduler, data.train, num_classes=data.num_classes)
    train(config, module, data, output, checkpoint, sampling)


if __name__ == "__main__":
    main(sys.argv[1:])
