"""The trial of a plan: networks extracted along masks are compared with the zeroed dense one."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.structure.counterpart import Counterpart, NumberRecord
from lightning_earlybird.structure.crop import Call, OperationLog, smallest_call
from lightning_earlybird.structure.extract import extract
from lightning_earlybird.structure.modes import as_in_training, without_chance
from lightning_earlybird.structure.plan import ChannelGroup, ChannelPlan, StructureError
from lightning_earlybird.structure.reference import (
    ChannelLocalNorms,
    at_least,
    complementary_masks,
    limited,
    permute_,
    randomised,
    unrounded,
    zeroed,
)
from lightning_earlybird.structure.running import undisturbed
from lightning_earlybird.structure.trace import traced
from lightning_earlybird.structure.tracer import ChannelTracer

DOUBLED_UP_TO = 200_000_000  # parameters; above, copies in double precision would take gigabytes
FAINT = 1e-4  # an output this much smaller than the largest counts as zero
NARROW, FURTHER_DRAWS = 8, 3  # channels of a group up to which more masks are tried, and how many pairs of them


class Trial:
    """Compares extracted networks with the zeroed dense one."""

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tolerance: float,
        generator: torch.Generator,
    ) -> None:
        self.generator = generator
        self.masks: list[TicketMask] = []
        self.further: list[TicketMask] = []
        self.args: tuple[Any, ...]
        self.kwargs: dict[str, Any]
        self._given = tuple(args), dict(kwargs)
        call = smallest_call(model, args, kwargs)
        self._prepare(model, call, tolerance)
        self.cropped = any(a is not b for a, b in zip(tree_leaves(call), tree_leaves(self._given), strict=True))
        self.keeps_modes = self._runs_in_its_modes()
        if not self.keeps_modes:  # training may need the pixels
            cropped = self.args, self.kwargs
            self.args, self.kwargs = tree_map(self._moved, self._given)
            self.keeps_modes = self._runs_in_its_modes()
            if self.keeps_modes:
                self.cropped = False
            else:
                self.args, self.kwargs = cropped
        self.training = self._trace_training() if self.keeps_modes else None
        self.whole = self._outputs(self.reference)  # only now: running statistics have moved
        self.scale = _largest(self.whole)

    def compare_uncropped(self, plan: ChannelPlan) -> tuple[float, str | None]:
        """Compare with all pixels; if something is wrong, the search for it goes on with them."""
        if not self.cropped:
            return 0.0, None
        self.args, self.kwargs = tree_map(self._moved, self._given)
        self.cropped = False
        error, problem = self.compare(plan, self.masks[0], backward=False)
        if problem is not None:
            self.whole = self._outputs(self.reference)
        return error, problem

    def draw(self, plan: ChannelPlan) -> None:
        """Draw the masks that the next calls of :meth:`run` try."""
        narrow = [group for group in plan.groups if group.size <= NARROW]
        self.masks = list(complementary_masks(plan, plan.groups, self.generator))
        self.further = [
            mask
            for _ in range(FURTHER_DRAWS if narrow else 0)
            for mask in complementary_masks(plan, narrow, self.generator, coprime=False)
        ]

    def run(self, plan: ChannelPlan, groups: Sequence[ChannelGroup]) -> tuple[float, str | None]:
        """Try ``groups``, all others whole; relative error and what is wrong, None if nothing is."""
        worst, problem = self._compare_permuted(plan, groups)
        for index, mask in enumerate((*self.masks, *self.further)):
            if problem is not None:
                break
            part = limited(mask, groups)
            if part.num_kept == part.num_channels and index >= len(self.masks):
                continue
            error, problem = self.compare(plan, part, backward=index == 0)
            worst = max(worst, error)
        return worst, problem

    def failing(self, plan: ChannelPlan, groups: Sequence[ChannelGroup]) -> dict[str, str]:
        """Which of ``groups`` fail, and why: by halves, since most of many groups are right."""
        _, problem = self.run(plan, groups)
        if problem is None:
            return {}
        if len(groups) == 1:
            return {groups[0].name: problem}
        middle = len(groups) // 2
        found = self.failing(plan, groups[:middle]) | self.failing(plan, groups[middle:])
        if not found and len(groups) < len(plan.groups):
            # What each does alone is below the tolerance, or they depend on each other.
            return {group.name: f"with the others of {len(groups)} groups, {problem}" for group in groups}
        return found

    def _prepare(self, model: nn.Module, call: Call, tolerance: float) -> None:
        """Take the most precise copy of the network that runs."""
        cpu = torch.device("cpu")
        own = next((parameter.device for parameter in model.parameters()), cpu)
        size = sum(parameter.numel() for parameter in model.parameters())
        # Single precision on an accelerator may mean ten bits (TF32).
        ways = [(cpu, torch.float64, 0.0), (cpu, torch.float32, 1e-4), (own, torch.float32, 1e-2)]
        ways = ways[0 if size <= DOUBLED_UP_TO else 1 : 2 if own.type == "cpu" else 3]
        for device, precision, least in ways:
            self.device, self.precision, self.tolerance = device, precision, max(tolerance, least)
            self.reference = randomised(model, self._moved, self.generator)
            self.args, self.kwargs = tree_map(self._moved, call)
            originals = OperationLog(model)
            try:
                with undisturbed(self.reference), originals:
                    self._call(self.reference)
                self._outputs(self.reference)
                return
            except Exception:  # a network may insist on a precision or on its device
                if (device, precision, least) == ways[-1]:
                    raise
            finally:
                _refuse_shared(model, originals.read())

    def _moved(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(self.device, at_least(leaf.dtype, self.precision), copy=True)

    def _compare_permuted(self, plan: ChannelPlan, groups: Sequence[ChannelGroup]) -> tuple[float, str | None]:
        if self.precision != torch.float64:
            return 0.0, None  # channels are summed in another order, and rounding grows with depth
        changed = copy.deepcopy(self.reference)
        permute_(changed, plan, groups, self.generator)
        return self._difference(self.whole, self._outputs(changed), "once its channels change places, ")

    def compare(self, plan: ChannelPlan, mask: TicketMask, *, backward: bool = True) -> tuple[float, str | None]:
        """Extract along one mask; relative error and what is wrong, None if nothing is."""
        modes = [(True, plan, "")]
        if backward and self.training is not None:
            modes.append((False, as_in_training(plan, self.training), "in training, "))
        records = [NumberRecord() for _ in modes]
        try:
            ticket = extract(self.reference, plan, mask)
            actual = [
                self._outputs(ticket, record, evaluate=evaluate)
                for record, (evaluate, *_) in zip(records, modes, strict=True)
            ]
            if backward:
                self._backward(ticket)
        except Exception as problem:  # whatever user code raises on a narrower network is the finding
            return float("inf"), f"{type(problem).__name__}: {problem}"
        dense, worst = zeroed(self.reference, plan, mask), 0.0
        for record, found, (evaluate, traced_plan, when) in zip(records, actual, modes, strict=True):
            counterpart, own = (
                Counterpart(traced_plan, mask, {} if record.from_data else record.numbers),
                NumberRecord(),
            )
            error, finding = self._difference(self._outputs(dense, counterpart, own, evaluate=evaluate), found, when)
            worst = max(worst, error)
            if finding is None:
                finding = _foreign_number(traced_plan, own, record, when)
            if finding is not None:
                return worst, finding
        return worst, None

    def _difference(self, expected: Sequence[Tensor], actual: Sequence[Tensor], when: str) -> tuple[float, str | None]:
        if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
            return float("inf"), f"{when}the output changes its shape"
        if self.scale == 0.0:
            return float("inf"), "the output is zero whatever the weights"
        if not math.isfinite(self.scale):
            return float("inf"), "the output is not finite with random weights"
        # What a mask leaves of a few channels may well be zero.
        scale = _largest(expected) or self.scale
        # Each output by its own size, so that larger ones do not hide it, unless there may be nothing but rounding.
        least = scale * (FAINT if self.precision == torch.float64 else 1.0)
        error = _largest([(a - e) / max(_largest([e]), least) for a, e in zip(actual, expected, strict=True)])
        return error, None if error <= self.tolerance else f"{when}the output differs by {error:.1e} (relative)"

    def _call(self, network: nn.Module) -> list[Tensor]:
        with self._exactly():
            return _tensors(network(*self.args, **self.kwargs))

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        exactly = unrounded() if self.precision == torch.float64 else nullcontext()
        with torch.autocast(self.device.type, enabled=False), exactly:
            yield

    def _outputs(self, network: nn.Module, *modes: AbstractContextManager[Any], evaluate: bool = True) -> list[Tensor]:
        """Of evaluation mode, or of the network's own modes, where nothing is left to chance."""
        chance = nullcontext() if evaluate else without_chance()
        with undisturbed(network, evaluate=evaluate), chance, ChannelLocalNorms(), ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return self._call(network)

    def _runs_in_its_modes(self) -> bool:
        """False where training needs more than a sample or two (batch normalisation)."""
        try:
            with undisturbed(self.reference, evaluate=False):
                self._call(self.reference)
        except Exception:
            return False
        return True

    def _trace_training(self) -> ChannelTracer | None:
        """What a trace in the network's own modes sees, where that computes something else than evaluation does."""
        if not any(module.training for module in self.reference.modules()):
            return None
        logs = []
        for evaluate in (True, False):
            log, record = OperationLog(self.reference), NumberRecord()
            with log:
                self._outputs(self.reference, record, evaluate=evaluate)
            logs.append((log.operations, record.numbers))
        if logs[0] == logs[1]:
            return None
        with without_chance(), self._exactly():
            return traced(self.reference, self.args, self.kwargs, watch_widths=False, evaluate=False)[0]

    def _backward(self, ticket: nn.Module) -> None:
        with undisturbed(ticket, evaluate=not self.keeps_modes), torch.enable_grad():
            outputs = [tensor for tensor in self._call(ticket) if tensor.requires_grad]
            if outputs:
                torch.stack([tensor.float().square().mean() for tensor in outputs]).sum().backward()


