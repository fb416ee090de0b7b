import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_earlybird.structure.labels import Couplings, align, compress, reshape_axis, varying


@st.composite
def _shapes_of_one_size(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes with equal products: the same prime factors, dealt out to dimensions twice."""
    factors = draw(st.lists(st.sampled_from([2, 3]), max_size=5))
    shapes = []
    for _ in range(2):
        rank = draw(st.integers(min_value=1, max_value=5))
        owners = draw(st.lists(st.integers(0, rank - 1), min_size=len(factors), max_size=len(factors)))
        order = draw(st.permutations(factors))
        shapes.append([math.prod(f for f, owner in zip(order, owners, strict=True) if owner == d) for d in range(rank)])
    return shapes[0], shapes[1]


@given(_shapes_of_one_size(), st.data())
def test_a_reshaped_axis_labels_every_element_as_the_written_out_labels_do(
    shapes: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    old, new = shapes
    size = [n if data.draw(st.booleans()) else 1 for n in old]
    axis = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=math.prod(size), max_size=math.prod(size))))
    axis = axis.reshape(size)

    result = reshape_axis(axis, old, new)

    assert result.dim() == len(new)
    assert torch.equal(result.expand(new), axis.expand(old).reshape(new))


def test_reshaping_writes_out_only_the_dimensions_that_the_labels_vary_in() -> None:
    channels = torch.arange(1, 7).view(1, 6, 1, 1)

    assert reshape_axis(channels, (2, 6, 8, 8), (2, 6, 64)).shape == (1, 6, 1)
    assert reshape_axis(channels, (2, 6, 8, 8), (2, 2, 3, 64)).shape == (1, 2, 3, 1)
    assert reshape_axis(channels, (2, 6, 8, 8), (12, 64)).shape == (12, 1)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_compressing_drops_exactly_the_dimensions_without_change(shape: list[int], data: st.DataObject) -> None:
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=math.prod(shape), max_size=math.prod(shape))))
    labels = labels.reshape(shape)

    result = compress(labels)

    assert torch.equal(result.expand(shape), labels)
    changing = [dim for dim in range(len(shape)) if not torch.equal(labels.roll(1, dim), labels)]
    assert list(varying(result)) == changing


def test_aligning_prepends_dimensions_of_size_one() -> None:
    assert align(torch.arange(3), 3).shape == (1, 1, 3)


def test_labels_are_numbered_from_one_without_gaps() -> None:
    couplings = Couplings()

    assert couplings.fresh(3).tolist() == [1, 2, 3]
    assert couplings.fresh(2).tolist() == [4, 5]
    assert couplings.count == 6


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20))
def test_components_are_those_of_the_graph_of_ties(size: int, edges: list[tuple[int, int]]) -> None:
    couplings = Couplings()
    couplings.fresh(size)
    component = list(range(size + 1))
    for a, b in edges:
        first, second = a % size + 1, b % size + 1
        couplings.tie(torch.tensor([first]), torch.tensor([second]), "")
        merged = sorted((component[first], component[second]))
        component = [merged[0] if c == merged[1] else c for c in component]

    assert couplings.components().tolist() == component


def test_a_tie_broadcasts_as_tensors_do() -> None:
    couplings = Couplings()
    rows, matrix = couplings.fresh(2), couplings.fresh(6)

    couplings.tie(rows.view(2, 1), matrix.view(2, 3), "")

    assert couplings.components()[1:].tolist() == [1, 2, 1, 1, 1, 2, 2, 2]


def test_a_tie_with_no_channel_freezes_with_the_first_reason_given() -> None:
    couplings = Couplings()
    couplings.fresh(3)

    couplings.tie(torch.tensor([1, 2]), torch.tensor([0, 3]), "meets nothing")
    couplings.freeze(torch.tensor([0, 1]), "later")

    assert couplings.frozen_reasons(couplings.components()) == {1: "meets nothing"}


def test_axes_that_cannot_be_broadcast_together_are_frozen() -> None:
    couplings = Couplings()

    couplings.tie(couplings.fresh(2), couplings.fresh(3), "serves several widths")

    assert couplings.frozen_reasons(couplings.components()) == dict.fromkeys(range(1, 6), "serves several widths")


def test_a_reason_counts_for_everything_that_is_tied_even_later() -> None:
    couplings = Couplings()
    couplings.fresh(4)

    couplings.freeze(torch.tensor([3]), "the output")
    couplings.tie(torch.tensor([1]), torch.tensor([3]), "")

    assert couplings.frozen_reasons(couplings.components()) == {1: "the output"}


def test_only_the_labels_that_a_layer_gives_out_are_its_products() -> None:
    couplings = Couplings()
    couplings.fresh(3)

    couplings.produce(torch.tensor([[0, 2]]))

    assert couplings.products().tolist() == [False, False, True, False]


@pytest.mark.parametrize("query", ["components", "products"])
def test_nothing_traced_means_nothing_coupled(query: str) -> None:
    assert getattr(Couplings(), query)().tolist() == [0]
