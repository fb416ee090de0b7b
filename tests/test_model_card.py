"""The card beside a saved ensemble: what it says, and that what its owner has written there is never lost."""

import math
import re

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from huggingface_hub import ModelCard
from models import Denoiser, tiny_unet
from samplers import cut, whole
from torch import nn

from lightning_earlybird import TicketEnsembleSampler, TimestepPartition, __version__
from lightning_earlybird.model_card import BEGIN, END, model_card
from lightning_earlybird.records import EnsembleRecord, TicketFacts
from lightning_earlybird.tickets import check_target, describe_denoiser


@pytest.fixture(scope="module")
def sampler():
    torch.manual_seed(0)
    found = Denoiser(tiny_unet(), (torch.randn(2, 3, 8, 8), torch.tensor([5, 900])), {})
    return cut(found, overlap=20)


@pytest.fixture
def folder(sampler, tmp_path):
    sampler.save_pretrained(tmp_path / "e")
    return tmp_path / "e"


def test_the_card_tells_the_hub_what_it_is_and_people_what_is_in_it(sampler, folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "lightning-earlybird"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert {"diffusion", "early-bird-tickets"} <= set(card.data.tags)
    text = card.text
    assert "3 tickets of one diffusion model (UNet2DModel, samples of shape (3, 8, 8))" in text
    assert "an overlap of 20" in text
    assert f"lightning-earlybird {__version__} (masks settled at step 100 of the dense training)" in text
    assert "arXiv:2504.09606" in text
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    for number, (row, region, facts) in enumerate(zip(rows, sampler.regions, sampler.record.facts, strict=True)):
        dense, kept = facts.parameters
        assert row[0] == f"| {number}" and row[1] == f"[{region.start:g}, {region.stop:g})"
        assert row[2] == f"{region.sparsity:g} of channels"
        assert row[4] == f"{kept:,} of {dense:,} ({100 * (1 - kept / dense):.1f}% removed)"
        assert kept == sum(each.numel() for each in sampler.tickets[number].parameters())


def test_the_snippet_of_the_card_runs(folder, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    names = {}
    exec(snippet.replace("PATH", "e").replace("sample(16", "sample(1").replace("steps=100", "steps=8"), names)
    assert names["images"].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_the_snippet_of_a_class_conditional_ensemble_runs(network, tmp_path, monkeypatch):
    labels = torch.tensor([0, 1])
    if network == "unet":
        found = Denoiser(
            tiny_unet(num_class_embeds=2),
            (torch.randn(2, 3, 8, 8), torch.tensor([5, 900])),
            {"class_labels": labels},
        )
        cut(found).save_pretrained(tmp_path / "e")
    else:
        dit = DiTTransformer2DModel(2, 8, 3, num_layers=1, sample_size=4, num_embeds_ada_norm=2)
        sampler = whole(dit)
        edits = tuple({} for _ in sampler.tickets)
        sampler.record = EnsembleRecord(describe_denoiser(dit), edits, sample_shape=(3, 4, 4))
        sampler.save_pretrained(tmp_path / "e")
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "e" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet.replace("PATH", "e").replace("sample(16", "sample(2").replace("steps=100", "steps=8"), names)
    assert names["images"].shape[:2] == (2, 3)


def facts_of(partition, **changes):
    common = {"step": 7, "emerged": True, "channels": (8, 4), "parameters": (100, 50), "macs": (64, 16)}
    return tuple(TicketFacts(region, **common | changes) for region in partition)


def test_what_is_not_known_is_not_claimed():
    partition = TimestepPartition.of([(-math.inf, 0.5, 0.25), (0.5, math.inf, 0.5)])
    text = model_card(partition, EnsembleRecord(None, ({}, {})), "1.2.3").decode()
    assert (
        "pipeline_tag" not in text and "overlap" not in text and "step" not in text.split("## Where")[1].split("@")[0]
    )
    assert "| 0 | [-inf, 0.5) | 0.25 | ? | ? | ? |" in text
    assert 'from_pretrained("PATH", denoiser=MyNetwork)  # a function' in text

    record = EnsembleRecord(None, ({}, {}), (), facts_of(partition, macs=None, target="params"))
    text = model_card(partition, record, "1.2.3").decode()
    assert "| 0.25 of parameters | 4 of 8 (50.0% removed) | 50 of 100 (50.0% removed) | not counted |" in text
    searched = EnsembleRecord(None, ({}, {}), (), facts_of(partition, emerged=False, target="macs"))
    text = model_card(partition, searched, "1.2.3").decode()
    assert "0.25 of MACs" in text and "masks settled, or the search ended, at step 7" in text
    conditional = EnsembleRecord({"class": "UNet2DModel", "config": {"num_class_embeds": 10}}, ({}, {}))
    assert b"pipeline_tag" not in model_card(partition, conditional, "1.2.3")
    emerged = facts_of(partition)[:1] + facts_of(partition, step=1200)[1:]
    text = model_card(partition, EnsembleRecord(None, ({}, {}), (), emerged), "1.2.3").decode()
    assert "at the steps 7, 1,200 of the dense training" in text


def test_what_the_owner_wrote_stays_when_the_ensemble_is_replaced(sampler, folder):
    card = folder / "README.md"
    text = card.read_text()
    mine = text.replace("---\n\n", "license: mit\n---\n\nMy ünet.\n", 1).replace("please fill in.", "None of yours.")
    card.write_text(mine.replace("3 tickets of one", "1000 tickets of one"))
    again = cut(Denoiser(tiny_unet(), (torch.randn(2, 3, 8, 8), torch.tensor([5, 900])), {}), [(0, 1000, 0.5)])
    again.save_pretrained(folder)
    after = card.read_text()
    assert "license: mit" in after and "My ünet." in after and "None of yours." in after
    assert "One ticket of one diffusion model" in after
    assert "1000 tickets" not in after and "[240, 440)" not in after
    sampler.save_pretrained(folder)
    assert card.read_text() == mine


@pytest.mark.parametrize("content", [b"", b"# all mine\n", b"\xff\x00", END + b"\n" + BEGIN, BEGIN + b"\ncut off"])
def test_a_card_without_our_marks_is_left_alone(sampler, folder, content):
    (folder / "README.md").write_bytes(content)
    check_target(folder)
    sampler.save_pretrained(folder)
    assert (folder / "README.md").read_bytes() == content
    TicketEnsembleSampler.from_pretrained(folder)


def test_ensembles_without_a_card_load_and_get_one_when_they_are_saved_again(sampler, folder):
    (folder / "README.md").unlink()
    loaded = TicketEnsembleSampler.from_pretrained(folder)
    loaded.sample(1, scheduler=DDIMScheduler(), num_inference_steps=8, progress=False)
    loaded.save_pretrained(folder)
    assert BEGIN in (folder / "README.md").read_bytes()


def test_what_is_no_card_is_not_replaced(sampler, folder, tmp_path):
    (folder / "README.md").unlink()
    (tmp_path / "elsewhere.md").write_text("")
    for make in (
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(tmp_path / "elsewhere.md"),
        lambda path: path.write_bytes(bytes((1 << 20) + 1)),
    ):
        make(folder / "README.md")
        with pytest.raises(FileExistsError, match=r"other files, which replacing it would delete: \['README.md'\]"):
            sampler.save_pretrained(folder)
        (folder / "README.md").rmdir() if (folder / "README.md").is_dir() else (folder / "README.md").unlink()


def test_a_network_of_others_gets_a_card_that_says_so(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.out = nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, x, timestep):
            return self.out(self.conv(x)) * (1 + timestep.view(-1, 1, 1, 1) / 1000)

    cut(Denoiser(Plain(), (torch.randn(2, 3, 8, 8), torch.tensor([5, 900])), {})).save_pretrained(tmp_path / "e")
    assert "a network that is not described in the files" in (tmp_path / "e" / "README.md").read_text()
