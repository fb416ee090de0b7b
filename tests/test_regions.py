import itertools
import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_earlybird.regions import TimestepPartition, TimestepRegion

PAPER = [(0, 240, 0.3), (240, 440, 0.6), (440, 1000, 0.8)]


def widths_to_partition(widths: list[int], overlap: float = 0) -> TimestepPartition:
    edges = [0]
    for width in widths:
        edges.append(edges[-1] + width)
    return TimestepPartition.of([(a, b, 0.5) for a, b in itertools.pairwise(edges)], overlap)


def test_a_region_stores_what_it_was_given():
    region = TimestepRegion(0, 240, sparsity=0.3, max_steps=10)
    assert (region.start, region.stop, region.sparsity, region.max_steps) == (0, 240, 0.3, 10)
    assert TimestepRegion(-math.inf, math.inf, 0).max_steps is None


@pytest.mark.parametrize("bounds", [(5, 5), (6, 5), (math.inf, math.inf)])
def test_an_empty_region_is_refused(bounds):
    with pytest.raises(ValueError, match=r"TimestepRegion\(start=.*, stop=.*\) is empty: start must be below stop"):
        TimestepRegion(*bounds, sparsity=0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, math.inf])
def test_a_sparsity_outside_zero_to_one_is_refused(sparsity):
    message = re.escape(f"TimestepRegion(sparsity={sparsity!r}) must lie in [0, 1)")
    with pytest.raises(ValueError, match=message):
        TimestepRegion(0, 1, sparsity)


@pytest.mark.parametrize("value", [math.nan, None, "10", True])
@pytest.mark.parametrize("name", ["start", "stop", "sparsity"])
def test_a_bound_or_sparsity_that_is_no_number_is_refused(name, value):
    arguments = {"start": 0, "stop": 1, "sparsity": 0.5, name: value}
    with pytest.raises(ValueError, match=f"^{name}={value!r} must be a plain int or float and not NaN"):
        TimestepRegion(**arguments)


@pytest.mark.parametrize("max_steps", [0, -1, 1.5, True])
def test_max_steps_must_be_a_positive_integer(max_steps):
    message = re.escape(f"TimestepRegion(max_steps={max_steps!r}) must be an integer of at least 1")
    with pytest.raises(ValueError, match=message):
        TimestepRegion(0, 1, 0.5, max_steps)


@pytest.mark.parametrize(
    "regions",
    [
        PAPER,
        [list(triple) for triple in PAPER],
        [TimestepRegion(*triple) for triple in PAPER],
        [{"start": a, "stop": b, "sparsity": s} for a, b, s in PAPER],
        [PAPER[0], {"start": 240, "stop": 440, "sparsity": 0.6, "max_steps": None}, TimestepRegion(440, 1000, 0.8)],
        OmegaConf.create([list(triple) for triple in PAPER]),
        OmegaConf.create([{"start": a, "stop": b, "sparsity": s} for a, b, s in PAPER]),
        OmegaConf.create({"regions": [OmegaConf.structured(TimestepRegion(*triple)) for triple in PAPER]}).regions,
    ],
    ids=["tuples", "lists", "regions", "mappings", "mixed", "ListConfig", "DictConfig", "structured"],
)
def test_every_way_to_write_regions_gives_the_same_partition(regions):
    assert TimestepPartition.of(regions, overlap=20) == TimestepPartition(
        tuple(TimestepRegion(*triple) for triple in PAPER), 20
    )


def test_a_triple_may_carry_max_steps():
    assert TimestepPartition.of([(0, 1, 0.5, 7)]).regions[0].max_steps == 7


@pytest.mark.parametrize(
    "region",
    [(0, 1), (0, 1, 0.5, 7, 9), {"start": 0, "stop": 1}, {"start": 0, "stop": 1, "sparsity": 0, "rate": 1}, "0-1", 3],
)
def test_an_entry_that_is_no_region_is_refused_by_its_index(region):
    message = re.escape(f"regions[1] = {region!r} must be a TimestepRegion, a triple (start, stop, sparsity)")
    with pytest.raises(ValueError, match=message):
        TimestepPartition.of([(-1, 0, 0.5), region])


def test_a_bad_value_in_an_entry_names_its_index():
    message = r"^regions\[1\]: TimestepRegion\(sparsity=1.2\) must lie in \[0, 1\)"
    with pytest.raises(ValueError, match=message):
        TimestepPartition.of([(0, 1, 0.5), (1, 2, 1.2)])


