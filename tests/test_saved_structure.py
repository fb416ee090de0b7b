"""What a checkpoint says of tickets: older and newer formats, and descriptions that nobody vouches for."""

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from modules import ConvNet, Lit, Mlp
from torch import Tensor, nn

from lightning_earlybird import EnsembleFormatError, TicketEnsemble, TicketMask
from lightning_earlybird.checkpointing import restore_structure, save_structure
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.records import EnsembleRecord, TicketFacts
from lightning_earlybird.regions import TimestepPartition
from lightning_earlybird.saved_structure import CHECKPOINT_KEY, CHECKPOINT_VERSION, SavedStructure
from lightning_earlybird.structure import attribute_edits, extract, trace_plan

CALL = torch.linspace(-1, 1, 64).view(4, 1, 4, 4), torch.tensor([0, 299, 300, 999])
PARTITION = TimestepPartition.of([(0, 300, 0.5), (300, 1000, 0.5)])


def with_tickets(partition: TimestepPartition = PARTITION) -> Lit:
    """A module whose denoiser has become two tickets, as the switch makes it."""
    module = Lit()
    dense = module.model
    plan = trace_plan(dense, CALL)
    half = {name: torch.arange(len(kept)) % 2 == 0 for name, kept in plan.full_mask().kept.items()}
    masks = (TicketMask(half), plan.full_mask())
    tickets = [extract(dense, plan, mask) for mask in masks]
    facts = tuple(
        TicketFacts(region, 4, True, (mask.num_channels, mask.num_kept), (2, 1), None, "macs")
        for region, mask in zip(partition, masks, strict=True)
    )
    edits = tuple(attribute_edits(dense, ticket) for ticket in tickets)
    module.model = TicketEnsemble(tickets, partition, TimestepArgument("timesteps", 1))
    module.model.record = EnsembleRecord(None, edits, masks, facts, (1, 4, 4))
    return module


def saved(module: nn.Module) -> dict[str, Any]:
    checkpoint = {"state_dict": dict(module.state_dict())}
    save_structure(module, checkpoint)
    return checkpoint


@pytest.fixture
def checkpoint() -> dict[str, Any]:
    return saved(with_tickets())


# --- formats ----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(checkpoint: dict[str, Any]) -> None:
    trained, module = with_tickets(), Lit()
    restore_structure(None, module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    assert module.model.partition == PARTITION and module.model.record.facts == trained.model.record.facts
    assert torch.equal(module.eval().model(*CALL), trained.eval().model(*CALL))
    assert checkpoint[CHECKPOINT_KEY]["format_version"] == CHECKPOINT_VERSION == 2


def _first(checkpoint: dict[str, Any]) -> None:
    """The first format, as it was written until timesteps came in other shapes and sparsities counted other things."""
    stored = checkpoint[CHECKPOINT_KEY]
    stored["format_version"] = 1
    del stored["absent"], stored["timesteps"]["trailing"]
    for facts in stored["record"]["facts"]:
        del facts["target"]


def _second(checkpoint: dict[str, Any]) -> None:
    """The first format, as it was written until ranks could train tickets apart."""
    checkpoint[CHECKPOINT_KEY]["format_version"] = 1
    del checkpoint[CHECKPOINT_KEY]["absent"]


def _third(checkpoint: dict[str, Any]) -> None:
    """The first format, as it was written until there was a second."""
    checkpoint[CHECKPOINT_KEY]["format_version"] = 1


@pytest.mark.parametrize(("age", "target"), [(_first, "channels"), (_second, "macs"), (_third, "macs")])
def test_older_formats_are_read(age: Callable[[dict[str, Any]], None], target: str, checkpoint: dict[str, Any]) -> None:
    expected = SavedStructure.read(checkpoint, "x")
    age(checkpoint)
    before = copy.deepcopy({key: value for key, value in checkpoint[CHECKPOINT_KEY].items() if key != "masks"})
    structure = SavedStructure.read(checkpoint, "x")
    assert (structure.partition, structure.timesteps, structure.shapes) == (
        expected.partition,
        expected.timesteps,
        expected.shapes,
    )
    assert structure.absent == frozenset() and structure.timesteps.trailing == 0
    assert [facts.target for facts in structure.record.facts] == [target, target]
    module = Lit()
    restore_structure(None, module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    assert {key: value for key, value in checkpoint[CHECKPOINT_KEY].items() if key != "masks"} == before


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, "is 3, but this version of lightning-earlybird reads up to 2; upgrade it"),
        (0, "is 0, expected an integer of at least 1"),
        (-1, "is -1, expected an integer of at least 1"),
        (True, "is True, expected an integer of at least 1"),
        ("2", "is '2', expected an integer"),
        (2.0, "is 2.0, expected an integer"),
        (None, "is None, expected an integer"),
        (torch.tensor(2), r"is tensor\(2\), expected an integer"),
    ],
)
def test_formats_that_are_none_are_refused_by_name(version: Any, message: str, checkpoint: dict[str, Any]) -> None:
    checkpoint[CHECKPOINT_KEY]["format_version"] = version
    with pytest.raises(EnsembleFormatError, match=rf"x\.ckpt: field 'lightning_earlybird\.format_version' {message}"):
        SavedStructure.read(checkpoint, "x.ckpt")
    del checkpoint[CHECKPOINT_KEY]["format_version"]
    with pytest.raises(EnsembleFormatError, match=r"field 'lightning_earlybird\.format_version' is missing"):
        SavedStructure.read(checkpoint, "x.ckpt")


