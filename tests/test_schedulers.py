import copy
import importlib
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

import lightning_earlybird
from lightning_earlybird import SpacedDDIMScheduler, TicketEnsembleSampler, TimestepPartition
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.schedulers import quadratic_timesteps

# Raised inside diffusers' schedulers against NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(
        8, 1, 1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, add_attention=False, **blocks
    )


def run(scheduler, steps, denoise, **step_kwargs):
    """All steps from fixed noise, in float64, with a denoiser that is a function of sample and timestep."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.as_tensor(scheduler.final_alpha_cumprod).double()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64) * 1.5
    trace = []
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, int(t)), t, x, generator=generator, **step_kwargs).prev_sample
        trace.append(x)
    return trace


def by_hand(scheduler, steps, denoise, *, kind, bound=None, eta=0.0):
    """Equation 12 of arXiv 2010.02502 with sigma of equation 16, written from the paper."""
    abar = {t: float(a) for t, a in enumerate(scheduler.alphas_cumprod.double())}
    abar[-1] = float(scheduler.final_alpha_cumprod)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64) * 1.5
    trace = []
    for t, s in zip(steps, [*steps[1:], -1], strict=True):
        output = denoise(x, t)
        if kind == "epsilon":
            eps = output
            x0 = (x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5
        elif kind == "sample":
            x0 = output
            eps = (x - abar[t] ** 0.5 * x0) / (1 - abar[t]) ** 0.5
        else:
            x0 = abar[t] ** 0.5 * x - (1 - abar[t]) ** 0.5 * output
            eps = abar[t] ** 0.5 * output + (1 - abar[t]) ** 0.5 * x
        if bound is not None:
            x0 = x0.clamp(-bound, bound)
        sigma = eta * ((1 - abar[s]) / (1 - abar[t])) ** 0.5 * (1 - abar[t] / abar[s]) ** 0.5
        x = abar[s] ** 0.5 * x0 + (1 - abar[s] - sigma**2) ** 0.5 * eps
        if eta > 0:
            x = x + sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        trace.append(x)
    return trace


def wavy(x, t):
    return torch.sin(x * 2 + t / 100) + x / 3


def test_quadratic_timesteps_are_the_papers_55_19_and_26_calls() -> None:
    steps = quadratic_timesteps(100, 1000)
    assert [sum(a <= t < b for t in steps) for a, b in ((0, 240), (240, 440), (440, 1000))] == [55, 19, 26]
    assert steps[-1] == 800
    assert len(set(steps)) == 100
    uniform = SpacedDDIMScheduler(spacing="uniform")
    uniform.set_timesteps(100)
    assert [int(((a <= uniform.timesteps) & (uniform.timesteps < b)).sum()) for a, b in ((0, 240), (240, 440))] == [
        24,
        20,
    ]


def test_quadratic_timesteps_are_those_of_the_ddim_code_but_for_its_repetitions() -> None:
    for steps in (10, 20, 50, 100):
        theirs = [i * i * 800 // (steps - 1) ** 2 for i in range(steps)]
        ours = quadratic_timesteps(steps, 1000)
        assert all(mine == other for mine, other in zip(ours, theirs, strict=True) if other > 12)
        assert all(mine <= 13 for mine, other in zip(ours, theirs, strict=True) if other <= 12)


@pytest.mark.parametrize("spacing", ["quadratic", "uniform"])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_distinct_descending_and_on_the_axis_for_every_number_of_steps(spacing: str, offset: int) -> None:
    for length in (1, 2, 5, 30):
        for count in range(1, length + 1):
            if spacing == "uniform" and offset and count == length:
                continue  # diffusers' own goes beyond the axis there
            scheduler = SpacedDDIMScheduler(length, spacing=spacing, steps_offset=offset)
            scheduler.set_timesteps(count)
            steps = scheduler.timesteps.tolist()
            assert len(steps) == len(set(steps)) == count
            assert steps == sorted(steps, reverse=True)
            assert 0 <= steps[-1] <= steps[0] < length


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("bound", [None, 0.8])
@pytest.mark.parametrize("last", [True, False])
def test_each_step_is_that_of_the_paper_to_the_timestep_that_comes_next(kind, eta, bound, last) -> None:
    scheduler = SpacedDDIMScheduler(
        prediction_type=kind, clip_sample=bound is not None, clip_sample_range=bound or 1.0, set_alpha_to_one=last
    )
    trace = run(scheduler, 12, wavy, eta=eta)
    expected = by_hand(scheduler, quadratic_timesteps(12, 1000)[::-1], wavy, kind=kind, bound=bound, eta=eta)
    for ours, theirs in zip(trace, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("settings", [{}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 1.5}])
@pytest.mark.parametrize("step_kwargs", [{}, {"eta": 0.5}, {"use_clipped_model_output": True}])
def test_where_timesteps_are_even_it_does_what_diffusers_ddim_does(kind, settings, step_kwargs) -> None:
    theirs = run(DDIMScheduler(prediction_type=kind, **settings), 20, wavy, **step_kwargs)
    ours = run(SpacedDDIMScheduler(spacing="uniform", prediction_type=kind, **settings), 20, wavy, **step_kwargs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_diffusers_ddim_given_quadratic_timesteps_leaves_samples_at_other_noise_levels_than_it_says() -> None:
    # The reason for the class. A denoiser that knows the image sees its own noise again after a step if and only if the
    # step went to the timestep that comes next.
    ours, theirs = SpacedDDIMScheduler(clip_sample=False), DDIMScheduler(clip_sample=False)
    image, noise = 0.3, 1.7
    levels = ours.alphas_cumprod.double()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        scheduler.timesteps = torch.tensor(quadratic_timesteps(10, 1000)[::-1])
        first, second = scheduler.timesteps[:2].tolist()
        x = levels[first].sqrt() * image + (1 - levels[first]).sqrt() * torch.full((1, 1, 1, 1), noise)
        x = scheduler.step(torch.full_like(x, noise), first, x).prev_sample
        seen = (x - levels[second].sqrt() * image) / (1 - levels[second]).sqrt()
        assert (abs(float(seen) - noise) < 1e-5) == (scheduler is ours)


def test_a_timestep_between_two_goes_to_the_next_one_below() -> None:
    scheduler = SpacedDDIMScheduler()
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [800, 450, 200, 50, 0]
    assert [scheduler.previous_timestep(t) for t in (800, 799, 450, torch.tensor(201), 50, 0)] == [
        450,
        450,
        200,
        200,
        0,
        -1,
    ]


def test_it_samples_in_the_sampler_and_in_pipelines() -> None:
    unet = tiny_unet()
    sampler = TicketEnsembleSampler([unet], TimestepPartition.whole(0.0), TimestepArgument("timestep", 1))
    scheduler = SpacedDDIMScheduler()
    drawn = sampler.sample(
        2, scheduler=scheduler, num_inference_steps=6, generator=torch.Generator().manual_seed(0), progress=False
    )

    def piped(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            batch_size=2, num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    torch.testing.assert_close(piped(DDPMPipeline(unet, scheduler)), drawn, rtol=1e-5, atol=1e-5)
    ddim = DDIMPipeline(unet, scheduler)
    assert type(ddim.scheduler) is DDIMScheduler  # diffusers' doing, and said in the documentation
    ddim.scheduler = SpacedDDIMScheduler.from_config(ddim.scheduler.config)
    assert ddim.scheduler.config.spacing == "quadratic"
    torch.testing.assert_close(piped(ddim), drawn, rtol=1e-5, atol=1e-5)


def test_a_pipeline_with_it_is_saved_and_loaded_by_whoever_has_imported_the_package(tmp_path) -> None:
    scheduler = SpacedDDIMScheduler(
        num_train_timesteps=500, spacing="uniform", clip_sample=False, prediction_type="v_prediction"
    )
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    assert '"lightning_earlybird",\n    "SpacedDDIMScheduler"' in (tmp_path / "model_index.json").read_text()
    code = (
        "import lightning_earlybird, sys; from diffusers import DiffusionPipeline;"
        f"pipeline = DiffusionPipeline.from_pretrained({str(tmp_path)!r});"
        "config = pipeline.scheduler.config;"
        "print(type(pipeline.scheduler).__name__, config.spacing, config.num_train_timesteps, config.clip_sample)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["SpacedDDIMScheduler", "uniform", "500", "False"]


def test_its_configuration_comes_from_other_schedulers_and_goes_back() -> None:
    ddpm = DDPMScheduler(num_train_timesteps=400, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    spaced = SpacedDDIMScheduler.from_config(ddpm.config)
    assert spaced.config.spacing == "quadratic"
    assert torch.equal(spaced.alphas_cumprod, ddpm.alphas_cumprod)
    assert SpacedDDIMScheduler.from_config(spaced.config, spacing="uniform").config.prediction_type == "v_prediction"
    assert torch.equal(DDIMScheduler.from_config(spaced.config).alphas_cumprod, ddpm.alphas_cumprod)


def test_the_package_gives_it_without_importing_diffusers_by_itself() -> None:
    assert (
        lightning_earlybird.SpacedDDIMScheduler
        is importlib.import_module("lightning_earlybird.schedulers").SpacedDDIMScheduler
    )
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lightning_earlybird.Nothing  # noqa: B018


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="spacing='cubic' must be 'quadratic' or 'uniform'"):
        SpacedDDIMScheduler(spacing="cubic")
    scheduler = SpacedDDIMScheduler(10)
    for steps in (0, 11):
        with pytest.raises(
            ValueError, match=f"num_inference_steps={steps} must lie between 1 and num_train_timesteps=10"
        ):
            scheduler.set_timesteps(steps)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(x, 5, x)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="variance_noise and generator both give the noise"):
        scheduler.step(x, 8, x, generator=torch.Generator(), variance_noise=x)
    scheduler = SpacedDDIMScheduler(10, prediction_type="velocity")
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="prediction_type='velocity' must be"):
        scheduler.step(x, 8, x)