@pytest.mark.parametrize("regions", ["0,1,0.5", {"start": 0}, 5, None])
def test_regions_that_are_no_list_are_refused(regions):
    with pytest.raises(ValueError, match=r"^regions=.* must be a list of regions"):
        TimestepPartition.of(regions)


def test_no_regions_are_refused():
    with pytest.raises(ValueError, match=r"regions=\(\) must hold at least one region"):
        TimestepPartition.of([])


def test_a_gap_is_refused_and_the_remedy_named():
    message = re.escape("regions[0] = [0, 240) and regions[1] = [250, 440) leave a gap: set start=240 on the second")
    with pytest.raises(ValueError, match=message):
        TimestepPartition.of([(0, 240, 0.3), (250, 440, 0.6)])


def test_overlapping_regions_are_refused_and_the_remedy_named():
    message = re.escape("regions[0] = [0, 260) and regions[1] = [240, 440) overlap: ") + ".*Set start=260 on the second"
    with pytest.raises(ValueError, match=message):
        TimestepPartition.of([(0, 260, 0.3), (240, 440, 0.6)])


def test_unsorted_regions_are_refused():
    message = re.escape("regions[0] = [240, 440) and regions[1] = [0, 240) are not sorted")
    with pytest.raises(ValueError, match=message):
        TimestepPartition.of([(240, 440, 0.3), (0, 240, 0.6)])


@pytest.mark.parametrize("overlap", [-1, math.inf])
def test_an_overlap_that_is_no_length_is_refused(overlap):
    with pytest.raises(ValueError, match=f"overlap={overlap!r} must be at least 0 and finite"):
        TimestepPartition.of(PAPER, overlap)


def test_an_overlap_of_nan_is_refused():
    with pytest.raises(ValueError, match="overlap=nan must be a plain int or float"):
        TimestepPartition.of(PAPER, math.nan)


def test_an_overlap_wider_than_a_following_region_is_refused():
    message = re.escape("overlap=201 must not exceed 200, the width of the following regions[1] = [240, 440)")
    with pytest.raises(ValueError, match=message):
        TimestepPartition.of(PAPER, 201)
    assert TimestepPartition.of(PAPER, 200).overlap == 200
    # The first region follows none, so its own width (240) sets no bound.
    assert TimestepPartition.of([(0, 1, 0.1), (1, 100, 0.2)], 50).overlap == 50


def test_a_partition_is_a_sized_iterable_with_axis_and_sparsities():
    partition = TimestepPartition.of([(0, 10, 0.8), (10, 20, 0.3), (20, 30, 0.8)])
    assert len(partition) == 3
    assert [region.start for region in partition] == [0, 10, 20]
    assert (partition.start, partition.stop) == (0, 30)
    assert partition.sparsities == (0.3, 0.8)


def test_training_bounds_reach_past_the_upper_end_but_not_past_the_axis():
    partition = TimestepPartition.of(PAPER, overlap=20)
    assert [partition.training_bounds(index) for index in range(3)] == [(0, 260), (240, 460), (440, 1000)]


def test_training_bounds_of_a_region_that_does_not_exist_raise():
    with pytest.raises(IndexError, match="tuple index out of range"):
        TimestepPartition.of(PAPER).training_bounds(3)


def test_partitions_are_hashable_values():
    assert TimestepPartition.of(PAPER, 20) == TimestepPartition.of(PAPER, 20) != TimestepPartition.of(PAPER)
    assert len({TimestepPartition.of(PAPER), TimestepPartition.of(PAPER)}) == 1


def test_each_timestep_is_looked_up_in_its_half_open_region():
    timesteps = torch.tensor([[0, 239, 240], [439, 440, 999]])
    indices = TimestepPartition.of(PAPER, overlap=20).lookup(timesteps)
    assert indices.dtype == torch.long
    assert indices.tolist() == [[0, 0, 1], [1, 2, 2]]


