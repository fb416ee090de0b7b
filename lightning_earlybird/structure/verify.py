"""Verification: a plan is trusted only after an extracted network has computed what the dense one computes.

The dense network computes it with the same channels set to zero, and with its statistics over the channels that stay
(see ``counterpart``).
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.counterpart import Counterpart, NumberRecord
from lightning_earlybird.structure.extract import extract
from lightning_earlybird.structure.plan import ChannelGroup, ChannelPlan, FrozenChannels, StructureError
from lightning_earlybird.structure.reference import (
    HALF_PRECISION,
    ChannelLocalNorms,
    complementary_masks,
    full_precision,
    randomised,
    zeroed,
)
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


@torch.inference_mode(False)
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

    Two complementary masks are tried, so that every channel is once removed and once kept. The extracted networks also
    run backward, in the modes that the network is in (a branch that only training takes must fit as well).

    Works on copies with random weights (a freshly initialised network may output zeros, which would prove nothing), in
    float32 on the CPU: accelerators round products, and all ranks must come to the same verdict. Groups that fail are
    searched for by halves, and frozen.

    Args:
        model: The dense denoiser.
        plan: Its traced plan.
        args: Positional arguments of one call; one or two samples are enough.
        kwargs: Keyword arguments of that call.
        seed: Seed of the random weights and ratios.
        tolerance: Largest relative difference that counts as equal. On U-Nets of 20 to 230 convolutions rounding made
            3e-6 at most, a single dimension in the wrong order at least 5e-3.

    Returns:
        The verified plan, the error, and the groups that failed.

    Raises:
        StructureError: No group passes, or those that pass alone fail together.
    """
    generator = torch.Generator().manual_seed(seed)
    with full_precision():
        trial = _Trial(model, args, kwargs or {}, tolerance, generator)
        masks = complementary_masks(plan, plan.groups, generator)
        error, problem = trial.run(plan, masks)
        if problem is None:
            return Verification(plan, error, {})
        failed = trial.failing(plan, plan.groups)
        if len(failed) == len(plan.groups):
            raise StructureError(
                f"denoiser: {type(model).__name__} cannot be pruned: every channel group fails verification. "
                f"First: {next(iter(failed.values()))}"
            )
        reduced = freeze_groups(plan, failed)
        # The same masks again: what failed at first must have been these groups.
        rest = [TicketMask({n: kept for n, kept in mask.kept.items() if n not in failed}) for mask in masks]
        error, together = trial.run(reduced, rest)
        if together is not None:
            raise StructureError(
                f"denoiser: {type(model).__name__} cannot be pruned safely: {len(reduced.groups)} channel groups pass "
                f"verification alone but not together ({together}). Groups whose widths depend on each other in Python "
                "code are the usual cause."
            )
        return Verification(reduced, error, failed)


class _Trial:
    """Compares extracted networks with the zeroed dense one."""

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tolerance: float,
        generator: torch.Generator,
    ) -> None:
        self.tolerance, self.generator = tolerance, generator
        own = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._prepare(model, torch.device("cpu"), args, kwargs)
        try:
            self._outputs(self.reference)
        except Exception:  # a network may insist on its device
            if own.type == "cpu":
                raise
            self._prepare(model, own, args, kwargs)
            self.tolerance = max(tolerance, 1e-2)  # convolutions there may round to ten bits (TF32)
        self.keeps_modes = self._runs_in_its_modes()

    def run(self, plan: ChannelPlan, masks: Iterable[TicketMask]) -> tuple[float, str | None]:
        """Extract along each mask; relative error and what is wrong, None if nothing is."""
        worst = 0.0
        for mask in masks:
            error, problem = self._compare(plan, mask)
            worst = max(worst, error)
            if problem is not None:
                return worst, problem
        return worst, None

    def failing(self, plan: ChannelPlan, groups: Sequence[ChannelGroup]) -> dict[str, str]:
        """Which of ``groups`` fail, and why: by halves, since most of many groups are right."""
        _, problem = self.run(plan, complementary_masks(plan, groups, self.generator))
        if problem is None:
            return {}
        if len(groups) == 1:
            return {groups[0].name: problem}
        middle = len(groups) // 2
        return self.failing(plan, groups[:middle]) | self.failing(plan, groups[middle:])

    def _prepare(self, model: nn.Module, device: torch.device, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.device = device
        self.reference = randomised(model, device, self.generator)

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device, torch.float32 if leaf.dtype in HALF_PRECISION else leaf.dtype, copy=True)

        self.args, self.kwargs = tree_map(moved, (tuple(args), dict(kwargs)))

    def _compare(self, plan: ChannelPlan, mask: TicketMask) -> tuple[float, str | None]:
        record = NumberRecord()
        try:
            ticket = extract(self.reference, plan, mask)
            actual = self._outputs(ticket, record)
            self._backward(ticket)
        except Exception as problem:  # whatever user code raises on a narrower network is the finding
            return float("inf"), f"{type(problem).__name__}: {problem}"
        numbers = {} if record.from_data else record.numbers
        expected = self._outputs(zeroed(self.reference, plan, mask), Counterpart(plan, mask, numbers))
        if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
            return float("inf"), "the output changes its shape"
        scale = max((float(tensor.abs().max()) for tensor in expected), default=0.0)
        if scale == 0.0:
            return float("inf"), "the output is zero whatever the weights"
        error = max(float((a - e).abs().max()) for a, e in zip(actual, expected, strict=True)) / scale
        return error, None if error <= self.tolerance else f"the output differs by {error:.1e} (relative)"

    def _call(self, network: nn.Module) -> list[Tensor]:
        with torch.autocast(self.device.type, enabled=False):
            return _tensors(network(*self.args, **self.kwargs))

    def _outputs(self, network: nn.Module, mode: AbstractContextManager[Any] | None = None) -> list[Tensor]:
        with undisturbed(network), ChannelLocalNorms(), mode or nullcontext():
            return self._call(network)

    def _runs_in_its_modes(self) -> bool:
        """False where training needs more than a sample or two (batch normalisation)."""
        try:
            with undisturbed(self.reference, evaluate=False):
                self._call(self.reference)
        except Exception:
            return False
        return True

    def _backward(self, ticket: nn.Module) -> None:
        with undisturbed(ticket, evaluate=not self.keeps_modes), torch.enable_grad():
            outputs = [tensor for tensor in self._call(ticket) if tensor.requires_grad]
            if outputs:
                torch.stack([tensor.float().square().mean() for tensor in outputs]).sum().backward()


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
        statistics=tuple(replace(each, ids=renumbered[each.ids]) for each in plan.statistics),
        frozen=(
            *plan.frozen,
            *(
                FrozenChannels(group.name, group.size, failed[group.name])
                for group in plan.groups
                if group.name in failed
            ),
        ),
    )


def _tensors(out: Any) -> list[Tensor]:
    plain = dict(vars(out)) if hasattr(out, "__dataclass_fields__") else out
    return [leaf for leaf in tree_flatten(plain)[0] if isinstance(leaf, Tensor)]
