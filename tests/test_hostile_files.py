import json
import os
import shutil

import pytest
import torch
from hostile import Supervisor, Victim
from mutations import INDEX, read_index, repair, write_index
from safetensors.torch import load_file, save_file

from lightning_earlybird.tickets import EnsembleFormatError, check_target, load_ensemble

MUTATIONS = 1050


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    return Victim(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def folder(victim):
    """The victim's directory, whole, for damage by hand."""
    shutil.rmtree(victim.folder, ignore_errors=True)
    return shutil.copytree(victim.good, victim.folder)


@pytest.mark.slow
def test_thousands_of_damaged_ensembles_are_refused_or_loaded_as_what_they_say(victim):
    mutations = victim.mutations(MUTATIONS)
    victim.run(mutations)

    tried = sum(victim.counts.values())
    assert tried == len(mutations) >= 1000
    kinds = {kind for kind, _ in victim.counts}
    assert len(kinds) == 20
    assert all(victim.counts[kind, "refused"] > 0 for kind in kinds)
    # The judge sees both outcomes: damage without a meaning is not all that there is.
    assert sum(count for (_, outcome), count in victim.counts.items() if outcome == "loaded") > 50
    assert victim.growth_bytes < 400 * 2**20


def test_the_supervision_notices_files_outside_and_execution(victim, folder, tmp_path):
    with Supervisor.get().confined_to(folder) as violations:
        (folder / INDEX).read_bytes()
        assert violations == []
        (victim.outside / INDEX).read_bytes()
        (folder / "link").symlink_to(victim.outside / INDEX)
        (folder / "link").read_bytes()
        (folder / "new").write_bytes(b"")
        os.mkdir(tmp_path / "made")
        os.system("true")
    assert [violation.split()[0] for violation in violations] == [
        "open",
        "os.symlink",
        "open",
        "open",
        "os.mkdir",
        "os.system",
    ]


def edit(folder, change):
    index = read_index(folder)
    change(index)
    write_index(folder, index)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_out_channels": [2**20]}, "builds a network of 686,095,574,499,332 bytes for tickets of 48,320 bytes"),
        ({"block_out_channels": [1024]}, "builds a network of 654,622,724 bytes for tickets of"),
        ({"layers_per_block": 2**24}, "does not build a UNet2DModel: it has many more layers than its tickets"),
        ({"layers_per_block": 2**25}, "a setting is above 16,777,216; pass denoiser="),
    ],
)
def test_a_network_that_is_too_large_for_its_tickets_is_never_built(folder, config, message):
    edit(folder, lambda index: index["denoiser"]["config"].update(config))
    with pytest.raises(EnsembleFormatError, match=message):
        load_ensemble(folder)


def test_what_a_constructor_allocates_besides_parameters_counts_too(folder, monkeypatch):
    import diffusers

    init = diffusers.UNet2DModel.__init__

    def greedy(self, **config):
        init(self, **config)
        self.table = torch.zeros(2**26)

    monkeypatch.setattr(diffusers.UNet2DModel, "__init__", greedy)
    with pytest.raises(EnsembleFormatError, match=r"builds a network of 268,\d\d\d,\d\d\d bytes"):
        load_ensemble(folder)


def test_networks_that_are_built_meanwhile_are_not_counted(folder):
    """The limit holds for the network of the file, not for those of other threads."""
    import threading

    from lightning_earlybird.descriptions import _no_more_parts

    built = []
    with _no_more_parts(0):
        thread = threading.Thread(target=lambda: built.append(torch.nn.Linear(2, 2)))
        thread.start()
        thread.join()
        with pytest.raises(Exception, match="many more layers than its tickets have tensors"):
            torch.nn.Linear(2, 2)
    assert len(built) == 1
    torch.nn.Linear(2, 2)


def test_one_file_does_not_become_many_tickets(folder):
    edit(
        folder,
        lambda index: index["tickets"].__setitem__(1, {**index["tickets"][0], "facts": index["tickets"][1]["facts"]}),
    )
    with pytest.raises(
        EnsembleFormatError, match=r"tickets\[1\].file' names 'ticket_0.safetensors', as another ticket"
    ):
        load_ensemble(folder)


