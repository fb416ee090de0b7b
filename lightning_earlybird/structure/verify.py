"""Verification: a plan is trusted only after an extracted network has computed what the dense one computes.

The dense network computes it with the same channels set to zero.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.extract import extract
from lightning_earlybird.structure.plan import ChannelGroup, ChannelPlan, FrozenChannels, StructureError
from lightning_earlybird.structure.trace import undisturbed


@dataclass(frozen=True)
class Verification:
    """What verification found.

    Attributes:
        plan: The plan to use: the one given, without the groups that failed.
        max_error: Largest difference between extracted and zeroed dense output, relative to the largest output.
        failed: Group name -> what went wrong.
    """

    plan: ChannelPlan
    max_error: float
    failed: Mapping[str, str]


class _ChannelLocalNorms(TorchDispatchMode):
    """Replaces statistics over several channels by a bounded function of each channel alone.

    Zeroed channels take part in a dense normalisation and missing ones do not: without this, two correct networks would
    differ.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name == "native_group_norm":
            return self._bounded(args[0], args[1], args[2], dim=1)
        if name == "native_layer_norm":
            return self._bounded(args[0], args[2], args[3], dim=args[0].dim() - 1)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _bounded(source: Tensor, weight: Tensor | None, bias: Tensor | None, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = [-1 if d == dim else 1 for d in range(source.dim())]
        result = nn.functional.softsign(source)
        if weight is not None:
            result = result * weight.view(shape)
        if bias is not None:
            result = result + bias.view(shape)
        return result, source.new_zeros(1), source.new_zeros(1)


def verify_plan(
    model: nn.Module,
    plan: ChannelPlan,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> Verification:
    """Extract at random, non-uniform ratios and compare with the zeroed dense network.

    The extracted network also runs backward. Works on copies with random weights (a freshly initialised network may
    output zeros, which would prove nothing). Groups that fail are tried one by one and frozen.

    Args:
        model: The dense denoiser.
        plan: Its traced plan.
        args: Positional arguments of one call; one or two samples are enough.
        kwargs: Keyword arguments of that call.
        seed: Seed of the random weights and ratios.
        tolerance: Largest relative difference that counts as equal; float32 rounding stays below 1e-5.

    Returns:
        The verified plan, the error, and the groups that failed.

    Raises:
        StructureError: No group passes, or those that pass alone fail together.
    """
    generator = torch.Generator().manual_seed(seed)
    reference = _randomised(model, generator)
    trial = _Trial(reference, plan, args, kwargs or {}, tolerance)

    mask = _random_mask(plan, plan.groups, generator)
    error, problem = trial.run(mask)
    if problem is None:
        return Verification(plan, error, {})

    failed: dict[str, str] = {}
    for group in plan.groups:
        _, alone = trial.run(_random_mask(plan, [group], generator))
        if alone is not None:
            failed[group.name] = alone
    if len(failed) == len(plan.groups):
        raise StructureError(
            f"denoiser: {type(model).__name__} cannot be pruned: every channel group fails verification. "
            f"First: {next(iter(failed.values()))}"
        )
    reduced = freeze_groups(plan, failed)
    error, together = _Trial(reference, reduced, args, kwargs or {}, tolerance).run(
        _random_mask(reduced, reduced.groups, generator)
    )
    if together is not None:
        raise StructureError(
            f"denoiser: {type(model).__name__} cannot be pruned safely: {len(reduced.groups)} channel groups pass "
            f"verification alone but not together ({together}). Groups whose widths depend on each other in Python "
            "code are the usual cause."
        )
    return Verification(reduced, error, failed)


class _Trial:
    """One comparison of an extracted network with the zeroed dense one."""

    def __init__(
        self, reference: nn.Module, plan: ChannelPlan, args: Sequence[Any], kwargs: Mapping[str, Any], tolerance: float
    ) -> None:
        self.reference, self.plan, self.args, self.kwargs, self.tolerance = reference, plan, args, kwargs, tolerance

    def run(self, mask: TicketMask) -> tuple[float, str | None]:
        """Relative error and what is wrong, None if nothing is."""
        try:
            expected = self._outputs(zeroed(self.reference, self.plan, mask))
            ticket = extract(self.reference, self.plan, mask)
            actual = self._outputs(ticket)
            self._backward(ticket)
        except Exception as problem:  # whatever user code raises on a narrower network is the finding
            return float("inf"), f"{type(problem).__name__}: {problem}"
        if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
            return float("inf"), "the output changes its shape"
        scale = max((float(tensor.abs().max()) for tensor in expected), default=0.0)
        if scale == 0.0:
            return float("inf"), "the output is zero whatever the weights"
        error = max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True)) / scale
        return error, None if error <= self.tolerance else f"the output differs by {error:.1e} (relative)"

    def _outputs(self, network: nn.Module) -> list[Tensor]:
        with undisturbed(network), _ChannelLocalNorms():
            return _tensors(network(*self.args, **self.kwargs))

    def _backward(self, ticket: nn.Module) -> None:
        with undisturbed(ticket), torch.enable_grad():
            outputs = [tensor for tensor in _tensors(ticket(*self.args, **self.kwargs)) if tensor.requires_grad]
            if outputs:
                torch.stack([tensor.float().square().mean() for tensor in outputs]).sum().backward()


