import copy
import json
import math
import os
import pickle
import re
import shutil

import pytest
import torch
from diffusers import UNet2DModel
from models import tiny_unet
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_earlybird.budget import draw_mask
from lightning_earlybird.ensemble import TicketEnsemble, TimestepArgument
from lightning_earlybird.files import sha256_of
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.structure import RaggedGroupNorm, attribute_edits, extract, trace_plan, verify_plan
from lightning_earlybird.tickets import (
    EnsembleFormatError,
    EnsembleRecord,
    TicketFacts,
    check_target,
    describe_denoiser,
    load_ensemble,
    save_ensemble,
    tensor_names,
)

REGIONS = [(0, 240, 0.25), (240, 440, 0.5), (440, 1000, 0.5, 700)]
X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([900, 3, 300, 999, 0, 439])


def small_unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )


class PlainNet(nn.Module):
    """Not a diffusers model; has a tied weight and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.outer = nn.Conv2d(8, 1, 3, padding=1)
        self.first = nn.Linear(1, 1)
        self.second = nn.Linear(1, 1)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.tensor([3]))

    def forward(self, x, t):
        shift = self.second(self.first(t.reshape(-1, 1).to(x.dtype) / 1000))
        return self.outer(torch.relu(self.norm(self.inner(x)))) + shift.reshape(-1, 1, 1, 1) * self.steps


def pruned(dense, x, t):
    """An ensemble of real tickets with its record, for REGIONS."""
    partition = TimestepPartition.of(REGIONS, overlap=20)
    plan = trace_plan(dense, (x[:2], t[:2]))
    scores = torch.rand(plan.num_channels, generator=torch.Generator().manual_seed(1))
    masks = tuple(draw_mask(plan, scores, region.sparsity, round_to=4) for region in partition)
    tickets = [extract(dense, plan, mask) for mask in masks]
    edits = tuple(attribute_edits(dense, ticket) for ticket in tickets)
    facts = tuple(
        TicketFacts(region, 100 * i, i > 0, (mask.num_channels, mask.num_kept), (1000, 250), (9, 3) if i else None)
        for i, (region, mask) in enumerate(zip(partition, masks, strict=True))
    )
    ensemble = TicketEnsemble(tickets, partition, TimestepArgument("timestep", 1)).eval()
    ensemble.record = EnsembleRecord(describe_denoiser(dense), edits, masks, facts, (1, 8, 8))
    return ensemble


def save(directory, ensemble, **changes):
    record = ensemble.record
    fields = {name: getattr(record, name) for name in ("denoiser", "edits", "masks", "facts", "sample_shape")}
    save_ensemble(directory, ensemble, **(fields | changes))


@pytest.fixture(scope="session")
def ensemble():
    return pruned(small_unet(), X, T)


@pytest.fixture(scope="session")
def saved(ensemble, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "ensemble"
    save(directory, ensemble)
    return directory


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of a good directory, to be damaged."""
    return shutil.copytree(saved, tmp_path / "damaged")


def edit(directory, change):
    """Changes the index as a careful attacker would: still JSON."""
    path = directory / "ensemble.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def put_tensors(directory, tensors, name="ticket_0.safetensors", *, update=()):
    """Replaces a tensor file and, as far as asked, what the index says of it."""
    save_file(tensors, directory / name)

    def change(index):
        entry = index["tickets"][0]
        if "sha256" in update:
            entry["sha256"] = sha256_of(directory / name)
        if "tensors" in update:
            kinds = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
            entry["tensors"] = {n: f"{kinds[t.dtype]}{list(t.shape)}" for n, t in tensors.items()}

    edit(directory, change)


def refused(directory, *parts):
    """Loading must fail with an error that has all these parts in this order."""
    return pytest.raises(EnsembleFormatError, match="(?s)" + ".*".join(map(re.escape, parts)))


# --- round trip


