"""Channel scores: how much each channel of a denoiser matters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_earlybird.structure import ChannelPlan

NamedCriterion = Literal["magnitude", "random", "taylor", "diff_pruning"]
CustomCriterion: TypeAlias = Callable[[nn.Module, ChannelPlan], Any]
"""Scores of the caller's own: (denoiser, plan) -> floats of shape (plan.num_channels,), higher is more important."""
Criterion: TypeAlias = NamedCriterion | CustomCriterion

CRITERIA: tuple[NamedCriterion, ...] = get_args(NamedCriterion)
GRADIENT_CRITERIA = ("taylor", "diff_pruning")


class NonFiniteWeightsError(ValueError):
    """Weights that are NaN or infinite, or whose gradients are, cannot be scored."""


class NonFiniteGradientsError(NonFiniteWeightsError):
    """Only gradients are NaN or infinite, and the weights are sound: other batches may give scores."""


def check_finite(network: nn.Module, what: str = "the denoiser") -> None:
    """Refuse weights that are NaN or infinite.

    Args:
        network: The network; buffers may hold infinities for good reasons, such as masks of attention.
        what: What it is called in the message.

    Raises:
        NonFiniteWeightsError: The message names the parameters.
    """
    named = dict(network.named_parameters())
    sound = [torch.isfinite(parameter.detach()).all() for parameter in named.values()]
    if sound and not bool(torch.stack(sound).all()):  # one wait for the device
        _refuse([name for name, each in zip(named, sound, strict=True) if not bool(each)], what)


def check_criterion(criterion: object) -> None:
    """Refuse what is neither a known name nor a function.

    Raises:
        ValueError: The message lists the known ones.
    """
    if not callable(criterion) and criterion not in CRITERIA:
        raise ValueError(
            f"criterion={criterion!r} must be one of {', '.join(map(repr, CRITERIA))}, or a callable "
            "(denoiser, plan) -> scores of shape (plan.num_channels,)."
        )


