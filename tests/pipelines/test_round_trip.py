"""Pipelines with an ensemble inside on disk: saved, loaded, in other processes, and what is refused."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, LDMPipeline, VQModel
from models import Denoiser, tiny_unet
from samplers import cut, seeded
from torch import nn
from zoo import member

from lightning_earlybird import TicketEnsembleSampler, TimestepPartition
from lightning_earlybird.ensemble import TimestepArgument

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
ROOT = Path(__file__).parents[2]


def unet():
    torch.manual_seed(0)
    return Denoiser(tiny_unet(), (torch.randn(2, 3, 8, 8), torch.tensor([5, 900])), {})


@pytest.fixture(scope="module")
def sampler():
    return cut(unet(), overlap=20)


@pytest.fixture
def folder(sampler, tmp_path):
    DDPMPipeline(unet=sampler, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def images(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(batch_size=2, generator=seeded(), num_inference_steps=6, output_type="np").images


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_a_pipeline_comes_back_with_the_same_images(sampler, folder):
    names = json.loads((folder / "model_index.json").read_text())
    assert names["unet"] == ["lightning_earlybird", "TicketEnsembleSampler"]
    assert {path.name for path in (folder / "unet").iterdir()} >= {"ensemble.json", "README.md", "ticket_2.safetensors"}
    for loader in (DiffusionPipeline, DDPMPipeline):
        loaded = loader.from_pretrained(folder)
        assert type(loaded.unet) is TicketEnsembleSampler and not loaded.unet.training
        assert loaded.unet.partition == sampler.partition and loaded.unet.record.edits == sampler.record.edits
        assert (images(loaded) == images(DDPMPipeline(unet=sampler, scheduler=DDIMScheduler()))).all()


def test_a_latent_pipeline_comes_back_and_replaces_what_was_saved_before(sampler, folder):
    torch.manual_seed(5)
    vqvae = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16, sample_size=8).eval()
    pipeline = LDMPipeline(vqvae=vqvae, unet=cut(unet()), scheduler=DDIMScheduler())
    for _ in range(2):
        pipeline.save_pretrained(folder)
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert type(loaded) is LDMPipeline and loaded.unet.partition.overlap == 0
    assert (images(loaded) == images(pipeline)).all()
    loaded.save_pretrained(folder)
    assert (images(DiffusionPipeline.from_pretrained(folder)) == images(pipeline)).all()


@pytest.mark.parametrize("imports", ["import lightning_earlybird", ""])
def test_another_process_loads_it_once_the_package_is_imported(sampler, folder, imports, tmp_path):
    """diffusers imports no library because a file names it; it says so, and what to do."""
    code = f"""
{imports}
import sys
import numpy, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(folder)!r})
pipeline.set_progress_bar_config(disable=True)
numpy.save({str(tmp_path / "images.npy")!r}, pipeline(
    batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=6, output_type="np").images)