def test_a_reloaded_ensemble_is_bit_identical(ensemble, saved):
    loaded = load_ensemble(saved)
    with torch.no_grad():
        assert torch.equal(loaded(X, T).sample, ensemble(X, T).sample)
    assert [type(ticket) for ticket in loaded.tickets] == [UNet2DModel] * 3
    assert {n: (p.shape, p.dtype) for n, p in loaded.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in ensemble.named_parameters()
    }
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.partition == ensemble.partition
    assert loaded.timesteps == ensemble.timesteps


@pytest.fixture(scope="session")
def reshaped():
    """Tickets whose norms are ragged and whose attention has lost two of four heads."""
    torch.manual_seed(0)
    dense = tiny_unet(in_channels=1, out_channels=1)
    plan = verify_plan(dense, trace_plan(dense, (X[:2], T[:2])), (X[:2], T[:2])).plan
    partition = TimestepPartition.of(REGIONS)
    masks = []
    for gone in range(len(partition)):
        kept = {}
        for group in plan.groups:
            rows = torch.arange(group.rows) != gone
            columns = torch.arange(group.width) % 3 > 0
            kept[group.name] = (
                (rows[:, None] & columns).flatten() if group.can_lose_rows else columns.repeat(group.rows)
            )
        masks.append(TicketMask(kept))
    tickets = [extract(dense, plan, mask, norm="exact") for mask in masks]
    ensemble = TicketEnsemble(tickets, partition, TimestepArgument("timestep", 1)).eval()
    edits = tuple(attribute_edits(dense, ticket) for ticket in tickets)
    ensemble.record = EnsembleRecord(describe_denoiser(dense), edits, tuple(masks))
    return ensemble


def test_ragged_norms_and_missing_heads_are_reloaded_bit_identically(reshaped, tmp_path):
    save(tmp_path / "ensemble", reshaped, facts=None)
    loaded = load_ensemble(tmp_path / "ensemble")

    with torch.no_grad():
        assert torch.equal(loaded(X, T).sample, reshaped(X, T).sample)
    assert loaded.record.edits == reshaped.record.edits
    for ours, theirs in zip(loaded.tickets, reshaped.tickets, strict=True):
        assert repr(ours) == repr(theirs)
        assert any(isinstance(module, RaggedGroupNorm) for module in ours.modules())
        assert ours.mid_block.attentions[0].heads == theirs.mid_block.attentions[0].heads == 3


@pytest.mark.parametrize(
    ("module", "attribute", "value", "message"),
    [
        ("conv_norm_out", "group_sizes", [1, 1, 9], "conv_norm_out.group_sizes = [1, 1, 9] must list at most 8"),
        ("conv_norm_out", "group_sizes", [1, 1], "conv_norm_out.group_sizes = [1, 1] adds up to 2 channels"),
        ("conv_norm_out", "group_sizes", [1, 0], "group_sizes[1]' is 0, expected an integer of at least 1"),
        ("conv_norm_out", "group_sizes", [1, "2"], "group_sizes[1]' is '2', expected an integer"),
        ("mid_block.attentions.0", "heads", 5, "mid_block.attentions.0.heads = 5 must be positive and at most 4"),
        ("mid_block.attentions.0", "heads", 2.5, "heads' is 2.5, expected an integer"),
    ],
)
def test_impossible_norms_and_heads_are_refused(reshaped, tmp_path, module, attribute, value, message):
    save(tmp_path / "ensemble", reshaped, facts=None)
    edit(tmp_path / "ensemble", lambda index: index["tickets"][0]["edits"][module].update({attribute: value}))

    with refused(tmp_path / "ensemble", message):
        load_ensemble(tmp_path / "ensemble")


def test_a_reloaded_ensemble_trains_like_the_saved_one(ensemble, saved):
    pair = [copy.deepcopy(ensemble), load_ensemble(saved)]
    for each in pair:
        each.train()
        each(X, T).sample.square().mean().backward()
    own, loaded = ({n: p.grad for n, p in each.named_parameters()} for each in pair)
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[name], loaded[name]) for name in own)