@pytest.mark.parametrize("name", [INDEX, "ticket_0.safetensors", "masks.safetensors"])
def test_links_are_not_followed_and_the_remedy_is_named(victim, folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to(victim.outside / name)
    with pytest.raises(EnsembleFormatError, match=r"is a link.*may lead out of the directory: copy it with `cp -rL`"):
        load_ensemble(folder)
    shutil.copytree(folder, folder.parent / "resolved")
    load_ensemble(folder.parent / "resolved")
    shutil.rmtree(folder.parent / "resolved")


def test_a_directory_may_itself_be_reached_by_a_link(victim, tmp_path):
    (tmp_path / "link").symlink_to(victim.good)
    load_ensemble(tmp_path / "link")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "an object has the same key twice"),
        ('{"a": 1e999}', "1e999 is too large for a number"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ("[" * 100 + "]" * 100, "is nested more than 64 levels deep"),
        (" " * (2**26 + 1), r"has more than 67,108,864 bytes"),
        ('{"format": "\\u001b[2J\\ud800"}', r"field 'format' is '\\x1b\[2J\\ud800', expected"),
        ('{"format": "lightning-earlybird ensemble", "format_version": 9223372036854775808}', "is 9223372036854775808"),
    ],
)
def test_json_that_python_would_read_is_refused(folder, text, message):
    (folder / INDEX).write_text(text)
    with pytest.raises(EnsembleFormatError, match=message) as caught:
        load_ensemble(folder)
    assert str(caught.value).isprintable()


def test_messages_about_keys_do_not_steer_the_terminal(folder):
    edit(folder, lambda index: index["tickets"][0]["tensors"].update({"\x1b[2J\ud800": 5}))
    with pytest.raises(EnsembleFormatError, match=r"tensors.\\x1b\[2J\\ud800' is 5, expected a string"):
        load_ensemble(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_loaded_as_they_were_saved(folder, value):
    found = load_file(folder / "ticket_1.safetensors")
    found["conv_in.bias"][1] = value
    save_file(found, folder / "ticket_1.safetensors")
    repair(folder)
    loaded = load_ensemble(folder).tickets[1].conv_in.bias
    torch.testing.assert_close(loaded.data, found["conv_in.bias"], rtol=0, atol=0, equal_nan=True)


def changed_masks(folder, change):
    masks = load_file(folder / "masks.safetensors")
    change(masks)
    save_file(masks, folder / "masks.safetensors")
    repair(folder, kinds=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update({"0/conv_in": m["0/conv_in"][:-1].clone()}),
            r"field 'masks' is not valid: the mask of ticket 0 keeps 98 of 135 channels, but its facts say 99 of 136",
        ),
        (lambda m: m["1/conv_in"].fill_(True), r"the mask of ticket 1 keeps .* but its facts say .* do not belong"),
        (
            lambda m: m["1/conv_in"].view(torch.uint8).fill_(2),
            "'1/conv_in' holds bytes that are neither true nor false",
        ),
    ],
    ids=["length", "count", "bytes"],
)
def test_masks_that_do_not_fit_are_refused(folder, change, message):
    changed_masks(folder, change)
    with pytest.raises(EnsembleFormatError, match=message):
        load_ensemble(folder)


def test_masks_of_different_networks_are_refused(folder):
    changed_masks(folder, lambda m: m.update({"1/conv_in": torch.tensor([True, False])}))
    edit(folder, lambda index: [entry.update(facts=None) for entry in index["tickets"]])
    with pytest.raises(EnsembleFormatError, match="The masks differ in group 'conv_in': 8 channels against 2"):
        load_ensemble(folder)


def test_a_group_may_be_named_once(folder):
    edit(folder, lambda index: index["tickets"][0]["groups"].append(index["tickets"][0]["groups"][0]))
    with pytest.raises(EnsembleFormatError, match=r"tickets\[0\].groups' names a group twice"):
        load_ensemble(folder)


def test_another_memory_format_is_refused(folder):
    edit(folder, lambda index: index["tickets"][0].update(memory_format="channels_first"))
    with pytest.raises(EnsembleFormatError, match="memory_format' is 'channels_first', expected 'channels_last' or"):
        load_ensemble(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32, torch.bool])
def test_weights_that_no_layer_computes_in_are_refused(folder, dtype):
    found = load_file(folder / "ticket_0.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in found.items()}, folder / "ticket_0.safetensors")
    repair(folder, kinds=True)
    with pytest.raises(EnsembleFormatError, match=r"tickets\[0\].tensors' says .* but the network has torch.float32"):
        load_ensemble(folder)


def test_directories_that_pose_as_files_of_an_ensemble_are_not_replaced(folder):
    (folder / "ticket_1.safetensors").unlink()
    (folder / "ticket_1.safetensors").mkdir()
    with pytest.raises(
        FileExistsError, match=r"other files, which replacing it would delete: \['ticket_1.safetensors'\]"
    ):
        check_target(folder)


def test_a_sample_shape_that_nothing_has_is_refused(folder):
    edit(folder, lambda index: index.update(sample_shape=[3, 2**20, 2**20]))
    with pytest.raises(EnsembleFormatError, match=r"'sample_shape' is the shape of 3e\+12 numbers in 3 dimensions"):
        load_ensemble(folder)


def test_json_written_by_hand_is_read_as_before(folder):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index, indent=4, sort_keys=True))
    load_ensemble(folder)