def zeroed(model: nn.Module, plan: ChannelPlan, mask: TicketMask) -> nn.Module:
    """A copy of the dense network in which every slice that the mask removes is zero."""
    result = copy.deepcopy(model)
    tensors = {
        **dict(result.named_parameters(remove_duplicate=False)),
        **dict(result.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for name, dims in plan.keep_indices(mask).items():
            for dim, keep in dims.items():
                gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool, device=tensors[name].device)
                gone[keep.to(gone.device)] = False
                tensors[name].index_fill_(dim, gone.nonzero().flatten(), 0)
    return result


def freeze_groups(plan: ChannelPlan, failed: Mapping[str, str]) -> ChannelPlan:
    """The plan without some of its groups; their channels are never pruned, for the reason given."""
    survivors = [group for group in plan.groups if group.name not in failed]
    renumbered = torch.full((plan.num_channels + 1,), -1, dtype=torch.long)  # the last entry serves id -1
    groups, count = [], 0
    for group in survivors:
        fresh = torch.arange(count, count + group.size)
        renumbered[group.channels] = fresh
        groups.append(ChannelGroup(group.name, fresh, group.rows))
        count += group.size
    ids = {name: {dim: renumbered[numbers] for dim, numbers in dims.items()} for name, dims in plan.ids.items()}
    ids = {
        name: {dim: numbers for dim, numbers in dims.items() if bool((numbers >= 0).any())}
        for name, dims in ids.items()
    }
    return replace(
        plan,
        ids={name: dims for name, dims in ids.items() if dims},
        groups=tuple(groups),
        inputs={name: renumbered[numbers] for name, numbers in plan.inputs.items()},
        frozen=(
            *plan.frozen,
            *(
                FrozenChannels(group.name, group.size, failed[group.name])
                for group in plan.groups
                if group.name in failed
            ),
        ),
    )


def _randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A float32 copy with weights of a size that keeps activations near 1."""
    result = copy.deepcopy(model)
    result.requires_grad_(True)
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in result.parameters()):
        result = result.float()
    with torch.no_grad():
        for parameter in result.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(noise / fan_in**0.5 if parameter.dim() > 1 else 1.0 + 0.1 * noise)
    return result


def _random_mask(plan: ChannelPlan, groups: Iterable[ChannelGroup], generator: torch.Generator) -> TicketMask:
    """Removes a random share, different for each of ``groups``, at random positions; keeps all other groups whole."""
    chosen = {group.name for group in groups}
    kept: dict[str, Tensor] = {}
    for group in plan.groups:
        width = group.size // group.rows
        stays = torch.ones(group.rows, width, dtype=torch.bool)
        if group.name in chosen and width > 1:
            count = int(torch.randint(1, width, (1,), generator=generator))
            order = torch.rand(group.rows, width, generator=generator).argsort(dim=1)
            stays = order < count
        kept[group.name] = stays.flatten()
    return TicketMask(kept)


def _tensors(out: Any) -> list[Tensor]:
    plain = dict(vars(out)) if hasattr(out, "__dataclass_fields__") else out
    return [leaf for leaf in tree_flatten(plain)[0] if isinstance(leaf, Tensor)]