def test_bounds_that_are_numbers_of_numpy_are_written_as_plain_ones(tmp_path: Any) -> None:
    bounds = np.linspace(0.0, 1000.0, 3)
    partition = TimestepPartition.of([(bounds[0], bounds[1], np.float64(0.5)), (bounds[1], bounds[2], 0.5)])
    torch.save(saved(with_tickets(partition)), tmp_path / "numpy.ckpt")
    loaded = torch.load(tmp_path / "numpy.ckpt", weights_only=True)
    assert SavedStructure.read(loaded, "x").partition == partition


# --- what nobody vouches for ------------------------------------------------------------------------------------------


def _deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    return value


def _cycle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


TICKETS = "model.tickets."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The description.
        (lambda s, w: s.update(denoiser=3), "field 'lightning_earlybird.denoiser' is 3, expected a string"),
        (lambda s, w: s.update(denoiser=""), "field 'lightning_earlybird.denoiser' is empty"),
        (lambda s, w: s.pop("partition"), "field 'lightning_earlybird.partition' is missing"),
        (lambda s, w: s.update(partition=[]), "'lightning_earlybird.partition' is not valid: A partition needs"),
        (lambda s, w: s["partition"].update(overlap=-1), "partition' is not valid: overlap=-1"),
        (lambda s, w: s["partition"].update(overlap=torch.ones(2)), "'lightning_earlybird' holds what no checkpoint"),
        (lambda s, w: s["partition"].update(overlap=float("nan")), "'lightning_earlybird' holds what no checkpoint"),
        (lambda s, w: s["partition"].update(overlap=b"0"), "'lightning_earlybird' holds what no checkpoint"),
        (lambda s, w: s["partition"].update(overlap=_deep()), "'lightning_earlybird' holds what no checkpoint"),
        (lambda s, w: s["partition"].update(overlap=_cycle()), "'lightning_earlybird' holds what no checkpoint"),
        (lambda s, w: s.update(timesteps=None), "'lightning_earlybird.timesteps"),
        (lambda s, w: s["timesteps"].update(trailing=-1), "timesteps.trailing' is -1, expected an integer of at least"),
        (lambda s, w: s["timesteps"].update(name=None, position=None), "timesteps' is not valid: TimestepArgument"),
        (lambda s, w: s.pop("record"), "field 'lightning_earlybird.record' is missing"),
        (lambda s, w: s["record"]["edits"].pop(), "'lightning_earlybird.record' is not valid: .* 1 edits, 2 masks"),
        (lambda s, w: s["record"]["facts"].pop(), "'lightning_earlybird.record' is not valid: .* 2 masks and 1 facts"),
        (lambda s, w: s["record"]["facts"].reverse(), "'lightning_earlybird.record"),
        (lambda s, w: s["record"]["facts"][0].update(step="x"), r"record' is not valid: .*'facts\[0\].step' is 'x'"),
        (lambda s, w: s["record"].update(sample_shape=[0]), r"record' is not valid: .*'sample_shape\[0\]' is 0"),
        # The masks.
        (lambda s, w: s.update(masks=None), "field 'lightning_earlybird.masks' is None, expected an array"),
        (lambda s, w: s["masks"].pop(), "'lightning_earlybird.record' is not valid: .* 2 edits, 1 masks"),
        (lambda s, w: s["masks"].reverse(), "the mask of ticket 0 keeps 32 of 32 channels, but its facts say 16 of 32"),
        (lambda s, w: s["masks"][0].update(conv_in=3), r"masks\[0\].conv_in' is a int, expected a tensor"),
        (lambda s, w: s["masks"][0].update({5: torch.ones(4, dtype=torch.bool)}), r"masks\[0\]' has the key 5"),
        (lambda s, w: s["masks"][0].update(x=torch.ones(4)), r"masks\[0\]' is not valid: kept\['x'\] \(torch.float32"),
        (lambda s, w: s["masks"][1].update(x=torch.ones(4, dtype=torch.bool)), "The masks differ in group 'x'"),
        (
            lambda s, w: s["masks"][0].update(x=torch.ones(1, dtype=torch.bool).expand(10**12)),
            r"masks\[0\].x' claims 1000000000000 channels, more than it holds",
        ),
        (
            lambda s, w: s["masks"][0].update(x=torch.ones(4).bool().to_sparse()),
            "is a tensor of layout torch.sparse_coo",
        ),
        # Tickets that other ranks trained.
        (lambda s, w: s.update(absent={"2": {"a": [1]}}), "absent' names the ticket '2', but there are 2"),
        (lambda s, w: s.update(absent={"0": {"a": [1]}}), "'state_dict' holds weights of ticket 0, which is absent"),
        (lambda s, w: s.update(absent={"0": {}}), "absent.0' is empty"),
        (lambda s, w: s.update(absent={"0": {"a": [-1]}}), r"absent.0.a\[0\]' is -1"),
        (lambda s, w: s.update(absent={"0": {"a": [1]}, "1": {"a": [1]}}), "absent' names every ticket"),
        # The weights.
        (lambda s, w: w.update({f"{TICKETS}2.conv_in.bias": torch.ones(1)}), "belongs to none of the 2 tickets"),
        (lambda s, w: w.update({f"{TICKETS}01.conv_in.bias": torch.ones(1)}), "belongs to none of the 2 tickets"),
        (lambda s, w: w.update({f"{TICKETS}-1.conv_in.bias": torch.ones(1)}), "belongs to none of the 2 tickets"),
        (lambda s, w: w.update({f"{TICKETS}0": torch.ones(1)}), "belongs to none of the 2 tickets"),
        (lambda s, w: w.update({"model.conv_in.bias": torch.ones(1)}), "belongs to none of the 2 tickets"),
        (lambda s, w: w.update({f"{TICKETS}0.conv_in.bias": [1.0]}), "conv_in.bias' is a list, expected a tensor"),
        (
            lambda s, w: w.update({f"{TICKETS}0.conv_in.bias": torch.empty(8, device="meta")}),
            "conv_in.bias' is a tensor of layout torch.strided on meta",
        ),
        (lambda s, w: w.clear(), "'state_dict' holds no weights of ticket 0, which is not absent"),
        (lambda s, w: w.update({7: torch.ones(1)}), "'state_dict' has the key 7, expected names of tensors only"),
    ],
)
def test_a_damaged_description_is_refused_by_field(
    change: Callable[[Any, Any], Any], message: str, checkpoint: dict[str, Any]
) -> None:
    change(checkpoint[CHECKPOINT_KEY], checkpoint["state_dict"])
    module = Lit()
    before = [id(parameter) for parameter in module.parameters()]
    with pytest.raises(EnsembleFormatError, match=rf"^odd\.ckpt: .*{message}"):
        restore_structure(None, module, checkpoint, "odd.ckpt")
    assert type(module.model) is ConvNet and [id(parameter) for parameter in module.parameters()] == before


