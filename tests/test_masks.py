import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_earlybird.masks import TicketMask


def mask_of(**groups: str) -> TicketMask:
    """Builds a mask from strings of 1 (kept) and 0."""
    return TicketMask({name: torch.tensor([bit == "1" for bit in bits]) for name, bits in groups.items()})


def test_counts_and_sparsity_are_over_all_groups():
    mask = mask_of(a="1100", b="111000")
    assert (mask.num_channels, mask.num_kept, mask.sparsity) == (10, 5, 0.5)


def test_sparsity_is_the_nearest_float_of_the_fraction_removed():
    assert mask_of(a="1111111000").sparsity == 0.3


def test_flat_is_a_new_tensor_in_group_order():
    mask = mask_of(b="10", a="011")
    flat = mask.flat()
    assert flat.dtype == torch.bool
    assert flat.int().tolist() == [1, 0, 0, 1, 1]
    flat.fill_(False)
    assert mask.num_kept == 3


def test_a_mask_is_unaffected_by_later_changes_to_the_mapping():
    groups = {"a": torch.tensor([True])}
    mask = TicketMask(groups)
    groups["b"] = torch.tensor([True])
    assert mask.num_channels == 1


def test_a_mask_is_frozen():
    with pytest.raises(AttributeError, match="cannot assign to field 'kept'"):
        mask_of(a="1").kept = {}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda mask: pickle.loads(pickle.dumps(mask))])
def test_a_mask_can_be_copied(clone):
    mask = mask_of(a="101", b="10")
    copied = clone(mask)
    assert copied.distance(mask) == 0
    assert copied.kept["a"] is not mask.kept["a"]


def test_a_mask_without_groups_is_refused():
    with pytest.raises(ValueError, match=r"kept=\{\} must name at least one channel group"):
        TicketMask({})


@pytest.mark.parametrize(
    "group", [torch.ones(3), torch.ones(3, dtype=torch.uint8), torch.ones(3, 1, dtype=torch.bool), torch.tensor(True)]
)
def test_a_group_that_is_no_bool_vector_is_refused_by_name(group):
    with pytest.raises(ValueError, match=r"kept\['conv'\] \(torch.*, shape .*\) must be a bool tensor of shape"):
        TicketMask({"conv": group})


def test_a_group_that_is_no_tensor_is_refused_by_name():
    with pytest.raises(ValueError, match=r"kept\['conv'\] \(\[True\]\) must be a bool tensor of shape \(channels,\)"):
        TicketMask({"conv": [True]})


def test_a_group_on_another_device_is_refused_by_name():
    with pytest.raises(ValueError, match=r"kept\['conv'\] is on meta, but masks live on the CPU. Call .cpu\(\)"):
        TicketMask({"conv": torch.ones(3, dtype=torch.bool, device="meta")})


@pytest.mark.parametrize("size", [0, 4])
def test_a_group_that_keeps_nothing_is_refused_by_name(size):
    with pytest.raises(ValueError, match=rf"kept\['conv'\] keeps none of its {size} channels"):
        TicketMask({"other": torch.tensor([True]), "conv": torch.zeros(size, dtype=torch.bool)})


def test_distance_is_the_fraction_of_channels_that_differ():
    assert mask_of(a="1100", b="111000").distance(mask_of(a="1010", b="111001")) == 3 / 10


def test_distance_pairs_groups_by_name_not_by_order():
    first, second = mask_of(a="10", b="01"), mask_of(b="01", a="10")
    assert first.distance(second) == second.distance(first) == 0


def test_a_complement_is_at_distance_one():
    assert mask_of(a="10").distance(mask_of(a="01")) == 1


bits = st.lists(st.booleans(), min_size=12, max_size=12)


@given(values=st.tuples(bits, bits, bits))
def test_distance_is_a_metric(values):
    # A last channel kept in all keeps the masks valid; it adds nothing to any distance.
    a, b, c = (TicketMask({"g": torch.tensor([*value, True])}) for value in values)
    assert a.distance(a) == 0
    assert a.distance(b) == b.distance(a)
    assert (a.distance(b) == 0) == torch.equal(a.flat(), b.flat())
    assert a.distance(c) <= a.distance(b) + b.distance(c) + 1e-12


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (mask_of(a="10"), "group 'b': 2 channels against 0"),
        (mask_of(a="10", b="10", c="1"), "group 'c': 0 channels against 1"),
        (mask_of(a="10", b="101"), "group 'b': 2 channels against 3"),
    ],
)
def test_masks_over_other_groups_are_refused_by_the_name_of_the_group(other, message):
    with pytest.raises(ValueError, match=f"The masks differ in {message}"):
        mask_of(a="10", b="01").distance(other)


def test_the_null_distance_is_two_s_one_minus_s_per_group_weighted_by_size():
    # Group a: s = 1/2, so 0.5 over 4 channels; group b: s = 3/4, so 0.375 over 8.
    mask = mask_of(a="1100", b="11000000")
    assert mask.null_distance() == pytest.approx((4 * 0.5 + 8 * 0.375) / 12, abs=1e-15)
    assert mask_of(a="1111").null_distance() == 0
    assert mask_of(a="1100").null_distance() == 0.5


def test_the_null_distance_is_what_random_masks_show():
    generator = torch.Generator().manual_seed(0)

    def random_mask() -> TicketMask:
        counts = {"a": (30, 20), "b": (80, 20)}
        return TicketMask({g: torch.randperm(n, generator=generator) < kept for g, (n, kept) in counts.items()})

    distances = torch.tensor([random_mask().distance(random_mask()) for _ in range(400)])
    standard_error = float(distances.std()) / math.sqrt(len(distances))
    assert abs(float(distances.mean()) - random_mask().null_distance()) < 4 * standard_error


def test_the_state_survives_a_weights_only_load(tmp_path):
    mask = mask_of(**{"down.0": "1010", "mid": "111"})
    torch.save(mask.state_dict(), tmp_path / "mask.pt")
    loaded = TicketMask.from_state_dict(torch.load(tmp_path / "mask.pt", weights_only=True))
    assert list(loaded.kept) == ["down.0", "mid"]
    assert all(torch.equal(loaded.kept[name], group) for name, group in mask.kept.items())


def test_a_damaged_state_is_refused():
    with pytest.raises(ValueError, match=r"kept\['mid'\] \(torch.float32"):
        TicketMask.from_state_dict({"mid": torch.ones(2)})
