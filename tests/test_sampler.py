import copy

import lightning as L
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_earlybird.budget import draw_mask
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.sampler import TicketEnsembleSampler
from lightning_earlybird.structure import attribute_edits, extract, trace_plan
from lightning_earlybird.tickets import EnsembleRecord, describe_denoiser

# Raised inside diffusers' schedulers against NumPy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    # Most tests here take fewer steps than anybody would; what is said of that is tested in test_visits.py.
    pytest.mark.filterwarnings("ignore:.* so that the ticket trained for it is never called:UserWarning"),
]

REGIONS = [(0, 240, 0.25), (240, 440, 0.5), (440, 1000, 0.5)]
FLAT = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}


def small_unet(**kwargs):
    torch.manual_seed(0)
    defaults = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    return UNet2DModel(**(defaults | {"block_out_channels": (8, 16)} | FLAT | kwargs))


class PlainNet(nn.Module):
    """Not a diffusers model: needs one timestep per sample, returns a bare tensor."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(1, 8, 3, padding=1)
        self.outer = nn.Conv2d(8, 1, 3, padding=1)
        self.calls = []

    def forward(self, x, t, guide=None):
        assert t.shape == (len(x),)
        self.calls.append((t, guide))
        return self.outer(torch.relu(self.inner(x))) * (1 + t.to(x.dtype) / 1000).reshape(-1, 1, 1, 1)


class ColumnNet(PlainNet):
    """Takes its timesteps as (B, 1), as networks that feed them to a linear layer do."""

    def forward(self, x, t):
        assert t.shape == (len(x), 1)
        return super().forward(x, t.flatten())


def sampler_of(dense, timesteps=TimestepArgument("timestep", 1), sample_shape=(1, 8, 8), regions=REGIONS, **kwargs):  # noqa: B008
    """Real tickets of a dense network, in a sampler with its record."""
    partition = TimestepPartition.of(regions)
    steps = torch.tensor([3, 4]).view(-1, *[1] * timesteps.trailing)
    plan = trace_plan(dense, (torch.randn(2, 1, 8, 8), steps), kwargs)
    scores = torch.rand(plan.num_channels, generator=torch.Generator().manual_seed(1))
    masks = tuple(draw_mask(plan, scores, region.sparsity, round_to=4) for region in partition)
    tickets = [extract(dense, plan, mask) for mask in masks]
    sampler = TicketEnsembleSampler(tickets, partition, timesteps).eval()
    edits = tuple(attribute_edits(dense, ticket) for ticket in tickets)
    sampler.record = EnsembleRecord(describe_denoiser(dense), edits, masks, (), sample_shape)
    return sampler


@pytest.fixture(scope="session")
def sampler():
    return sampler_of(small_unet())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def watch(sampler):
    """Lists (ticket, timestep) of every call to a copy of the sampler."""
    calls = []
    clone = copy.deepcopy(sampler)
    for number, ticket in enumerate(clone.tickets):
        ticket.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: calls.append((number, float(args[1].flatten()[0]))),
            with_kwargs=True,
        )
    return clone, calls


SCHEDULERS = [
    DDPMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    FlowMatchEulerDiscreteScheduler,
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: scheduler.__name__)
def test_any_scheduler_samples_and_each_step_uses_its_regions_ticket(sampler, scheduler):
    clone, calls = watch(sampler)
    scheduler = (
        scheduler(num_train_timesteps=1000) if scheduler is not FlowMatchEulerDiscreteScheduler else scheduler(999)
    )
    images = clone.sample(3, scheduler=scheduler, num_inference_steps=6, generator=seeded(), progress=False)
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.float32
    assert images.isfinite().all() and images.abs().max() <= 1
    assert len({number for number, _ in calls}) == 3
    for number, step in calls:
        assert clone.regions[number].start <= step < clone.regions[number].stop


@pytest.mark.parametrize("scheduler", SCHEDULERS[:-1], ids=lambda scheduler: scheduler.__name__)
def test_the_same_seed_gives_the_same_images_and_the_scheduler_is_not_changed(sampler, scheduler):
    scheduler = scheduler(num_train_timesteps=1000)
    before = copy.deepcopy(vars(scheduler))
    images = [
        sampler.sample(2, scheduler=scheduler, num_inference_steps=5, generator=seeded(seed), progress=False)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert str(vars(scheduler)) == str(before)


def test_the_sampler_equals_the_ddpm_pipeline(sampler):
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    pipeline = DDPMPipeline(unet=sampler, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=4, generator=seeded(), num_inference_steps=7, output_type="pt").images
    images = sampler.sample(4, scheduler=scheduler, num_inference_steps=7, generator=seeded(), progress=False)
    assert torch.equal(images / 2 + 0.5, expected)


def test_the_sampler_equals_the_ddim_pipeline(sampler):
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    pipeline = DDIMPipeline(unet=sampler, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=4, generator=seeded(), num_inference_steps=7, output_type="pt").images
    images = sampler.sample(4, scheduler=scheduler, num_inference_steps=7, generator=seeded(), progress=False)
    assert torch.equal(images / 2 + 0.5, expected)
    as_arrays = pipeline.to("cpu")(batch_size=1, num_inference_steps=2, output_type="np").images
    assert as_arrays.shape == (1, 8, 8, 1)


def test_one_ticket_for_all_of_time_samples_like_that_network_alone(sampler):
    dense = small_unet()
    alone = TicketEnsembleSampler([dense], TimestepPartition.whole(0.0), TimestepArgument("timestep", 1)).eval()
    pipeline = DDPMPipeline(unet=dense.eval(), scheduler=DDPMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=2, generator=seeded(), num_inference_steps=5, output_type="pt").images
    images = alone.sample(2, scheduler=pipeline.scheduler, num_inference_steps=5, generator=seeded(), progress=False)
    assert torch.equal(images / 2 + 0.5, expected)


def test_regions_that_no_step_visits_do_no_harm(sampler):
    clone, calls = watch(sampler)
    images = clone.sample(2, scheduler=DDIMScheduler(), num_inference_steps=2, generator=seeded(), progress=False)
    assert images.shape == (2, 1, 8, 8)
    assert {number for number, _ in calls} == {0, 2}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 50])
def test_batches_give_all_images(sampler, batch_size):
    scheduler = DPMSolverMultistepScheduler()
    images = sampler.sample(
        5, scheduler=scheduler, num_inference_steps=3, generator=seeded(), batch_size=batch_size, progress=False
    )
    assert images.shape == (5, 1, 8, 8)
    first = sampler.sample(
        min(5, batch_size), scheduler=scheduler, num_inference_steps=3, generator=seeded(), progress=False
    )
    assert torch.equal(images[:batch_size], first)


def test_a_batch_does_not_depend_on_the_one_before_it(sampler):
    """Multistep schedulers keep earlier predictions: each batch must start without those of the last."""
    generator = seeded()
    together = sampler.sample(
        4,
        scheduler=DPMSolverMultistepScheduler(),
        num_inference_steps=4,
        generator=generator,
        batch_size=2,
        progress=False,
    )
    generator = seeded()
    single = [
        sampler.sample(
            2, scheduler=DPMSolverMultistepScheduler(), num_inference_steps=4, generator=generator, progress=False
        )
        for _ in range(2)
    ]
    assert torch.equal(together, torch.cat(single))


def test_latents_are_not_clipped_when_told_so(sampler):
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    images, latents = (
        sampler.sample(4, scheduler=scheduler, num_inference_steps=4, generator=seeded(), progress=False, clip=clip)
        for clip in (True, False)
    )
    assert latents.abs().max() > 1
    torch.testing.assert_close(images, latents.clamp(-1, 1), rtol=0, atol=0)


def test_class_labels_reach_the_tickets_in_their_batches():
    sampler = sampler_of(small_unet(num_class_embeds=4), class_labels=torch.tensor([0, 1]))
    common = {"scheduler": DDIMScheduler(), "num_inference_steps": 3, "progress": False}
    labels = torch.tensor([0, 1, 2, 3])
    images = sampler.sample(4, class_labels=labels, generator=seeded(), **common)
    assert torch.equal(sampler.sample(4, class_labels=[0, 1, 2, 3], generator=seeded(), **common), images)
    swapped = sampler.sample(4, class_labels=labels.flip(0), generator=seeded(), **common)
    assert not torch.equal(swapped, images)
    constant = sampler.sample(4, class_labels=2, generator=seeded(), **common)
    torch.testing.assert_close(constant[2], images[2])
    split = sampler.sample(4, class_labels=labels, batch_size=3, generator=seeded(), **common)
    torch.testing.assert_close(split[:3], images[:3])
    with pytest.raises(ValueError, match=r"class_labels has 3 entries for num_images=4"):
        sampler.sample(4, class_labels=[1, 2, 3], **common)


def test_sampling_restores_every_modules_mode_and_takes_no_gradient():
    sampler = sampler_of(small_unet(dropout=0.5))
    common = {"scheduler": DDIMScheduler(), "num_inference_steps": 3, "progress": False}
    expected = sampler.sample(2, generator=seeded(), **common)
    sampler.train()
    sampler.tickets[1].eval()
    modes = [module.training for module in sampler.modules()]
    images = sampler.sample(2, generator=seeded(), **common)
    assert [module.training for module in sampler.modules()] == modes
    assert torch.equal(images, expected)
    assert not images.requires_grad
    with pytest.raises(ValueError, match="outside the time axis"):
        sampler.sample(2, scheduler=DDIMScheduler(num_train_timesteps=2000), num_inference_steps=3)
    assert [module.training for module in sampler.modules()] == modes


def test_samples_have_the_dtype_of_the_tickets(sampler):
    half = copy.deepcopy(sampler).to(torch.bfloat16)
    assert (half.dtype, half.device) == (torch.bfloat16, torch.device("cpu"))
    images = half.sample(2, scheduler=DDIMScheduler(), num_inference_steps=3, progress=False)
    assert images.dtype == torch.bfloat16


def test_the_progress_bar_names_phase_and_ticket(sampler, capsys):
    sampler.sample(4, scheduler=DDIMScheduler(), num_inference_steps=4, batch_size=2)
    shown = capsys.readouterr().err
    assert "sampling: ticket 1 of 3, region [0, 240)" in shown
    assert "8/8" in shown
    sampler.sample(2, scheduler=DDIMScheduler(), num_inference_steps=2, progress=False)
    assert capsys.readouterr().err == ""


def test_the_shape_comes_from_the_record_or_else_from_the_configuration():
    scheduler = {"scheduler": DDIMScheduler(), "num_inference_steps": 2, "progress": False}
    recorded = sampler_of(small_unet(sample_size=16))
    assert recorded.sample(1, **scheduler).shape == (1, 1, 8, 8)
    recorded.record = None
    assert recorded.sample(1, **scheduler).shape == (1, 1, 16, 16)
    oblong = sampler_of(small_unet(sample_size=(8, 16)), sample_shape=None)
    assert oblong.sample(1, **scheduler).shape == (1, 1, 8, 16)
    unknown = sampler_of(small_unet(sample_size=None), sample_shape=None)
    with pytest.raises(ValueError, match=r"record.sample_shape=None: the shape of a sample is neither recorded"):
        unknown.sample(1, **scheduler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images=0 must be an integer of at least 1"),
        ({"num_images": 1.5}, "num_images=1.5 must be an integer"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be an integer of at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        ({"batch_size": True}, "batch_size=True must be an integer"),
        ({"scheduler": DDIMScheduler(num_train_timesteps=4000)}, r"outside the time axis \[0, 1000\)"),
    ],
)
def test_impossible_arguments_are_refused(sampler, arguments, message):
    with pytest.raises(ValueError, match=message):
        sampler.sample(**({"num_images": 2, "scheduler": DDIMScheduler(), "progress": False} | arguments))


def test_something_else_in_place_of_a_scheduler_is_refused(sampler):
    with pytest.raises(TypeError, match=r"scheduler is a str without set_timesteps\(\); pass a diffusers scheduler"):
        sampler.sample(2, scheduler="ddim")


# --- networks that diffusers does not know


@pytest.mark.parametrize("where", [TimestepArgument("t", 1), TimestepArgument("t", None), TimestepArgument(None, 1)])
def test_a_plain_network_samples_with_one_timestep_per_sample(where):
    sampler = sampler_of(PlainNet(), where)
    guide = torch.arange(3)
    images = sampler.sample(
        3, scheduler=DDIMScheduler(), num_inference_steps=4, batch_size=2, progress=False, guide=guide
    )
    assert images.shape == (3, 1, 8, 8)
    calls = [call for ticket in sampler.tickets for call in ticket.calls]
    assert {tuple(got.tolist()) for _, got in calls if got is not None} == {(0, 1), (2,)}


def test_timesteps_may_come_first():
    class Reversed(PlainNet):
        def forward(self, t, x):
            return super().forward(x, t)

    sampler = TicketEnsembleSampler(
        [Reversed(), Reversed(), Reversed()], TimestepPartition.of(REGIONS), TimestepArgument("t", 0)
    )
    sampler.record = EnsembleRecord(None, ({}, {}, {}), sample_shape=(1, 8, 8))
    assert sampler.sample(2, scheduler=DDIMScheduler(), num_inference_steps=4, progress=False).shape == (2, 1, 8, 8)


def test_timesteps_that_cannot_be_passed_are_refused():
    sampler = sampler_of(PlainNet(), TimestepArgument(None, 2))
    with pytest.raises(ValueError, match=r"position=2.*give the timesteps a name"):
        sampler.sample(2, scheduler=DDIMScheduler(), progress=False)


def test_an_output_without_a_tensor_is_refused():
    sampler = sampler_of(PlainNet(), TimestepArgument("t", 1))
    for ticket in sampler.tickets:
        ticket.forward = lambda x, t: {"prediction": x}
    with pytest.raises(TypeError, match=r"tickets\[2\] returned a dict, expected a tensor"):
        sampler.sample(2, scheduler=DDIMScheduler(), progress=False)


def test_a_plain_network_is_saved_and_loaded_with_its_factory(tmp_path):
    sampler = sampler_of(PlainNet(), TimestepArgument("t", 1))
    sampler.save_pretrained(tmp_path / "e")
    with pytest.raises(ValueError, match=r"denoiser=None: .* pass denoiser="):
        TicketEnsembleSampler.from_pretrained(tmp_path / "e")
    loaded = TicketEnsembleSampler.from_pretrained(tmp_path / "e", denoiser=PlainNet)
    common = {"scheduler": DDIMScheduler(), "num_inference_steps": 4, "progress": False}
    assert torch.equal(loaded.sample(2, generator=seeded(), **common), sampler.sample(2, generator=seeded(), **common))


# --- saving and loading


def test_a_reloaded_sampler_gives_the_same_images(sampler, tmp_path):
    sampler.save_pretrained(tmp_path / "e")
    loaded = TicketEnsembleSampler.from_pretrained(tmp_path / "e")
    assert type(loaded) is TicketEnsembleSampler and not loaded.training
    common = {"scheduler": DDPMScheduler(), "num_inference_steps": 6, "progress": False}
    assert torch.equal(loaded.sample(2, generator=seeded(), **common), sampler.sample(2, generator=seeded(), **common))


def test_a_sampler_without_a_record_cannot_be_saved(sampler, tmp_path):
    bare = TicketEnsembleSampler(list(sampler.tickets), sampler.partition, sampler.timesteps)
    with pytest.raises(ValueError, match="record=None: this sampler does not know"):
        bare.save_pretrained(tmp_path / "e")


# --- from a trainer


class Digits(L.LightningModule):
    """A module whose denoiser has become an ensemble, as it is after the switch."""

    def __init__(self, sampler, count=1):
        super().__init__()
        self.model = TicketEnsemble(
            [copy.deepcopy(ticket) for ticket in sampler.tickets], sampler.partition, sampler.timesteps
        )
        self.model.record = sampler.record
        self.train()
        if count == 0:
            self.model = self.model.tickets[0]
        if count == 2:
            self.second = copy.deepcopy(self.model)

    def training_step(self, batch, batch_idx):
        steps = torch.randint(0, 1000, (len(batch),))
        return self.model(batch, steps).sample.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(module, callbacks=()):
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(8, 1, 8, 8), batch_size=4))
    return trainer


def test_a_sampler_from_a_trainer_has_copies_of_its_tickets(sampler):
    module = Digits(sampler)
    trainer = fitted(module)
    own = TicketEnsembleSampler.from_trainer(trainer)
    assert not own.training and module.model.training
    assert own.record.edits == module.model.record.edits
    for mine, trained in zip(own.parameters(), module.model.parameters(), strict=True):
        assert torch.equal(mine, trained)
        assert mine.data_ptr() != trained.data_ptr()
        assert mine.grad is None
    assert any(not torch.equal(a, b) for a, b in zip(own.parameters(), sampler.parameters(), strict=True))


def test_a_sampler_from_a_trainer_has_the_averaged_weights_where_there_are_such(sampler):
    module = Digits(sampler)
    averaging = EMAWeightAveraging(decay=0.5)
    trainer = fitted(module, [averaging])
    with torch.no_grad():
        module.model.tickets[0].conv_in.weight.zero_()
    own = TicketEnsembleSampler.from_trainer(trainer)
    expected = averaging._average_model.module.model
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), expected.parameters(), strict=True))
    assert own.tickets[0].conv_in.weight.abs().sum() > 0
    assert own.sample(1, scheduler=DDIMScheduler(), num_inference_steps=2, progress=False).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "holds 0 ticket ensembles, expected one; .* train longer"), (2, "holds 2 ticket ensembles, expected one")],
)
def test_a_trainer_without_one_ensemble_is_refused(sampler, count, message):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(Digits(sampler, count))
    with pytest.raises(RuntimeError, match=message):
        TicketEnsembleSampler.from_trainer(trainer)


def test_a_trainer_without_a_module_is_refused():
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match=r"no LightningModule yet; call trainer.fit"):
        TicketEnsembleSampler.from_trainer(trainer)


def test_timesteps_come_in_the_shape_of_training_also_after_a_round_trip(tmp_path):
    sampler = sampler_of(ColumnNet(), TimestepArgument("t", 1, trailing=1))
    settings = {"scheduler": DDIMScheduler(), "num_inference_steps": 4, "progress": False}
    images = sampler.sample(3, generator=torch.Generator().manual_seed(0), **settings)
    sampler.save_pretrained(tmp_path / "ensemble")
    again = TicketEnsembleSampler.from_pretrained(tmp_path / "ensemble", denoiser=ColumnNet)
    assert torch.equal(again.sample(3, generator=torch.Generator().manual_seed(0), **settings), images)