def test_no_attribute_of_a_reloaded_ticket_differs(ensemble, saved):
    for ticket, loaded in zip(ensemble.tickets, load_ensemble(saved).tickets, strict=True):
        assert attribute_edits(ticket, loaded) == {}
        assert str(ticket) == str(loaded)


def test_the_record_survives(ensemble, saved):
    before, after = ensemble.record, load_ensemble(saved).record
    assert (after.denoiser, after.edits, after.facts, after.sample_shape) == (
        before.denoiser,
        before.edits,
        before.facts,
        before.sample_shape,
    )
    for a, b in zip(after.masks, before.masks, strict=True):
        assert list(a.kept) == list(b.kept)
        assert torch.equal(a.flat(), b.flat())


def test_saving_what_was_loaded_writes_the_same_bytes(saved, tmp_path):
    save(tmp_path / "again", load_ensemble(saved))
    names = sorted(path.name for path in saved.iterdir())
    expected = ["README.md", "ensemble.json", "masks.safetensors", *(f"ticket_{i}.safetensors" for i in range(3))]
    assert names == expected == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_loading_neither_traces_nor_draws_random_numbers(saved, monkeypatch):
    monkeypatch.setattr("lightning_earlybird.structure.trace.trace_plan", None)
    monkeypatch.setattr(UNet2DModel, "forward", None)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_ensemble(saved)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_survive(ensemble, tmp_path, dtype):
    other = copy.deepcopy(ensemble).to(dtype)
    save(tmp_path / "e", other)
    loaded = load_ensemble(tmp_path / "e")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    with torch.no_grad():
        assert torch.equal(loaded(X.to(dtype), T).sample, other(X.to(dtype), T).sample)


def test_the_memory_format_survives(ensemble, tmp_path):
    other = copy.deepcopy(ensemble).to(memory_format=torch.channels_last)
    save(tmp_path / "e", other)
    loaded = load_ensemble(tmp_path / "e")
    weight = loaded.tickets[2].down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    x = X.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(loaded(x, T).sample, other(x, T).sample)


def test_compiled_tickets_are_saved_as_plain_ones(ensemble, saved, tmp_path):
    wrapped = [torch.compile(ticket, backend="eager") for ticket in ensemble.tickets]
    compiled = TicketEnsemble(wrapped, ensemble.partition, ensemble.timesteps)
    compiled.record = ensemble.record
    save(tmp_path / "e", compiled)
    assert (tmp_path / "e" / "ensemble.json").read_bytes() == (saved / "ensemble.json").read_bytes()


def test_masks_facts_and_sample_shape_may_be_absent(ensemble, tmp_path):
    save(tmp_path / "e", ensemble, masks=None, facts=None, sample_shape=None)
    assert not (tmp_path / "e" / "masks.safetensors").exists()
    record = load_ensemble(tmp_path / "e").record
    assert (record.masks, record.facts, record.sample_shape) == ((), (), None)


def test_a_traditional_ticket_with_an_unbounded_axis_survives(ensemble, tmp_path):
    partition = TimestepPartition.whole(0.5)
    single = TicketEnsemble([ensemble.tickets[1]], partition, TimestepArgument(None, 1)).eval()
    save_ensemble(
        tmp_path / "e",
        single,
        denoiser=ensemble.record.denoiser,
        edits=[ensemble.record.edits[1]],
        masks=None,
        facts=[TicketFacts(partition.regions[0], None, False, (4, 2), (4, 2), None)],
        sample_shape=None,
    )
    loaded = load_ensemble(tmp_path / "e")
    assert loaded.partition == partition and math.isinf(loaded.record.facts[0].region.start)
    with torch.no_grad():
        assert torch.equal(loaded(X, T).sample, single(X, T).sample)


def test_the_names_of_the_tensors_can_be_asked_for(ensemble, saved):
    assert tensor_names(saved) == set(ensemble.tickets[0].state_dict())


# --- networks that diffusers does not know