def _widen(weights: dict[str, Tensor], factor: int) -> None:
    weights[f"{TICKETS}0.conv_in.bias"] = torch.ones(1).expand(factor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, w: s.update(denoiser="net"), "'net'"),
        (lambda s, w: w.pop(f"{TICKETS}0.conv_in.bias"), "tensor 'conv_in.bias' is missing from the shapes"),
        (lambda s, w: w.update({f"{TICKETS}0.extra": torch.ones(1)}), "tensor 'extra' is not a tensor of the network"),
        (lambda s, w: _widen(w, 10**12), r"'conv_in.bias' has shape \(1000000000000,\), which is no part of"),
        (lambda s, w: w.update({f"{TICKETS}0.conv_in.bias": torch.ones(8).long()}), "is torch.int64, but the network"),
        (lambda s, w: w.update({f"{TICKETS}0.conv_in.bias": torch.ones(8).bool()}), "is torch.bool, but the network"),
        (
            lambda s, w: w.update({f"{TICKETS}0.conv_in.bias": torch.ones(8).to(torch.float8_e5m2)}),
            "is torch.float8_e5m2, but the network",
        ),
        (lambda s, w: s["record"]["edits"][0].update(nowhere={"x": 1}), "module 'nowhere' is not in the network"),
        (lambda s, w: s["record"]["edits"][0].update(norm={"eps": 1}), "norm.eps is not a width that a ticket may"),
        (lambda s, w: s["record"]["edits"][0].update(norm={"num_groups": 3}), "norm.num_groups = 3 does not divide"),
        (lambda s, w: s["record"]["edits"][0].update(norm={"group_sizes": [1]}), "adds up to 1 channels"),
    ],
)
def test_a_description_that_does_not_fit_leaves_the_module_as_it_was(
    change: Callable[[Any, Any], Any], message: str, checkpoint: dict[str, Any]
) -> None:
    change(checkpoint[CHECKPOINT_KEY], checkpoint["state_dict"])
    if checkpoint[CHECKPOINT_KEY]["denoiser"] == "net":
        checkpoint["state_dict"] = {
            f"net{name.removeprefix('model')}": v for name, v in checkpoint["state_dict"].items()
        }
    module = Lit()
    before = [id(parameter) for parameter in module.parameters()]
    with pytest.raises(MisconfigurationException, match=f"checkpoint_path: the tickets .* do not fit .*{message}"):
        restore_structure(None, module, checkpoint)
    assert type(module.model) is ConvNet and [id(parameter) for parameter in module.parameters()] == before