def channel_scores(
    tensors: Mapping[str, Tensor],
    plan: ChannelPlan,
    criterion: NamedCriterion = "magnitude",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Score every channel on the intact network, by the criteria that need its weights alone.

    ``"magnitude"`` is the group magnitude that Early-Bird Diffusion prunes by (arXiv 2504.09606): the mean over
    everything that hangs on a channel (its filter, the slices of its consumers, whatever is coupled to it) of the sum
    of squared weights. Only the ranking within a group is used. ``"random"`` is the control. The other criteria need
    gradients or the network: see :func:`taylor_scores` and :func:`custom_scores`.

    Args:
        tensors: The denoiser's parameters by name (raw or averaged).
        plan: Its channel plan.
        criterion: What to score by.
        generator: Source of the random scores.

    Returns:
        Shape (num_channels,), float32, CPU.

    Raises:
        NonFiniteWeightsError: A parameter holds NaN or infinity; the message names it.
        ValueError: The criterion is not one of these, or weights of the plan are missing.
    """
    if criterion == "random":
        return torch.rand(plan.num_channels, generator=generator)
    if criterion != "magnitude":
        raise ValueError(f"criterion={criterion!r} cannot be told from weights. Choose one of magnitude, random.")
    names = weight_names(tensors, plan)
    # Added up on the CPU, in a fixed order: accelerators add where several slices share a channel in any order, and
    # masks of different ranks could differ by the last bit of a score.
    sums = slice_sums(plan, names, lambda name: tensors[name].detach().float().square()).cpu()
    slots = slice_slots(plan, names)
    total, members = _by_channel(plan, slots, sums), torch.bincount(slots, minlength=plan.num_channels + 1)
    if not bool((members[:-1] > 0).all()):
        missing = [name for name in plan.ids if name not in tensors]
        raise ValueError(
            f"tensors={list(tensors)[:3]}... lack weights of the plan, such as {missing[:3]}: some channels cannot be "
            "scored. Pass the denoiser's named_parameters(), without a prefix."
        )
    _check_finite(tensors, total)
    return total[:-1] / members[:-1]


def taylor_scores(
    plan: ChannelPlan, slots: Tensor, products: Tensor, reached: Tensor, fallback: Tensor
) -> tuple[Tensor, list[str]]:
    """First-order Taylor importance of every channel (Molchanov et al. 2019, in the form that Diff-Pruning sums it).

    How much the loss would change, to first order, if a slice were zeroed is the absolute value of the sum of
    ``weight * gradient`` over it (arXiv 2305.10924, with the sum inside of the absolute value: the elements of a slice
    leave together). A channel's score is the mean of that over its slices, as for magnitudes.

    Args:
        plan: The denoiser's channel plan.
        slots: Shape (slices,), long: the channel of each slice, see :func:`slice_slots`.
        products: Shape (slices,): the sum over each slice of ``weight * gradient``, see :func:`slice_sums`.
        reached: Shape (slices,), bool: which slices have a gradient; the others (frozen, unused) contribute nothing.
        fallback: Shape (num_channels,): scores for groups that no gradient reaches.

    Returns:
        Scores of shape (num_channels,), float32; and the names of the groups that took the fallback.
    """
    total = _by_channel(plan, slots[reached], products[reached].abs())[:-1]
    members = torch.bincount(slots[reached], minlength=plan.num_channels + 1)[:-1]
    scores = total / members.clamp_min(1)
    unreached = [group for group in plan.groups if not bool(members[group.channels].any())]
    for group in unreached:
        scores[group.channels] = fallback[group.channels]
    return scores, [group.name for group in unreached]


def custom_scores(criterion: CustomCriterion, denoiser: nn.Module, plan: ChannelPlan) -> Tensor:
    """The scores that the caller's own function gives.

    Returns:
        Shape (num_channels,), float32, CPU.

    Raises:
        ValueError: The function returns something else than finite floats of that shape.
    """
    scores: object = criterion(denoiser, plan)
    needed = f"a floating-point tensor of shape ({plan.num_channels},), one finite score for each channel of the plan"
    if not isinstance(scores, Tensor):
        raise ValueError(f"criterion={criterion!r} returned a {type(scores).__name__}, but must return {needed}.")
    if not scores.is_floating_point() or scores.shape != (plan.num_channels,):
        raise ValueError(
            f"criterion={criterion!r} returned a {scores.dtype} tensor of shape {tuple(scores.shape)}, but must return "
            f"{needed}. `group.channels` of each of plan.groups says which entries are whose."
        )
    scores = scores.detach().to("cpu", torch.float32, copy=True)
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite()).sum())
        raise ValueError(
            f"criterion={criterion!r} returned {bad} scores of shape {tuple(scores.shape)} that are NaN or infinite, "
            f"but must return {needed}."
        )
    return scores


def weight_names(tensors: Mapping[str, Tensor], plan: ChannelPlan) -> list[str]:
    """The tensors that scores are taken from: those of the plan with more than one dimension, in its order."""
    return [name for name in plan.ids if name in tensors and tensors[name].dim() > 1]


def slice_slots(plan: ChannelPlan, names: Sequence[str]) -> Tensor:
    """The channel of every slice of the named tensors.

    Returns:
        Shape (slices,), long; ``num_channels`` for slices without a channel.
    """
    ids = [ids for name in names for ids in plan.ids[name].values()]
    slots = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.long)
    return torch.where(slots < 0, plan.num_channels, slots)


def slice_sums(plan: ChannelPlan, names: Sequence[str], elements: Callable[[str], Tensor | None]) -> Tensor:
    """What the elements of every slice of the named tensors sum to.

    Args:
        plan: The denoiser's channel plan.
        names: Names of tensors of the plan.
        elements: Name -> a value per element, in the shape of the tensor; None where all of them are zero.

    Returns:
        Shape (slices,), in the order of :func:`slice_slots`, float32, on the device of the elements.
    """
    sums: list[Tensor] = []
    zeros: list[int] = []  # where only the size is known yet
    for name in names:
        dims, values = plan.ids[name], elements(name)
        if values is None:
            for ids in dims.values():
                zeros.append(len(sums))
                sums.append(torch.zeros(len(ids)))
            continue
        # One pass over the weight serves all of its dimensions: kernel positions are summed first.
        rest = [d for d in range(values.dim()) if d not in dims]
        values = values.sum(rest, keepdim=True) if rest else values
        sums.extend(values.sum([d for d in range(values.dim()) if d != dim]) for dim in dims)
    device = next((part.device for index, part in enumerate(sums) if index not in set(zeros)), None)
    for index in zeros:
        sums[index] = sums[index].to(device)
    return torch.cat(sums) if sums else torch.zeros(0)


def _by_channel(plan: ChannelPlan, slots: Tensor, values: Tensor) -> Tensor:
    """Shape (num_channels + 1,): the values added up by channel; the last entry collects slices without one."""
    return torch.zeros(plan.num_channels + 1).index_add_(0, slots, values)


def _check_finite(tensors: Mapping[str, Tensor], total: Tensor) -> None:
    """Refuse NaN and infinity: in the sums of squares, or in parameters that are not summed (biases, norms)."""
    unsummed = [tensor.detach().float().sum().reshape(1) for tensor in tensors.values() if tensor.dim() <= 1]
    if bool(torch.isfinite(total).all()) and (not unsummed or bool(torch.isfinite(torch.cat(unsummed)).all())):
        return
    _refuse([name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())], "the denoiser")


def _refuse(bad: Sequence[str], what: str) -> NoReturn:
    named = ", ".join(repr(name) for name in bad[:3]) or "the sum of squares (weights too large for float32)"
    raise NonFiniteWeightsError(
        f"parameter {named} of {what} holds NaN or infinite values ({len(bad)} such parameters): no mask is "
        "drawn from them. Lower the learning rate, clip gradients, or resume from an earlier checkpoint."
    )
