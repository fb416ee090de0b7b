"""Samples in the course of a fit: the same noise, averaged weights, dense and tickets, and a training that goes on."""

import copy
import re

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from matplotlib.image import imread
from modules import ConvNet, Lit, fit

from lightning_earlybird import EarlyBirdDetector, SampleLogger, TicketEnsembleSampler, TimestepAwarePruner
from lightning_earlybird.reporting.images import image_sheet, save_image

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:max_search_steps=. reached"),
]

REGIONS = [(0, 300, 0.25), (300, 1000, 0.5)]


def samples(tmp_path, **settings):
    settings = {"num_samples": 4, "every_n_train_steps": 2, "num_inference_steps": 3, "scheduler": DDPM()} | settings
    return SampleLogger(dirpath=tmp_path / "samples", **settings)


def DDPM():
    return DDPMScheduler(num_train_timesteps=1000)


def test_sheets_are_written_before_and_after_the_switch_and_training_is_what_it_was(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = []
    for with_samples in (False, True):
        pruner = TimestepAwarePruner(REGIONS, round_to=1, max_search_steps=3, dirpath=tmp_path / str(with_samples))
        # With dropout every number that is drawn, and every mode that is left changed, would show in the weights.
        module = Lit(lambda: ConvNet(dropout=0.3))
        callbacks = [EMAWeightAveraging(decay=0.5), pruner, *([samples(tmp_path)] if with_samples else [])]
        trainer = fit(module, *callbacks, max_steps=7)
        weights.append(copy.deepcopy(module.state_dict()))
    assert all(torch.equal(value, weights[0][key]) for key, value in weights[1].items())
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == [f"step_{step:07d}.png" for step in (2, 4, 6, 7)]
    # The last sheet, of the step at which the training ended, is what anybody draws from the same noise.
    images = TicketEnsembleSampler.from_trainer(trainer).sample(
        4, scheduler=DDPM(), num_inference_steps=3, generator=torch.Generator().manual_seed(0), progress=False
    )
    shown = torch.from_numpy(imread(files[-1])[..., :3] * 255).round().to(torch.uint8)
    assert torch.equal(shown, image_sheet(images))


def test_epochs_count_where_no_steps_are_given_and_the_modules_scheduler_is_taken(tmp_path) -> None:
    module = Lit()
    module.noise_scheduler = DDIMScheduler(num_train_timesteps=1000)
    callback = samples(tmp_path, every_n_train_steps=None, every_n_epochs=2, scheduler=None)
    fit(module, EarlyBirdDetector([0.5], round_to=1), callback, max_epochs=5, batches=2)
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == [
        "step_0000004.png",
        "step_0000008.png",
        "step_0000010.png",
    ]


def test_what_cannot_be_drawn_is_said_once_and_training_goes_on(tmp_path) -> None:
    callback = samples(tmp_path, decode=lambda images: images.expand(-1, 5, -1, -1))
    with pytest.warns(UserWarning, match=r"no samples can be drawn, .*\(4, 5, 4, 4\) cannot be shown") as caught:
        trainer = fit(Lit(), EarlyBirdDetector([0.5], round_to=1), callback, max_steps=6)
    assert trainer.global_step == 6
    assert sum("cannot be shown" in str(warning.message) for warning in caught) == 1


class Conditional(Lit):
    def __init__(self, **settings) -> None:
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
        small = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, **blocks}
        super().__init__(lambda: UNet2DModel(4, 1, 1, **small, **settings))
        self.sample_shape = (1, 4, 4)

    def loss(self, samples):
        steps = torch.randint(1000, (len(samples),))
        labels = {} if self.model.class_embedding is None else {"class_labels": steps % 2}
        return self.model(samples, steps, **labels).sample.square().mean()


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (2, [0, 9], r"class_labels=\[0, 9\] must lie in 0 to 1 \(num_class_embeds=2\)"),
        (2, -1, r"class_labels=-1 must lie in 0 to 1"),
        (2, None, "class_labels=None: the denoiser is class-conditional"),
        (None, 0, "class_labels=0: the denoiser takes no class labels"),
        (2, [0, 1], None),
    ],
)
def test_labels_that_the_denoiser_has_no_classes_for_are_said_and_training_goes_on(
    tmp_path, recwarn, classes, labels, message
) -> None:
    callback = samples(tmp_path, class_labels=labels, num_samples=2, every_n_train_steps=1, denoiser="model")
    trainer = fit(Conditional(num_class_embeds=classes), callback, max_steps=2)
    assert trainer.global_step == 2
    told = [str(each.message) for each in recwarn if "no samples can be drawn" in str(each.message)]
    assert len(told) == (message is not None)
    assert message is None or re.search(message, told[0])
    assert (tmp_path / "samples").exists() == (message is None)


def test_an_index_error_of_a_network_of_ones_own_does_not_end_the_fit(tmp_path) -> None:
    class Own(ConvNet):
        def forward(self, x, timesteps, class_labels=None):
            return super().forward(x, timesteps) * (1 if class_labels is None else torch.ones(2)[class_labels].sum())

    callback = samples(tmp_path, class_labels=9, every_n_train_steps=1)
    with pytest.warns(UserWarning, match="no samples can be drawn, .*index 9 is out of bounds"):
        trainer = fit(Lit(Own), EarlyBirdDetector([0.5], round_to=1), callback, max_steps=2)
    assert trainer.global_step == 2


def test_a_module_without_a_scheduler_needs_one(tmp_path) -> None:
    with pytest.raises(MisconfigurationException, match="scheduler=None, and Lit has no attribute that is a diffusers"):
        fit(Lit(), samples(tmp_path, scheduler=None), max_steps=1)


def test_labels_are_one_for_all_or_one_for_each() -> None:
    with pytest.raises(ValueError, match="class_labels has 3 entries for num_samples=4"):
        SampleLogger(4, class_labels=[0, 1, 2])


def test_a_sheet_has_every_image_in_its_place(tmp_path) -> None:
    images = torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 1, 40, 50)
    sheet = image_sheet(images)
    assert sheet.shape == (2 * 41 + 1, 2 * 51 + 1, 3)
    assert [int(sheet[top, left, 0]) for top, left in ((1, 1), (1, 52), (42, 1), (42, 52))] == [0, 128, 255, 255]
    assert image_sheet(torch.zeros(2, 3, 8, 8)).shape == (34, 67, 3)  # small ones are enlarged to 32 pixels
    save_image(sheet, tmp_path / "new" / "sheet.png")
    assert (imread(tmp_path / "new" / "sheet.png")[..., :3] * 255).round().tolist() == sheet.tolist()