def test_another_network_is_rebuilt_by_its_factory(tmp_path):
    torch.manual_seed(0)
    own = pruned(PlainNet(), X, T)
    own.timesteps = TimestepArgument("t", 1)
    assert own.record.denoiser is None
    assert own.tickets[1].inner.weight.shape[0] == 4
    save(tmp_path / "e", own)
    with pytest.raises(ValueError, match=r"denoiser=None: .* pass denoiser=, a function without arguments"):
        load_ensemble(tmp_path / "e")
    loaded = load_ensemble(tmp_path / "e", denoiser=PlainNet)
    with torch.no_grad():
        assert torch.equal(loaded(X, T), own(X, T))
    assert all(ticket.second.weight is ticket.first.weight for ticket in loaded.tickets)


def test_a_factory_must_return_a_module(saved):
    with pytest.raises(ValueError, match="denoiser must return a torch module, but it returned a int"):
        load_ensemble(saved, denoiser=lambda: 3)


def test_a_factory_of_another_network_is_refused_by_file_and_field(saved):
    with refused(saved, "ensemble.json", "tickets[0]", "tensor"):
        load_ensemble(saved, denoiser=PlainNet)


def test_only_networks_that_their_configuration_describes_are_described():
    dense = small_unet()
    description = describe_denoiser(dense)
    assert (description["library"], description["class"]) == ("diffusers", "UNet2DModel")
    assert description == json.loads(json.dumps(description))
    assert describe_denoiser(torch.compile(dense, backend="eager")) == description
    assert describe_denoiser(PlainNet()) is None
    assert describe_denoiser(type("Mine", (UNet2DModel,), {})(block_out_channels=(32, 32, 32, 32))) is None
    dense.conv_in = nn.Conv2d(2, 8, 3, padding=1)
    assert describe_denoiser(dense) is None


# --- facts and record


def test_facts_tell_the_fraction_removed(ensemble):
    facts = TicketFacts(ensemble.regions[0], 5, True, (100, 70), (1000, 250), (8, 2))
    assert (facts.achieved_channels, facts.achieved_parameters, facts.achieved_macs) == (0.3, 0.75, 0.75)
    assert TicketFacts(ensemble.regions[0], 5, True, (0, 0), (1000, 250), None).achieved_channels == 0
    assert TicketFacts(ensemble.regions[0], 5, True, (0, 0), (1000, 250), None).achieved_macs is None


def test_a_record_goes_through_json(ensemble):
    before = ensemble.record
    data = json.loads(json.dumps(before.to_json()))
    after = EnsembleRecord.from_json(data, before.masks)
    assert after == before
    assert EnsembleRecord.from_json(EnsembleRecord(None, ({},)).to_json()) == EnsembleRecord(None, ({},))


def test_what_the_sparsity_counts_is_part_of_the_record_and_was_channels_before_there_was_a_choice(ensemble):
    facts = TicketFacts(ensemble.regions[0], 5, True, (100, 70), (1000, 250), (8, 2), target="macs")
    data = EnsembleRecord(None, ({},), facts=(facts,)).to_json()
    assert EnsembleRecord.from_json(data).facts == (facts,)
    del data["facts"][0]["target"]
    assert EnsembleRecord.from_json(data).facts[0].target == "channels"
    data["facts"][0]["target"] = "flops"
    with pytest.raises(EnsembleFormatError, match=r"field 'facts\[0\].target' is 'flops', expected one of"):
        EnsembleRecord.from_json(data)


def test_a_record_of_the_wrong_form_is_refused(ensemble):
    data = ensemble.record.to_json()
    del data["edits"]
    with pytest.raises(EnsembleFormatError, match="the ensemble's record: field 'edits' is missing"):
        EnsembleRecord.from_json(data)


# --- writing


def test_a_saved_ensemble_may_be_replaced(ensemble, saved, tmp_path):
    target = shutil.copytree(saved, tmp_path / "e")
    other = copy.deepcopy(ensemble)
    with torch.no_grad():
        other.tickets[0].conv_in.bias.add_(1)
    save(target, other, masks=None)
    assert torch.equal(load_ensemble(target).tickets[0].conv_in.bias, other.tickets[0].conv_in.bias)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"]