"""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=400, env=environment, check=False
    )
    if not imports:
        assert "import lightning_earlybird before calling `from_pretrained`" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    import numpy

    expected = images(DDPMPipeline(unet=sampler, scheduler=DDIMScheduler()))
    numpy.testing.assert_allclose(numpy.load(tmp_path / "images.npy"), expected, atol=1e-5)


def test_tickets_are_converted_as_they_are_loaded(sampler, folder):
    loaded = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.unet.parameters()} == {torch.bfloat16}
    assert (loaded.dtype, loaded.unet.dtype) == (torch.bfloat16, torch.bfloat16)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in bits(sampler).items()}
    found = bits(loaded.unet)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    again = TicketEnsembleSampler.from_pretrained(folder, subfolder="unet", dtype=torch.float64, device_map={"": "cpu"})
    assert again.dtype == torch.float64
    assert TicketEnsembleSampler.from_pretrained(folder / "unet", torch_dtype=torch.float16).dtype == torch.float16


def test_modules_that_a_network_keeps_in_float32_stay_so(folder, monkeypatch):
    monkeypatch.setattr(type(unet().network), "_keep_in_fp32_modules", ["time_embedding"])
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        loaded = TicketEnsembleSampler.from_pretrained(folder, subfolder="unet", dtype=dtype)
        for ticket in loaded.tickets:
            assert ticket.time_embedding.linear_1.weight.dtype == kept
            assert ticket.conv_in.weight.dtype == dtype


def test_an_ensemble_is_given_to_a_pipeline_in_place_of_the_network_that_was_saved(sampler, folder, tmp_path):
    assert DiffusionPipeline.from_pretrained(folder, unet=sampler).unet is sampler
    DDPMPipeline(unet=unet().network, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "dense")
    assert DiffusionPipeline.from_pretrained(tmp_path / "dense", unet=sampler).unet is sampler


class Plain(nn.Module):
    """Not a network of diffusers, but one that answers as its pipelines expect."""

    def __init__(self):
        super().__init__()
        self.network = tiny_unet()
        self.config = self.network.config

    def forward(self, sample, timestep):
        return self.network(sample, timestep)


def test_networks_of_others_are_loaded_by_their_factory_and_given_to_the_pipeline(tmp_path):
    torch.manual_seed(0)
    found = Denoiser(Plain(), (torch.randn(2, 3, 8, 8), torch.tensor([5, 900])), {})
    pipeline = DDPMPipeline(unet=cut(found), scheduler=DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=r"denoiser=None: .* from_pretrained\(directory, unet=sampler\)"):
        DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    loaded = TicketEnsembleSampler.from_pretrained(tmp_path / "pipeline", Plain, subfolder="unet")
    assert (images(DiffusionPipeline.from_pretrained(tmp_path / "pipeline", unet=loaded)) == images(pipeline)).all()


def test_what_an_ensemble_cannot_do_is_refused(sampler, folder, tmp_path):
    pipeline = DDPMPipeline(unet=sampler, scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match=r"variant='fp16': an ensemble has one set of files"):
        pipeline.save_pretrained(tmp_path / "other", variant="fp16")
    with pytest.raises(ValueError, match=r"safe_serialization=False, variant=None: an ensemble has one set of files"):
        pipeline.save_pretrained(tmp_path / "other", safe_serialization=False)
    bare = TicketEnsembleSampler(list(sampler.tickets), sampler.partition, sampler.timesteps)
    with pytest.raises(ValueError, match="record=None: this sampler does not know"):
        DDPMPipeline(unet=bare, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "other")
    for argument in ({"variant": "fp16"}, {"use_safetensors": False}, {"use_flashpack": True}):
        with pytest.raises(ValueError, match=r"=.*: an ensemble has one set of files, which are safetensors"):
            TicketEnsembleSampler.from_pretrained(folder / "unet", **argument)
    with pytest.raises(TypeError, match=r"from_pretrained has no arguments \['dtpye'\]"):
        TicketEnsembleSampler.from_pretrained(folder / "unet", dtpye=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype=torch.int8 must be a floating dtype"):
        TicketEnsembleSampler.from_pretrained(folder / "unet", dtype=torch.int8)
    for wrong in ("balanced", {"": "cpu", "tickets.0": "cpu"}, 1.5):
        with pytest.raises(ValueError, match=r"device_map=.* must be one device, such as 'cuda'"):
            TicketEnsembleSampler.from_pretrained(folder / "unet", device_map=wrong)
    with pytest.raises(ValueError, match=r"subfolder='../unet' must be a path inside of the directory"):
        TicketEnsembleSampler.from_pretrained(folder, subfolder="../unet")


def test_offloading_whole_networks_asks_for_accelerate(folder):
    """diffusers' own offloading; the sampler's needs nothing."""
    pytest.importorskip("diffusers")
    try:
        import accelerate  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="requires `accelerate"):
            DiffusionPipeline.from_pretrained(folder).enable_model_cpu_offload()
    else:
        pytest.skip("accelerate is installed")


def test_names_of_the_package_that_diffusers_asks_for():
    import diffusers

    import lightning_earlybird

    assert lightning_earlybird.ModelMixin is diffusers.ModelMixin
    assert issubclass(TicketEnsembleSampler, diffusers.ModelMixin)
    with pytest.raises(AttributeError, match="has no attribute 'PreTrainedModel'"):
        _ = lightning_earlybird.PreTrainedModel


def test_caches_of_transformers_are_told_which_call_they_are_in(monkeypatch):
    """As pipelines of transformers do around each of their calls, where the network has a cache."""
    from diffusers import FluxTransformer2DModel

    tickets = [member("Flux").network for _ in range(2)]
    partition = TimestepPartition.of([(0, 0.5, 0), (0.5, 1, 0)])
    ensemble = TicketEnsembleSampler(tickets, partition, TimestepArgument("timestep", None))
    told = []
    tell = FluxTransformer2DModel.cache_context

    @contextmanager
    def heard(self, name, **kwargs):
        with tell(self, name, **kwargs):
            told.append((self, name, kwargs))
            yield
        told.remove((self, name, kwargs))

    monkeypatch.setattr(FluxTransformer2DModel, "cache_context", heard)
    found = member("Flux")
    with ensemble.cache_context("cond", step_index=3), torch.no_grad():
        assert told == [(ticket, "cond", {"step_index": 3}) for ticket in tickets]
        ensemble(*found.args, **found.kwargs)
    assert told == []
    with cut(unet()).cache_context("cond"):
        pass
