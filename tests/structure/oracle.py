"""torch-pruning's view of a network, in the form in which it can be compared with a channel plan."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch_pruning
from torch import nn

from lightning_earlybird.structure import ChannelPlan

Slice = tuple[str, int, int]  # (parameter name, dimension, index)
Partition = set[frozenset[Slice]]  # which slices are removed together


def partition_of_plan(network: nn.Module, plan: ChannelPlan) -> Partition:
    """The coupled slices of parameters that a plan describes, one set a channel."""
    parameters = dict(network.named_parameters())
    members: dict[int, set[Slice]] = {}
    for name, dims in plan.ids.items():
        for dim, ids in dims.items():
            for index, channel in enumerate(ids.tolist()):
                if channel >= 0 and name in parameters:
                    members.setdefault(channel, set()).add((name, dim, index))
    return {frozenset(slices) for slices in members.values()}


def partition_of_torch_pruning(
    network: nn.Module, inputs: Sequence[Any] | Mapping[str, Any], *last: nn.Module
) -> Partition:
    """The coupled slices that torch-pruning finds; the output channels of the ``last`` layers are not for pruning."""
    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=inputs)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    partition: Partition = set()
    for group in graph.get_all_groups(ignored_layers=list(last)):
        members: dict[int, set[Slice]] = {}
        for item in group:
            for name, dim in _sliced_tensors(item.dep.target.module, item.dep.handler, names):
                for index, root in zip(item.idxs, item.root_idxs, strict=True):
                    members.setdefault(root, set()).add((name, dim, index))
        partition |= {frozenset(slices) for slices in members.values()}
    return partition


def _sliced_tensors(module: nn.Module, handler: Any, names: Mapping[int, str]) -> list[tuple[str, int]]:
    """The parameters of a module, with the dimension in which torch-pruning's handler prunes each."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is None:
        return []  # an operation without parameters
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        is_output = handler.__name__ == "prune_out_channels"
        first, second = (1, 0) if getattr(module, "transposed", False) else (0, 1)
        sliced = [(weight, first), (bias, 0)] if is_output else [(weight, second)]
    elif isinstance(module, nn.Embedding):
        sliced = [(weight, 1)]
    elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
        sliced = [(weight, 0), (bias, 0)]
    else:
        raise NotImplementedError(f"{type(module).__name__} has parameters that are not compared")
    return [(names[id(tensor)], dim) for tensor, dim in sliced if tensor is not None]


def scores_of_torch_pruning(
    network: nn.Module, inputs: Sequence[Any], last: nn.Module, importance: Any = None
) -> dict[Slice, float]:
    """Its group importance, by the slices of output channels; squared weights, mean over a group, by default."""
    graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=inputs)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    importance = importance or torch_pruning.importance.GroupMagnitudeImportance(
        p=2, group_reduction="mean", normalizer=None
    )
    scores: dict[Slice, float] = {}
    for group in graph.get_all_groups(ignored_layers=[last]):
        root = group[0].dep.target.module
        for index, score in zip(group[0].idxs, importance(group).tolist(), strict=True):
            scores[names[id(root.weight)], 0, index] = score
    return scores