def _foreign_number(plan: ChannelPlan, dense: NumberRecord, ticket: NumberRecord, when: str) -> str | None:
    """A number that the ticket computes from its widths, although it is none of its own.

    What it does may not show with these inputs: another time step may be where it matters.
    """
    if ticket.from_data:
        return None
    allowed = plan.own_numbers | plan.score_numbers
    for call, found in ticket.numbers.items():
        if call not in allowed and found != dense.numbers.get(call, found):
            return f"{when}a number depends on its width ({call[0]} with {found}, not {dense.numbers[call]})"
    return None


def _refuse_shared(model: nn.Module, read: set[str]) -> None:
    if read:
        names = sorted(read)
        raise StructureError(
            f"denoiser: a copy of {type(model).__name__} still computes with {len(names)} tensors of the original "
            f"({', '.join(names[:3])}), and so would tickets. The usual cause is a lambda or local function that holds "
            "the network or a part of it: make it a method, a module or a functools.partial."
        )


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude; NaN if there is one."""
    return float(torch.stack([tensor.abs().max().double() for tensor in tensors]).max()) if tensors else 0.0


def _tensors(out: Any) -> list[Tensor]:
    plain = dict(vars(out)) if hasattr(out, "__dataclass_fields__") else out
    return [leaf for leaf in tree_flatten(plain)[0] if isinstance(leaf, Tensor)]