@given(widths=st.lists(st.integers(1, 30), min_size=1, max_size=6), dtype=st.sampled_from([torch.int32, torch.float32]))
def test_lookup_puts_every_timestep_of_the_axis_inside_its_region(widths, dtype):
    partition = widths_to_partition(widths)
    timesteps = torch.arange(sum(widths), dtype=dtype)
    indices = partition.lookup(timesteps)
    for timestep, index in zip(timesteps.tolist(), indices.tolist(), strict=True):
        assert partition.regions[index].start <= timestep < partition.regions[index].stop
    assert torch.bincount(indices, minlength=len(widths)).tolist() == widths


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (4,), (4, 1, 1, 1)])
def test_lookup_keeps_the_shape_whatever_the_dtype(dtype, shape):
    indices = TimestepPartition.of([(0, 10, 0.1), (10, 1000, 0.2)]).lookup(torch.full(shape, 64, dtype=dtype))
    assert indices.shape == shape
    assert (indices == 1).all()


def test_lookup_of_no_timesteps_is_empty():
    assert TimestepPartition.of(PAPER).lookup(torch.empty(0, dtype=torch.long)).tolist() == []


@pytest.mark.parametrize("timestep", [-1, 1000, 5000])
@pytest.mark.parametrize("method", ["lookup", "assign"])
def test_an_integer_timestep_outside_the_axis_is_refused(method, timestep):
    partition = TimestepPartition.of(PAPER, overlap=20)
    message = re.escape(f"timesteps hold {timestep}, outside the time axis [0, 1000) that the regions cover")
    with pytest.raises(ValueError, match=message):
        getattr(partition, method)(torch.tensor([3, timestep, -7]))


@pytest.mark.parametrize("timestep", [-0.5, 1.0625, math.nan])
def test_a_floating_timestep_outside_the_axis_is_refused(timestep):
    with pytest.raises(ValueError, match=re.escape(f"timesteps hold {timestep!r}, outside the time axis [0, 1)")):
        TimestepPartition.of([(0, 0.5, 0.1), (0.5, 1, 0.2)]).lookup(torch.tensor([0.1, timestep]))


def test_nan_is_outside_even_an_unbounded_axis():
    with pytest.raises(ValueError, match="timesteps hold nan"):
        TimestepPartition.whole(0.5).lookup(torch.tensor([math.nan]))


