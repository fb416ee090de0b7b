"""diffusers pipelines with an ensemble as `unet` or `transformer`: what they make is what a loop by hand makes."""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    VQModel,
)
from models import Denoiser, tiny_unet
from samplers import REGIONS, cut, seeded, watch, whole
from zoo import member

from lightning_earlybird.ensemble import TimestepArgument

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def tiny_vae(**settings):
    torch.manual_seed(5)
    common = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**common, **settings).eval()


def unet(channels=3):
    torch.manual_seed(0)
    network = tiny_unet(in_channels=channels, out_channels=channels)
    return Denoiser(network, (torch.randn(2, channels, 8, 8), torch.tensor([5, 900])), {})


def dit():
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000, norm_num_groups=8,
    )  # fmt: skip
    labels = {"class_labels": torch.tensor([3, 1])}
    return Denoiser(network, (torch.randn(2, 4, 8, 8), torch.tensor([5, 900])), labels)


def silent(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ticket_at(sampler, timestep):
    """By hand, without anything of ours."""
    return next(t for t, (start, stop, _) in zip(sampler.tickets, REGIONS, strict=True) if start <= timestep < stop)


# --- pixels


@pytest.mark.parametrize(
    ("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler), (DDPMPipeline, None)]
)
@torch.no_grad()
def test_pixel_pipelines_call_the_tickets_as_a_loop_by_hand_does(pipeline, scheduler):
    scheduler = FlowMatchEulerDiscreteScheduler(999) if scheduler is None else scheduler(num_train_timesteps=1000)
    sampler, calls = watch(cut(unet()))
    pipe = silent(pipeline(unet=sampler, scheduler=copy.deepcopy(scheduler)))
    made = pipe(batch_size=3, generator=seeded(), num_inference_steps=8, output_type="pt").images
    assert {number for number, _ in calls} == {0, 1, 2}

    sample = torch.randn(3, 3, 8, 8, generator=(generator := seeded()))
    scheduler.set_timesteps(8)
    for timestep in scheduler.timesteps:
        noise = ticket_at(sampler, timestep)(sample, timestep).sample
        arguments = {"generator": generator} if pipeline is DDPMPipeline else {}
        sample = scheduler.step(noise, timestep, sample, **arguments).prev_sample
    assert torch.equal(made, (sample / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("pipeline", [DDPMPipeline, DDIMPipeline])
def test_tickets_that_are_all_the_dense_network_make_its_images(pipeline):
    dense = unet().network.eval()
    images = [
        silent(pipeline(unet=network, scheduler=DDIMScheduler()))(
            batch_size=2, generator=seeded(), num_inference_steps=7, output_type="pt"
        ).images
        for network in (dense, whole(dense))
    ]
    assert torch.equal(*images)


def test_pipelines_read_the_networks_attributes():
    sampler = cut(unet())
    pipe = DDPMPipeline(unet=sampler, scheduler=DDPMScheduler())
    assert pipe.unet is sampler and pipe.components["unet"] is sampler
    assert pipe.config["unet"] == ("lightning_earlybird", "TicketEnsembleSampler")
    assert sampler.config.in_channels == 3 and sampler.config.sample_size == 8
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    assert pipe.to(torch.bfloat16) is pipe
    assert (sampler.dtype, pipe.dtype) == (torch.bfloat16, torch.bfloat16)
    other = cut(unet())
    pipe.register_modules(unet=other)
    assert pipe.unet is other
    with pytest.raises(AttributeError, match=r"no attribute 'conv_in': the denoiser has become 3 tickets"):
        _ = sampler.conv_in
    with pytest.raises(AttributeError, match=r"no attribute 'add_embedding'"):
        _ = sampler.add_embedding


# --- latents


@torch.no_grad()
def test_the_latent_pipeline_decodes_what_a_loop_by_hand_decodes():
    torch.manual_seed(5)
    vqvae = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16, sample_size=8).eval()
    sampler = cut(unet())
    pipe = silent(LDMPipeline(vqvae=vqvae, unet=sampler, scheduler=DDIMScheduler()))
    made = pipe(batch_size=2, generator=seeded(), num_inference_steps=8, output_type="np").images

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(8)
    sample = torch.randn(2, 3, 8, 8, generator=seeded())
    for timestep in scheduler.timesteps:
        noise = ticket_at(sampler, timestep)(sample, timestep).sample
        sample = scheduler.step(noise, timestep, sample, eta=0.0).prev_sample
    image = (vqvae.decode(sample / vqvae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(torch.from_numpy(made), image.permute(0, 2, 3, 1))


@torch.no_grad()
def test_the_dit_pipeline_guides_as_a_loop_by_hand_does():
    vae = tiny_vae()
    sampler, calls = watch(cut(dit()))
    scheduler = DDIMScheduler()
    pipe = silent(DiTPipeline(transformer=sampler, vae=vae, scheduler=copy.deepcopy(scheduler)))
    made = pipe(class_labels=[1, 7], generator=seeded(), num_inference_steps=8, output_type="pt").images
    assert {number for number, _ in calls} == {0, 1, 2}

    scheduler.set_timesteps(8)
    sample = torch.randn(2, 4, 8, 8, generator=seeded())
    labels = torch.tensor([1, 7, 1000, 1000])
    for timestep in scheduler.timesteps:
        both = ticket_at(sampler, timestep)(sample.repeat(2, 1, 1, 1), timestep.expand(4), labels).sample[:, :4]
        with_label, without = both.chunk(2)
        guided = without + 4.0 * (with_label - without)
        sample = scheduler.step(guided, timestep, sample).prev_sample
    image = (vae.decode(sample / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(made, image)


def test_the_dit_pipeline_makes_the_dense_networks_images():
    dense, vae = dit().network.eval(), tiny_vae()
    images = [
        silent(DiTPipeline(transformer=network, vae=vae, scheduler=DDIMScheduler()))(
            class_labels=[1, 7], generator=seeded(), num_inference_steps=6, output_type="pt"
        ).images
        for network in (dense, whole(dense))
    ]
    assert torch.equal(*images)


# --- text to image; the embeddings of the prompts are given


def sd3(network):
    vae = tiny_vae(shift_factor=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    return StableDiffusion3Pipeline(
        transformer=network, vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def stable_diffusion(network):
    return StableDiffusionPipeline(
        unet=network, vae=tiny_vae(), scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), text_encoder=None,
        tokenizer=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl(network):
    return StableDiffusionXLPipeline(
        unet=network, vae=tiny_vae(), scheduler=DDIMScheduler(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip


def pixart(network):
    return PixArtAlphaPipeline(
        transformer=network, vae=tiny_vae(), scheduler=DDIMScheduler(), text_encoder=None, tokenizer=None
    )


def embeddings(tokens, width, pooled=None, mask=False):
    torch.manual_seed(9)
    names = ("prompt_embeds", "negative_prompt_embeds")
    found = {name: torch.randn(1, tokens, width) for name in names}
    if pooled:
        found |= {f"{start}pooled_prompt_embeds": torch.randn(1, pooled) for start in ("", "negative_")}
    if mask:
        found |= {f"{start}prompt_attention_mask": torch.ones(1, tokens) for start in ("", "negative_")}
    return found


TEXT = {
    "stable diffusion": ("UNet2DCondition", stable_diffusion, embeddings(5, 24)),
    "sdxl": ("UNet2DCondition, SDXL", sdxl, embeddings(5, 24, pooled=20)),
    "sd3": ("SD3", sd3, embeddings(5, 12, pooled=20)),
    "pixart": ("PixArt-sigma", pixart, embeddings(5, 12, mask=True) | {"negative_prompt": None}),
}


@pytest.mark.parametrize("name", TEXT)
def test_text_pipelines_call_every_ticket_and_make_the_dense_networks_images(name):
    network, build, prompt = TEXT[name]
    found = member(network)
    settings = {"num_inference_steps": 6, "height": 16, "width": 16, "output_type": "pt", **prompt}
    if name == "pixart":
        settings["use_resolution_binning"] = False
    images = [
        silent(build(each))(generator=seeded(), **settings).images for each in (found.network, whole(found.network))
    ]
    assert torch.equal(*images)
    sampler, calls = watch(cut(found, timesteps=TimestepArgument("timestep", 3 if name == "sd3" else 1)))
    pruned = silent(build(sampler))(generator=seeded(), **settings).images
    assert {number for number, _ in calls} == {0, 1, 2}
    assert all(REGIONS[number][0] <= step <= REGIONS[number][1] for number, step in calls)
    assert pruned.shape == images[0].shape and not torch.equal(pruned, images[0])