def test_an_empty_directory_and_missing_parents_are_fine(ensemble, tmp_path):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", ensemble)
    save(tmp_path / "a" / "b" / "c", ensemble)
    load_ensemble(tmp_path / "empty")
    load_ensemble(tmp_path / "a" / "b" / "c")


def test_anything_else_is_refused_before_anything_is_computed(ensemble, saved, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").write_bytes(b"")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "ensemble.json").write_text('{"format": "something"}')
    mixed = shutil.copytree(saved, tmp_path / "mixed")
    (mixed / "grid.png").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))

    monkeypatch.setattr(nn.Module, "state_dict", None)
    for name, message in [
        ("photos", r"must be new, empty, or hold a saved ensemble.*ensemble.json: .*no such file.*choose another"),
        ("foreign", r"field 'format' is 'something'.*choose another"),
        ("mixed", r"other files, which replacing it would delete: \['grid.png'\]; choose another"),
        ("file", r"must be a directory, but a file is there; choose another"),
    ]:
        with pytest.raises(FileExistsError, match=message):
            check_target(tmp_path / name)
        with pytest.raises(FileExistsError, match=message):
            save(tmp_path / name, ensemble)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_save_leaves_everything_as_it_was(ensemble, saved, tmp_path, monkeypatch, existing):
    target = tmp_path / "e"
    if existing:
        shutil.copytree(saved, target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(tensors, path):
        if path.name == "ticket_2.safetensors":
            raise OSError("no space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("lightning_earlybird.tickets.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save(target, ensemble)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert target.exists() == existing
    assert len(list(tmp_path.iterdir())) == existing


def test_a_failed_rename_brings_the_former_ensemble_back(ensemble, saved, tmp_path, monkeypatch):
    target = shutil.copytree(saved, tmp_path / "e")
    rename = type(target).rename

    def failing(self, other):
        if self.name.endswith(".partial"):
            raise OSError("rename failed")
        return rename(self, other)

    monkeypatch.setattr(type(target), "rename", failing)
    with pytest.raises(OSError, match="rename failed"):
        save(target, ensemble)
    load_ensemble(target)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize("name", ["edits", "masks", "facts"])
def test_entries_must_be_one_per_ticket(ensemble, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} has 1 entries for 3 tickets"):
        save(tmp_path / "e", ensemble, **{name: getattr(ensemble.record, name)[:1]})
    assert not (tmp_path / "e").exists()


def test_state_that_is_not_tensors_cannot_be_saved(ensemble, tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"secret": 1}

        def set_extra_state(self, state):
            pass

    other = copy.deepcopy(ensemble)
    other.tickets[1].extra = Extra(1, 1)
    with pytest.raises(ValueError, match=r"tickets\[1\]: its state holds 'extra._extra_state', a dict"):
        save(tmp_path / "e", other)


# --- damaged, truncated and foreign directories


def test_a_missing_directory_is_refused(tmp_path):
    with refused(tmp_path, "ensemble.json", "no such file"):
        load_ensemble(tmp_path / "absent")


@pytest.mark.parametrize(
    "text",
    ["", '{"format": "lightning', "[" * 100_000, '{"format": NaN}', "\x00\x01"],
    ids=["empty", "cut", "deep", "nan", "binary"],
)
def test_damaged_json_is_refused(damaged, text):
    (damaged / "ensemble.json").write_text(text)
    with refused(damaged, "ensemble.json", "is not valid JSON", "damaged or truncated"):
        load_ensemble(damaged)


def test_text_in_another_encoding_is_refused(damaged):
    (damaged / "ensemble.json").write_bytes(b'{"format": "\xff\xfe"}')
    with refused(damaged, "ensemble.json", "is not valid JSON"):
        load_ensemble(damaged)


@pytest.mark.parametrize("length", [0, 5, 100, 1000, -1])
def test_truncated_weights_are_refused(damaged, length):
    path = damaged / "ticket_1.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with refused(damaged, "ensemble.json", "tickets[1].file", "ticket_1.safetensors", "not a valid safetensors file"):
        load_ensemble(damaged)


def test_a_flipped_bit_is_refused(damaged):
    path = damaged / "ticket_1.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with refused(damaged, "ensemble.json", "tickets[1].sha256", "does not match 'ticket_1.safetensors'"):
        load_ensemble(damaged)


@pytest.mark.parametrize("name", ["ticket_2.safetensors", "masks.safetensors"])
def test_a_missing_file_is_refused(damaged, name):
    (damaged / name).unlink()
    with refused(damaged, "ensemble.json", "file'", f"names the file {name!r}, which is not in"):
        load_ensemble(damaged)


@pytest.mark.parametrize("trusting", [False, True])
def test_a_pickle_in_place_of_weights_is_refused_and_not_executed(damaged, tmp_path, trusting):
    witness = tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(witness),)

    path = damaged / "ticket_0.safetensors"
    if trusting:
        torch.save({"weight": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps(Payload()))
    edit(damaged, lambda index: index["tickets"][0].update(sha256=sha256_of(path)))
    with refused(damaged, "ensemble.json", "tickets[0].file", "ticket_0.safetensors", "not a valid safetensors file"):
        load_ensemble(damaged)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Payload()))  # the payload would have worked
    assert witness.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../saved/ticket_0.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b.safetensors",
        "a\\b",
        "C:x",
        ".hidden",
        "a\0b",
    ],
)
def test_file_names_that_lead_elsewhere_are_refused(damaged, name):
    edit(damaged, lambda index: index["tickets"][0].update(file=name))
    with refused(damaged, "ensemble.json", "tickets[0].file", "expected the plain name of a file"):
        load_ensemble(damaged)