def test_unchecked_lookup_marks_timesteps_outside_instead_of_raising():
    partition = TimestepPartition.of(PAPER, overlap=20)
    timesteps = torch.tensor([-1, 0, 999, 1000])
    indices = partition.lookup(timesteps, check=False)
    assert indices.tolist() == [-1, 0, 2, -1]
    assert partition.assign(timesteps, check=False).tolist() == [-1, 0, 2, -1]
    with pytest.raises(ValueError, match="timesteps hold -1, outside"):
        partition.check_inside(timesteps, indices)
    partition.check_inside(timesteps[1:3], indices[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_floating_timestep_exactly_at_the_last_stop_belongs_to_the_last_region(dtype):
    partition = TimestepPartition.of([(0, 0.5, 0.1), (0.5, 0.9, 0.2)], overlap=0.4)
    assert partition.lookup(torch.tensor([0.9], dtype=dtype)).tolist() == [1]
    assert partition.assign(torch.full((64,), 0.9, dtype=dtype)).unique().tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bounds_are_compared_in_the_dtype_of_the_timesteps(dtype):
    # float32(0.1) lies above 0.1 and float32(0.7) below 0.7: compared in float64 the ends of the axis would be outside.
    partition = TimestepPartition.of([(0.1, 0.3, 0.1), (0.3, 0.7, 0.2)])
    assert partition.lookup(torch.tensor([0.1, 0.3, 0.7], dtype=dtype)).tolist() == [0, 1, 1]


def test_fractional_bounds_are_exact_for_large_integer_timesteps():
    edge = 2**40
    partition = TimestepPartition.of([(0, edge + 0.5, 0.1), (edge + 0.5, 2 * edge, 0.2)])
    assert partition.lookup(torch.tensor([edge, edge + 1])).tolist() == [0, 1]


def test_the_whole_axis_is_one_region():
    partition = TimestepPartition.whole(0.5)
    assert (partition.start, partition.stop, partition.sparsities) == (-math.inf, math.inf, (0.5,))
    assert partition.lookup(torch.tensor([-(10**9), 0, 10**9])).tolist() == [0, 0, 0]
    assert partition.lookup(torch.tensor([-math.inf, 0.0, math.inf])).tolist() == [0, 0, 0]


def test_an_axis_may_be_open_at_one_end():
    partition = TimestepPartition.of([(0, 1.5, 0.1), (1.5, math.inf, 0.2)], overlap=10)
    assert partition.lookup(torch.tensor([0, 1, 2, 10**12])).tolist() == [0, 0, 1, 1]
    assert partition.training_bounds(0) == (0, 11.5)


def test_assign_without_overlap_is_lookup_and_draws_nothing():
    partition = TimestepPartition.of(PAPER)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    timesteps = torch.arange(1000)
    assert torch.equal(partition.assign(timesteps, generator), partition.lookup(timesteps))
    assert torch.equal(generator.get_state(), before)


@given(
    widths=st.lists(st.integers(4, 30), min_size=1, max_size=5),
    overlap=st.sampled_from([0.5, 1, 2.5, 4]),
    seed=st.integers(0, 2**20),
)
def test_assign_stays_within_the_training_bounds(widths, overlap, seed):
    partition = widths_to_partition(widths, overlap)
    timesteps = torch.arange(sum(widths))
    assigned = partition.assign(timesteps, torch.Generator().manual_seed(seed))
    own = partition.lookup(timesteps)
    for timestep, index in zip(timesteps.tolist(), assigned.tolist(), strict=True):
        start, stop = partition.training_bounds(index)
        assert start <= timestep < stop
    assert set((own - assigned).tolist()) <= {0, 1}


def test_assign_gives_each_neighbour_half_of_an_overlap_and_leaves_the_rest_alone():
    partition = TimestepPartition.of(PAPER, overlap=20)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([partition.assign(torch.arange(1000), generator) for _ in range(400)])
    moved = (draws != partition.lookup(torch.arange(1000))).double().mean(dim=0)
    inside = torch.zeros(1000, dtype=torch.bool)
    inside[240:260] = inside[440:460] = True
    assert (moved[~inside] == 0).all()
    # 400 fair coins: five standard deviations are 0.125; over all 16,000 they are 0.02.
    assert (moved[inside] - 0.5).abs().max() < 0.125
    assert abs(moved[inside].mean() - 0.5) < 0.02


def test_assign_is_reproducible_from_its_generator_and_keeps_the_shape():
    partition = TimestepPartition.of(PAPER, overlap=20)
    timesteps = torch.full((16, 1, 1, 1), 250.0)
    first, second = (partition.assign(timesteps, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.shape == timesteps.shape
    assert first.dtype == torch.long
    assert torch.equal(first, second)
    assert first.unique().tolist() == [0, 1]


def test_an_overlap_as_wide_as_the_following_region_moves_by_one_region_only():
    partition = TimestepPartition.of([(0, 10, 0.1), (10, 20, 0.2), (20, 30, 0.3)], overlap=10)
    assigned = partition.assign(torch.full((256,), 25), torch.Generator().manual_seed(0))
    assert assigned.unique().tolist() == [1, 2]


@pytest.mark.parametrize(
    "partition",
    [
        TimestepPartition.of(PAPER, overlap=20),
        TimestepPartition.whole(0.25),
        TimestepPartition.of([(0.002, 1.5, 0.5, 100), (1.5, math.inf, 0.75)], overlap=0.1),
    ],
)
def test_a_partition_survives_strict_json(partition):
    text = json.dumps(partition.to_json(), allow_nan=False)
    assert TimestepPartition.from_json(json.loads(text)) == partition


def test_infinite_bounds_are_null_in_json():
    region = TimestepPartition.whole(0.5).to_json()["regions"][0]
    assert region == {"start": None, "stop": None, "sparsity": 0.5, "max_steps": None}


@pytest.mark.parametrize("data", [None, [], {}, {"regions": []}, {"regions": [], "overlap": 0, "more": 1}])
def test_json_without_exactly_the_two_fields_is_refused(data):
    with pytest.raises(ValueError, match="A partition needs exactly the fields 'regions' and 'overlap'"):
        TimestepPartition.from_json(data)


@pytest.mark.parametrize("regions", [None, {"start": 0}, [[0, 1, 0.5]], "regions"])
def test_json_regions_must_be_a_list_of_objects(regions):
    with pytest.raises(ValueError, match=r"regions=.* must be a list of objects"):
        TimestepPartition.from_json({"regions": regions, "overlap": 0})


def test_json_with_a_null_sparsity_is_refused():
    data = {"regions": [{"start": 0, "stop": 1, "sparsity": None, "max_steps": None}], "overlap": 0}
    with pytest.raises(ValueError, match=r"regions\[0\]: sparsity=None must be a plain int or float"):
        TimestepPartition.from_json(data)
