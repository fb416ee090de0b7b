"""Ensembles from the Hugging Face hub and its cache; nothing here needs a network."""

import hashlib
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
from models import Denoiser, tiny_unet
from samplers import cut

from lightning_earlybird import EnsembleFormatError, TicketEnsembleSampler
from lightning_earlybird.files import is_hub_cache_link
from lightning_earlybird.tickets import load_ensemble

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sampler():
    torch.manual_seed(0)
    return cut(Denoiser(tiny_unet(), (torch.randn(2, 3, 8, 8), torch.tensor([5, 900])), {}))


@pytest.fixture(scope="module")
def saved(sampler, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "e"
    sampler.save_pretrained(folder)
    return folder


def cached(folder: Path, cache: Path, name: str = "models--user--ensemble") -> Path:
    """The snapshot that the hub's client makes of a repository: links from names to blobs."""
    repository = cache / name
    snapshot = repository / "snapshots" / REVISION
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    for file in folder.rglob("*"):
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            blob = repository / "blobs" / (digest if file.suffix == ".safetensors" else digest[:40])
            shutil.copy(file, blob)
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            up = Path(*[".."] * (len(link.relative_to(repository).parts) - 1))
            link.symlink_to(up / "blobs" / blob.name)
    return snapshot


def same(one, other):
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_a_snapshot_in_the_cache_loads_like_any_directory(sampler, saved, tmp_path):
    snapshot = cached(saved, tmp_path / "cache")
    assert (snapshot / "ensemble.json").is_symlink()
    assert same(TicketEnsembleSampler.from_pretrained(snapshot), sampler)
    (tmp_path / "way").symlink_to(snapshot)
    assert same(TicketEnsembleSampler.from_pretrained(tmp_path / "way"), sampler)


def test_a_repository_is_found_by_its_name(sampler, saved, tmp_path):
    cached(saved, tmp_path / "cache")
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert same(TicketEnsembleSampler.from_pretrained("user/ensemble", **where), sampler)
    assert same(TicketEnsembleSampler.from_pretrained("user/ensemble", revision=REVISION, **where), sampler)


def test_an_ensemble_inside_of_a_pipeline_is_found_in_the_cache(sampler, tmp_path):
    DDPMPipeline(unet=sampler, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    snapshot = cached(tmp_path / "pipeline", tmp_path / "cache", "models--user--pipeline")
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert same(TicketEnsembleSampler.from_pretrained("user/pipeline", subfolder="unet", **where), sampler)
    folder = huggingface_hub.snapshot_download("user/pipeline", **where)
    assert Path(folder) == snapshot
    assert same(DiffusionPipeline.from_pretrained(folder).unet, sampler)


def test_a_local_directory_goes_before_the_hub(sampler, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "user" / "ensemble")
    assert same(TicketEnsembleSampler.from_pretrained("user/ensemble"), sampler)
    for name in (Path("user/other"), "user/deep/er", "./user/other", str(tmp_path / "other"), "other"):
        with pytest.raises(EnsembleFormatError, match="there is no such file"):
            TicketEnsembleSampler.from_pretrained(name)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_the_error_says_what_was_tried(tmp_path, monkeypatch, offline):
    if offline:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:  # nobody listens there
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    message = r"directory='user/ensemble' is no directory here, and the Hugging Face hub did not give .*Check the name"
    with pytest.raises(FileNotFoundError, match=message):
        TicketEnsembleSampler.from_pretrained("user/ensemble", cache_dir=tmp_path / "cache")


def test_other_links_are_refused_whatever_the_cache_looks_like(saved, tmp_path):
    snapshot = cached(saved, tmp_path / "cache")
    repository = snapshot.parents[1]
    index = snapshot / "ensemble.json"
    blob = index.resolve()
    foreign = tmp_path / "foreign.json"
    shutil.copy(blob, foreign)
    other = cached(saved, tmp_path / "cache", "models--other--ensemble").parents[1] / "blobs" / blob.name
    (repository / "loose.json").write_bytes(blob.read_bytes())
    (repository / "blobs" / ("a" * 40)).symlink_to(blob.name)
    (repository / "blobs" / "named.json").write_bytes(blob.read_bytes())
    (repository / "blobs" / ("b" * 40)).mkdir()
    for target in (
        foreign,
        other,
        f"../../../models--other--ensemble/blobs/{blob.name}",
        "../../loose.json",
        "../../blobs/named.json",
        f"../../blobs/{'a' * 40}",
        f"../../blobs/{'b' * 40}",
        f"../../blobs/{'c' * 40}",
        f"../../blobs/../../models--other--ensemble/blobs/{blob.name}",
        "../../blobs",
        "ensemble.json",
    ):
        index.unlink()
        index.symlink_to(target)
        assert not is_hub_cache_link(index), target
        with pytest.raises(EnsembleFormatError, match="it is a link; links are not followed but within a Hugging Face"):
            load_ensemble(snapshot)
    index.unlink()
    index.symlink_to(blob)  # an absolute one, as on systems that cannot have others
    load_ensemble(snapshot)
    (repository / "blobs").rename(tmp_path / "blobs")
    (repository / "blobs").symlink_to(tmp_path / "blobs")
    with pytest.raises(EnsembleFormatError, match="it is a link"):
        load_ensemble(snapshot)


@pytest.mark.parametrize("name", ["ensemble", "models-user-ensemble", "models--user--ens\u202eemble"])
def test_a_directory_that_is_named_otherwise_is_no_cache(saved, tmp_path, name):
    snapshot = cached(saved, tmp_path, name)
    with pytest.raises(EnsembleFormatError, match="it is a link"):
        load_ensemble(snapshot)


def test_a_cache_is_not_written_into(sampler, saved, tmp_path):
    snapshot = cached(saved, tmp_path / "cache")
    before = {path: path.lstat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    with pytest.raises(FileExistsError, match="other files, which replacing it would delete"):
        sampler.save_pretrained(snapshot)
    assert {path: path.lstat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_the_hub_is_given_the_files_of_the_ensemble(sampler, saved, monkeypatch):
    """Only the client's two calls are recorded: there is no hub to write to."""
    asked = []
    hub = huggingface_hub.constants.ENDPOINT

    def create(self, *args, **kwargs):
        asked.append((args, kwargs))
        return huggingface_hub.RepoUrl(f"{hub}/user/ensemble")

    def upload(self, *, repo_id, folder_path, commit_message, create_pr, delete_patterns):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        asked.append((self.token, repo_id, commit_message, create_pr, files))
        return huggingface_hub.CommitInfo(
            commit_url=f"{hub}/user/ensemble/commit/1", commit_message="", commit_description="", oid="1"
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    address = sampler.push_to_hub("ensemble", private=True, token="secret", commit_message="Third", create_pr=True)
    assert address == f"{hub}/user/ensemble/commit/1"
    assert asked[0] == (("ensemble",), {"private": True, "exist_ok": True})
    assert asked[1][:4] == ("secret", "user/ensemble", "Third", True)
    assert asked[1][4] == {path.name: path.read_bytes() for path in saved.iterdir()}