def test_a_directory_in_place_of_a_file_is_refused(damaged):
    (damaged / "ticket_0.safetensors").unlink()
    (damaged / "ticket_0.safetensors").mkdir()
    with refused(damaged, "tickets[0].file", "names the file 'ticket_0.safetensors', which is not in"):
        load_ensemble(damaged)


def change_shape(tensors):
    tensors["conv_in.weight"] = torch.zeros(5, 1, 3, 3)


def change_dtype(tensors):
    tensors["conv_in.weight"] = tensors["conv_in.weight"].half()


def change_kind(tensors):
    tensors["conv_in.weight"] = tensors["conv_in.weight"].long()


def add_tensor(tensors):
    tensors["surplus"] = torch.zeros(1)


def drop_tensor(tensors):
    del tensors["conv_in.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_shape, ["F32[", "'conv_in.weight'", "F32[5, 1, 3, 3]"]),
        (change_dtype, ["F32[", "'conv_in.weight'", "F16["]),
        (change_kind, ["F32[", "'conv_in.weight'", "I64["]),
        (add_tensor, ["nothing of 'surplus'", "has F32[1]"]),
        (drop_tensor, ["'conv_in.weight'", "has nothing"]),
    ],
)
@pytest.mark.parametrize("update", [(), ("sha256",)])
def test_weights_that_the_index_does_not_describe_are_refused(damaged, change, message, update):
    tensors = load_file(damaged / "ticket_0.safetensors")
    change(tensors)
    put_tensors(damaged, tensors, update=update)
    with refused(damaged, "ensemble.json", "tickets[0].tensors", *message):
        load_ensemble(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.update({"conv_in.weight": torch.zeros(99, 1, 3, 3)}), "conv_in.weight"),
        (lambda tensors: tensors.update({"conv_in.weight": torch.zeros(8)}), "conv_in.weight"),
        (change_kind, "conv_in.weight"),
        (add_tensor, "surplus"),
        (drop_tensor, "conv_in.weight"),
    ],
    ids=["too wide", "too flat", "integers", "surplus", "missing"],
)
def test_weights_that_do_not_fit_the_network_are_refused_even_if_the_index_agrees(damaged, change, message):
    tensors = load_file(damaged / "ticket_0.safetensors")
    change(tensors)
    put_tensors(damaged, tensors, update=("sha256", "tensors"))
    with refused(damaged, "ensemble.json", "tickets[0]", message):
        load_ensemble(damaged)


