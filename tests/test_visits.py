"""Routing goes by the timesteps that schedulers really pass; regions that none of them lies in are warned about."""

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from models import tiny_unet
from samplers import whole

from lightning_earlybird import TicketEnsembleSampler, TimestepPartition
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.records import EnsembleRecord

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
REGIONS = [(0, 240, 0.0), (240, 440, 0.0), (440, 1000, 0.0)]


class Listener(torch.nn.Module):
    """Keeps the timesteps that it is called with."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.1))
        self.heard = []

    def forward(self, sample, timestep):
        self.heard.append(timestep.flatten()[0].item())
        return sample * self.scale


def sampler(regions=REGIONS, **settings):
    partition = TimestepPartition.of(regions)
    tickets = [Listener() for _ in regions]
    made = TicketEnsembleSampler(tickets, partition, TimestepArgument("timestep", 1), **settings).eval()
    made.record = EnsembleRecord(None, tuple({} for _ in regions), sample_shape=(1, 2, 2))
    return made


def draw(ensemble, scheduler, steps):
    return ensemble.sample(1, scheduler=scheduler, num_inference_steps=steps, progress=False)


SCHEDULERS = {
    "DDIM leading": (DDIMScheduler, {}, 20),
    "DDIM trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}, 20),
    "DDIM linspace": (DDIMScheduler, {"timestep_spacing": "linspace"}, 20),
    "DDPM": (DDPMScheduler, {}, 20),
    "Euler, floats": (EulerDiscreteScheduler, {"timestep_spacing": "linspace", "interpolation_type": "linear"}, 17),
    "Euler, Karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}, 17),
    "Heun, twice each": (HeunDiscreteScheduler, {}, 12),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}, 20),
    "DPM-Solver++, Karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, 20),
    "UniPC": (UniPCMultistepScheduler, {}, 20),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}, 20),
    "LCM": (LCMScheduler, {}, 8),
    "flow": (FlowMatchEulerDiscreteScheduler, {}, 20),
    "flow, shifted": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, 20),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_step_goes_to_the_ticket_of_the_timestep_that_the_scheduler_passes(name):
    kind, settings, steps = SCHEDULERS[name]
    scheduler = kind(**settings)
    ensemble = sampler()
    visits = ensemble.visits(scheduler, steps)
    draw(ensemble, scheduler, steps)
    scheduler.set_timesteps(steps)
    passed = [float(timestep) for timestep in scheduler.timesteps]
    # By hand: half-open regions, but for the end of the time axis, where flows begin.
    owners = [0 if step < 240 else 1 if step < 440 else 2 for step in passed]
    for number, ticket in enumerate(ensemble.tickets):
        own = [step for step, owner in zip(passed, owners, strict=True) if owner == number]
        assert ticket.heard == pytest.approx(own, abs=1e-3)
        assert visits[number] == len(own) > 0
    assert sum(visits) == len(passed) >= steps


def test_shifted_flows_visit_the_regions_otherwise():
    plain, shifted = (sampler().visits(FlowMatchEulerDiscreteScheduler(shift=shift), 100) for shift in (1.0, 3.0))
    assert plain == (23, 20, 57) or sum(plain) == 100
    assert shifted[2] > plain[2] and shifted[0] < plain[0]


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (DDIMScheduler(), 2, r"DDIMScheduler with 2 steps from 500 down to 0, timestep_spacing='leading': none of them "
         r"lies in region 1 \[240, 440\), so that the ticket trained for it is never called"),
        (DDIMScheduler(), 1, r"lies in region 1 \[240, 440\), 2 \[440, 1000\), so"),
        (DDIMScheduler(timestep_spacing="trailing"), 3, r"from 999 down to 332, .*region 0 \[0, 240\)"),
        (FlowMatchEulerDiscreteScheduler(shift=30.0), 20, r"FlowMatchEulerDiscreteScheduler with 20 steps from 1000"),
    ],
)  # fmt: skip
def test_regions_that_are_never_visited_are_warned_about(scheduler, steps, message):
    ensemble = sampler()
    with pytest.warns(UserWarning, match=message):
        draw(ensemble, scheduler, steps)
    with pytest.warns(UserWarning, match=message):
        ensemble.check_scheduler(scheduler, steps)
    visits = ensemble.visits(scheduler, steps)  # which only counts
    assert 0 in visits and [len(ticket.heard) for ticket in ensemble.tickets] == list(visits)


def test_a_schedule_in_the_unit_interval_is_noticed_by_the_regions_that_it_does_not_reach():
    class Unit(DDIMScheduler):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.timesteps = self.timesteps / 1000

    with pytest.warns(UserWarning, match=r"from 0.95 down to 0, .*check that the scheduler's time unit is that of"):
        sampler().check_scheduler(Unit(), 20)


def test_a_schedule_beyond_the_regions_is_refused_and_named():
    flow = sampler([(0.0, 0.3, 0.0), (0.3, 1.0, 0.0)])
    message = (
        r"scheduler: FlowMatchEulerDiscreteScheduler passes timesteps from 1000 down to 1; timesteps hold 1000.0, "
        r"outside the time axis \[0.0, 1.0\) .* must be called in the same unit in training as by the scheduler"
    )
    for ask in (flow.visits, flow.check_scheduler, lambda *args: draw(flow, *args)):
        with pytest.raises(ValueError, match=message):
            ask(FlowMatchEulerDiscreteScheduler(), 20)
    with pytest.raises(ValueError, match=r"timesteps hold 1000.0, outside the time axis \[0.0, 1.0\)"):
        flow(torch.zeros(1, 1, 2, 2), torch.tensor(1000.0))  # as in a pipeline
    with pytest.raises(TypeError, match=r"scheduler is a str without set_timesteps"):
        flow.visits("ddim", 20)
    with pytest.raises(ValueError, match="num_inference_steps=0 must be an integer of at least 1"):
        flow.check_scheduler(DDIMScheduler(), 0)


# --- in pipelines, where the sampler sees one step at a time


def images(pipeline, scheduler, ensemble, steps):
    pipe = pipeline(unet=ensemble, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(batch_size=1, num_inference_steps=steps, output_type="pt").images


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return tiny_unet(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)).eval()


def test_a_pipeline_that_passes_over_a_region_is_warned_about_once(network):
    ensemble = whole(network, REGIONS)
    with pytest.warns(
        UserWarning, match=r"after a call in region 2 comes one in region 0: .*\['\[240, 440\)'\]"
    ) as got:
        images(DDIMPipeline, DDIMScheduler(), ensemble, 2)
    assert len(got) == 1
    images(DDIMPipeline, DDIMScheduler(), ensemble, 2)


def test_pipelines_that_visit_every_region_and_calls_out_of_order_are_not(network):
    ensemble = whole(network, REGIONS)
    images(DDPMPipeline, DDPMScheduler(), ensemble, 10)
    images(DDPMPipeline, DDPMScheduler(), ensemble, 10)
    sample = torch.zeros(2, 3, 8, 8)
    with torch.no_grad():
        ensemble(sample, torch.tensor([5, 900]))
        ensemble(sample, 5)
        ensemble(sample, 900)
        ensemble(sample, torch.tensor([5, 900]))
        ensemble(sample, 5)
    ensemble(sample, 900)
    ensemble(sample, 5)  # with gradients: nobody samples
    ensemble.train()
    with torch.no_grad():
        ensemble(sample, 900)
        ensemble(sample, 5)
