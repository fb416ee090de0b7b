import os

import pytest
import torch
from checkpoint_mutations import NAME, Network, Small, cycle, fresh, laughs
from hostile_checkpoints import CheckpointVictim, look
from mutations import small_ensemble

from lightning_earlybird import EnsembleFormatError, TicketEnsembleSampler, load_from_checkpoint
from lightning_earlybird.checkpointing import restore_structure
from lightning_earlybird.files import plain_copy
from lightning_earlybird.saved_structure import CHECKPOINT_KEY, write_structure

MUTATIONS = 400


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    return CheckpointVictim(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def path(victim):
    """The victim's checkpoint, whole, for damage by hand."""
    fresh(victim.good, victim.folder)
    return victim.folder / NAME


@pytest.mark.slow
def test_hundreds_of_damaged_checkpoints_are_refused_or_loaded_as_what_they_say(victim):
    mutations = victim.mutations(MUTATIONS)
    victim.run(mutations)

    assert sum(victim.counts.values()) == len(mutations) >= 350
    kinds = {kind for kind, _ in victim.counts}
    assert len(kinds) >= 11
    assert sum(count for (_, outcome), count in victim.counts.items() if outcome == "refused") > 150
    assert sum(count for (_, outcome), count in victim.counts.items() if outcome == "loaded") > 40
    assert victim.growth_bytes < 400 * 2**20


def edit(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def both_refuse(path, message):
    from_checkpoint = TicketEnsembleSampler.from_checkpoint
    for read, arguments in ((from_checkpoint, (path, Network)), (load_from_checkpoint, (Small, path))):
        with pytest.raises(EnsembleFormatError, match=message) as caught:
            read(*arguments)
        assert str(path) in str(caught.value) and str(caught.value).isprintable()


def test_a_list_that_is_in_itself_many_times_over_is_not_written_out(path):
    edit(path, lambda c: c[CHECKPOINT_KEY]["record"].update(sample_shape=laughs(12)))
    both_refuse(path, "holds what no checkpoint of tickets does: it has more than 500,000 values")
    with pytest.raises(ValueError, match="more than 64 levels"):
        plain_copy(cycle())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1: 2}, "it has the key 1, expected strings only"),
        (torch.zeros(2), "it has a Tensor in it"),
        (float("nan"), "it has a float in it, nan"),
    ],
)
def test_only_what_json_could_carry_is_taken_from_a_checkpoint(path, value, message):
    edit(path, lambda c: c[CHECKPOINT_KEY].update(partition=value))
    both_refuse(path, message)


def test_a_bound_of_thousands_of_digits_is_refused(path):
    edit(path, lambda c: c[CHECKPOINT_KEY]["partition"].update(overlap=10**400))
    both_refuse(path, "overlap is an integer of 1329 bits, and must fit into 64")


def test_a_record_in_pairs_is_refused(path):
    edit(path, lambda c: c[CHECKPOINT_KEY].update(record=list(c[CHECKPOINT_KEY]["record"].items())))
    both_refuse(path, "expected an object")


def test_a_queue_in_the_place_of_a_checkpoint_does_not_keep_anyone_waiting(path):
    path.unlink()
    os.mkfifo(path)
    both_refuse(path, "is no regular file")


def test_a_tensor_that_repeats_one_number_does_not_count_as_many(tmp_path):
    """A network as large as the tickets claim to be is not built for a few bytes."""
    ensemble = small_ensemble()
    state = {f"model.{name}": tensor for name, tensor in ensemble.state_dict().items()}
    structure = write_structure("model", ensemble)
    structure["record"]["denoiser"]["config"]["block_out_channels"] = [1024]
    name = "model.tickets.0.mid_block.resnets.0.conv1.weight"
    state[name] = torch.zeros(1, 1, 1, 1).expand(1024, 1024, 3, 3)
    torch.save({"state_dict": state, CHECKPOINT_KEY: structure}, tmp_path / "last.ckpt")
    with pytest.raises(EnsembleFormatError, match=r"denoiser' builds a network of 654,622,724 bytes for tickets"):
        TicketEnsembleSampler.from_checkpoint(tmp_path / "last.ckpt")


def test_a_network_that_tickets_do_not_fit_is_a_fault_of_the_file_that_describes_both(tmp_path):
    ensemble = small_ensemble()
    state = {f"model.{name}": tensor for name, tensor in ensemble.state_dict().items()}
    structure = write_structure("model", ensemble)
    torch.save({"state_dict": state, CHECKPOINT_KEY: structure}, tmp_path / "good.ckpt")
    assert len(TicketEnsembleSampler.from_checkpoint(tmp_path / "good.ckpt").tickets) == 2
    structure["record"]["denoiser"]["config"]["block_out_channels"] = [4]
    torch.save({"state_dict": state, CHECKPOINT_KEY: structure}, tmp_path / "last.ckpt")
    with pytest.raises(EnsembleFormatError, match=r"denoiser' builds a network that the tickets do not fit: tensor"):
        TicketEnsembleSampler.from_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_a_refused_checkpoint_leaves_the_module_as_it_was(victim, which):
    module = getattr(victim, which)
    before, model = look(module), module.model
    checkpoint = torch.load(victim.good, weights_only=True)
    checkpoint["state_dict"]["model.tickets.1.conv_in.weight"] = torch.zeros(9, 1, 3, 3)
    checkpoint["current_model_state"]["model.tickets.1.conv_in.weight"] = torch.zeros(9, 1, 3, 3)
    with pytest.raises(Exception, match=r"conv_in|other shapes"):
        restore_structure(None, module, checkpoint)
    assert module.model is model and look(module) == before