def setting(*path):
    *owners, key, value = path

    def change(index):
        for owner in owners:
            index = index[owner]
        index[key] = value

    return change


def removing(*path):
    *owners, key = path

    def change(index):
        for owner in owners:
            index = index[owner]
        del index[key]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("format", "flax"), ["'format'", "is 'flax', expected", "something else"]),
        (removing("format"), ["'format'", "is missing"]),
        (setting("format_version", 2), ["'format_version'", "is 2", "reads up to 1; upgrade"]),
        (setting("format_version", "1"), ["'format_version'", "expected an integer"]),
        (setting("format_version", True), ["'format_version'", "expected an integer"]),
        (setting("format_version", 0), ["'format_version'", "at least 1"]),
        (removing("partition"), ["'partition'", "is missing"]),
        (setting("partition", "regions", 0, "stop", 500), ["'partition'", "overlap"]),
        (setting("partition", "regions", 0, "sparsity", 2), ["'partition'", "sparsity"]),
        (setting("partition", []), ["'partition'", "is not valid"]),
        (removing("timesteps", "name"), ["'timesteps.name'", "is missing"]),
        (setting("timesteps", "position", "1"), ["'timesteps.position'", "expected an integer"]),
        (
            setting("timesteps", {"name": None, "position": None, "trailing": 0}),
            ["'timesteps'", "at least one must be given"],
        ),
        (setting("sample_shape", [1, 0, 8]), ["'sample_shape[1]'", "at least 1"]),
        (setting("sample_shape", "large"), ["'sample_shape'", "expected an array"]),
        (removing("tickets", 2), ["'tickets'", "has 2 entries", "3 regions"]),
        (setting("tickets", 0, 7), ["'tickets[0]'", "expected an object"]),
        (setting("tickets", {}), ["'tickets'", "expected an array"]),
        (setting("tickets", 1, "file", 3), ["'tickets[1].file'", "expected a string"]),
        (removing("tickets", 1, "sha256"), ["'tickets[1].sha256'", "is missing"]),
        (setting("tickets", 1, "tensors", "conv_in.weight", 3), ["'tickets[1].tensors.conv_in.weight'", "string"]),
        (setting("tickets", 1, "memory_format", None), ["'tickets[1].memory_format'", "expected a string"]),
        (setting("tickets", 1, "facts", "step", -1), ["'tickets[1].facts.step'", "at least 0"]),
        (setting("tickets", 1, "facts", "emerged", 1), ["'tickets[1].facts.emerged'", "true or false"]),
        (setting("tickets", 1, "facts", "channels", [1]), ["'tickets[1].facts.channels'", "has 1 entries"]),
        (setting("tickets", 1, "facts", "region", 3), ["'tickets[1].facts.region'", "is not valid"]),
        (setting("tickets", 1, "facts", "region", "sparsity", 0.9), ["'tickets'", "facts that do not belong"]),
        (setting("tickets", 1, "facts", None), ["'tickets'", "facts that do not belong"]),
        (setting("tickets", 1, "groups", 0, "other"), ["'tickets[1].groups'", "without a mask", "other"]),
        (setting("tickets", 1, "groups", []), ["'tickets[1].groups'", "is not valid"]),
        (lambda index: index["tickets"][1]["groups"].pop(), ["'masks'", "unknown tickets or groups"]),
        (setting("masks", 5), ["'masks'", "expected an object"]),
        (setting("masks", "file", "../x"), ["'masks.file'", "plain name"]),
        (setting("denoiser", []), ["'denoiser'", "expected an object"]),
        (setting("denoiser", "library", "os"), ["'denoiser.library'", "is 'os', expected 'diffusers'"]),
        (setting("denoiser", "config", "in_chanels", 3), ["'denoiser.config'", "does not build", "in_chanels"]),
        (setting("denoiser", "config", "norm_num_groups", 3), ["'denoiser.config'", "does not build a UNet2DModel"]),
        (setting("denoiser", "config", "block_out_channels", [4, 8]), ["'tickets[0]'", "is not valid", "tensor"]),
    ],
)
def test_a_damaged_index_is_refused_by_file_and_field(damaged, change, message):
    edit(damaged, change)
    with refused(damaged, "damaged/ensemble.json: field", *message):
        load_ensemble(damaged)