def test_live_weights_of_other_shapes_than_the_averaged_ones_are_refused(checkpoint: dict[str, Any]) -> None:
    checkpoint["current_model_state"] = dict(checkpoint["state_dict"])
    restore_structure(None, Lit(), checkpoint)
    checkpoint["current_model_state"][f"{TICKETS}0.conv_in.bias"] = torch.ones(1)
    with pytest.raises(EnsembleFormatError, match="field 'current_model_state' holds tickets of other shapes than"):
        restore_structure(None, Lit(), checkpoint)


def test_tickets_elsewhere_in_the_module_are_refused(checkpoint: dict[str, Any]) -> None:
    module = with_tickets()
    module.net = module.model
    del module.model
    with pytest.raises(MisconfigurationException, match="its tickets stand in 'model', but the module has tickets in"):
        restore_structure(None, module, checkpoint)


def test_tickets_of_which_nothing_is_said_are_refused(checkpoint: dict[str, Any]) -> None:
    del checkpoint[CHECKPOINT_KEY]
    message = (
        r"holds tickets \('model.tickets.0.conv_in.bias'\) that it does not describe: .* Load an earlier checkpoint"
    )
    with pytest.raises(MisconfigurationException, match=message):
        restore_structure(None, Lit(), checkpoint)

    class Own(Lit):
        """Has something of that name itself."""

        def __init__(self) -> None:
            super().__init__(Mlp)
            self.tickets = nn.ModuleList([nn.Linear(2, 2)])

    module = Own()
    restore_structure(None, module, {"state_dict": module.state_dict()})


def test_the_description_is_what_json_carries(checkpoint: dict[str, Any]) -> None:
    described = {key: value for key, value in checkpoint[CHECKPOINT_KEY].items() if key != "masks"}
    assert json.loads(json.dumps(described)) == described