def test_a_document_of_another_kind_is_refused(damaged):
    (damaged / "ensemble.json").write_text("[1, 2]")
    with refused(damaged, "ensemble.json: the document is [1, 2], expected an object"):
        load_ensemble(damaged)


@pytest.mark.parametrize(
    "name",
    [
        "DDPMPipeline",
        "DDPMScheduler",
        "ModelMixin",
        "os",
        "models",
        "__import__",
        "UNet2DModel.from_pretrained",
        "Nothing",
        "logging",
    ],
)
def test_only_models_of_diffusers_are_built(damaged, name):
    edit(damaged, setting("denoiser", "class", name))
    with refused(damaged, "ensemble.json", "'denoiser.class'", f"{name!r}, which is no model of"):
        load_ensemble(damaged)


@pytest.mark.parametrize(
    ("module", "attribute", "value", "message"),
    [
        ("conv_in", "forward", 3, ["conv_in.forward"]),
        ("conv_in", "__class__", 3, ["conv_in.__class__"]),
        ("conv_in", "weight", 3, ["conv_in.weight"]),
        ("conv_in", "padding", 3, ["conv_in.padding"]),
        ("", "training", 1, ["training"]),
        ("absent", "out_channels", 3, ["absent"]),
        ("conv_in", "out_channels", "8", ["tickets[1].edits.conv_in.out_channels", "expected an integer"]),
        ("conv_in", "out_channels", 0, ["tickets[1].edits.conv_in.out_channels", "at least 1"]),
        ("conv_in", "out_channels", True, ["tickets[1].edits.conv_in.out_channels", "expected an integer"]),
        ("conv_in", "out_channels", 4.0, ["tickets[1].edits.conv_in.out_channels", "expected an integer"]),
        ("conv_in", "out_channels", [4, "x"], ["tickets[1].edits.conv_in.out_channels[1]", "expected an integer"]),
        ("conv_in", "out_channels", {"a": 1}, ["tickets[1].edits.conv_in.out_channels", "expected an integer"]),
        ("conv_norm_out", "num_groups", 3, ["tickets[1]", "num_groups"]),
    ],
)
def test_attributes_that_are_not_widths_are_refused(damaged, module, attribute, value, message):
    edit(damaged, lambda index: index["tickets"][1]["edits"].setdefault(module, {}).update({attribute: value}))
    with refused(damaged, "ensemble.json", *message):
        load_ensemble(damaged)


def test_masks_of_another_dtype_are_refused(damaged):
    path = damaged / "masks.safetensors"
    tensors = {name: tensor.int() for name, tensor in load_file(path).items()}
    save_file(tensors, path)

    def change(index):
        index["masks"]["sha256"] = sha256_of(path)
        index["masks"]["tensors"] = {name: f"I32{list(tensor.shape)}" for name, tensor in tensors.items()}

    edit(damaged, change)
    with refused(damaged, "ensemble.json", "'tickets[0].groups'", "must be a bool tensor"):
        load_ensemble(damaged)


def test_a_mask_is_what_the_ticket_was_cut_with(ensemble, saved):
    mask = load_ensemble(saved).record.masks[1]
    assert isinstance(mask, TicketMask)
    assert int(mask.kept["conv_in"].sum()) == ensemble.tickets[1].conv_in.out_channels
