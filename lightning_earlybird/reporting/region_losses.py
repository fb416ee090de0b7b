"""The training loss by timestep region, told from what the backward pass sends into the denoiser.

A ``training_step`` returns one number for a batch of mixed timesteps. Where that number is the mean squared error of
the denoiser's output,

    L = sum_i l_i / B,    l_i = ||output_i - target_i||^2 / D,

with B samples of D numbers each, its gradient with respect to the output holds the error itself, times ``2 / (B D)``,
and with it the loss of every sample, whatever the target is:

    l_i = B^2 D / 4 * ||dL / d output_i||^2.

For any other loss this is not so, and then ``sum_i l_i / B`` is not L: each batch is checked for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_earlybird.compilation import unwrap
from lightning_earlybird.ensemble import TimestepArgument
from lightning_earlybird.regions import TimestepPartition

TOLERANCE = 1e-3
"""Largest relative difference between the mean of the derived losses and what ``training_step`` returned; more in half
precision."""


class NotDerivableError(Exception):
    """A training loss is not the mean squared error of the denoiser's output."""


@dataclass(eq=False)
class WatchedCall:
    """One call of the denoiser with gradients enabled.

    Attributes:
        timesteps: Shape (rows,), as they came in.
        numbers: Numbers in the output for one sample.
        squares: Squared norm of the gradient of each sample's output, shape (rows,); None before the backward pass.
        precision: Relative spacing of the gradient's numbers.
    """

    timesteps: Tensor
    numbers: int
    squares: Tensor | None = None
    precision: float = 0.0

    def take(self, gradient: Tensor) -> None:
        """Keep of a gradient what is needed; to be called by autograd. The gradient is left as it is."""
        self.precision = torch.finfo(gradient.dtype).eps
        self.squares = gradient.detach().float().reshape(len(self.timesteps), -1).square().sum(1)


@dataclass(eq=False)
class WatchedBatch:
    """What is known about one batch.

    Attributes:
        calls: Calls of the denoiser.
        loss: What went backward: the loss, times ``scale``; None before that.
        scale: Factor between the loss that ``training_step`` returned and the one that went backward.
        losses: Loss of each sample as the module says itself, shape (rows of the first call,); None if it does not.
    """

    calls: list[WatchedCall] = field(default_factory=list)
    loss: Tensor | None = None
    scale: Tensor | float = 1.0
    losses: Tensor | None = None

    def sample_losses(self) -> tuple[Tensor, Tensor] | None:
        """Timesteps and losses of the samples, each of shape (samples,), the losses in float64, both on the CPU.

        Returns:
            None where there is nothing to tell, such as after an overflow in half precision.

        Raises:
            NotDerivableError: If the loss is not the mean squared error of the denoiser's output.
        """
        if self.losses is not None:
            return (self.calls[0].timesteps.cpu(), self.losses.double().cpu()) if self.calls else None
        calls = [call for call in self.calls if call.squares is not None]
        if self.loss is None or not calls:
            return None
        rows = sum(len(call.timesteps) for call in calls)
        scale = float(self.scale)
        found = torch.cat([call.squares.double() * call.numbers for call in calls if call.squares is not None]).cpu()
        found *= (rows / (2 * scale)) ** 2
        returned, mean = float(self.loss) / scale, float(found.mean())
        if not (math.isfinite(returned) and math.isfinite(mean)):
            return None
        # In half precision neither is more exact than that.
        exact = max(2 * torch.finfo(self.loss.dtype).eps, *(call.precision for call in calls))
        if abs(mean - returned) > max(TOLERANCE, exact) * abs(returned):
            raise NotDerivableError(f"{returned:.4g} was returned, {mean:.4g} is the mean squared error")
        return torch.cat([call.timesteps.cpu() for call in calls]), found


class RegionLosses:
    """Adds up the losses of samples by region, without waiting for the device at each batch.

    Args:
        partition: The regions. A sample counts where its timestep lies, also where an overlap has another ticket train
            on it.
    """

    def __init__(self, partition: TimestepPartition) -> None:
        self.partition = partition
        self.seen = torch.zeros(len(partition), dtype=torch.float64)
        """Samples in each region since the switch, or since the start before it; shape (regions,)."""
        self.seen_before_switch = 0.0
        self._totals = torch.zeros(2, len(partition), dtype=torch.float64)  # sums of losses, numbers of samples
        self._pending: list[WatchedBatch | tuple[int, Tensor]] = []

    def add(self, batch: WatchedBatch) -> None:
        """Take a batch in; what it holds is read later."""
        self._pending.append(batch)

    def add_mean(self, region: int, loss: Tensor) -> None:
        """Take in the loss of a batch that belongs to one region as a whole."""
        self._pending.append((region, loss.detach()))

    def switch(self) -> None:
        """From here on tickets see the samples."""
        self._read(strict=False)
        self.seen_before_switch = float(self.seen.sum())
        self.seen = torch.zeros_like(self.seen)

    def take(self) -> list[float | None]:
        """The mean loss in each region since the last time, in region order; None where there was no sample.

        Raises:
            NotDerivableError: If a loss cannot be told sample by sample.
        """
        self._read(strict=True)
        sums, counts = self._totals.tolist()
        self._totals = torch.zeros_like(self._totals)
        return [total / count if count else None for total, count in zip(sums, counts, strict=True)]

    def samples_seen(self) -> tuple[float, list[float]]:
        """Samples of all batches until now: in the search, and of each ticket since the switch."""
        self._read(strict=False)
        return self.seen_before_switch, self.seen.tolist()

    def state_dict(self, *, taken: bool) -> dict[str, Any]:
        """What checkpoints keep, in tensors and plain containers.

        Args:
            taken: Whether the losses so far will have been taken by the time that a resumed fit begins.
        """
        self._read(strict=False)
        totals = torch.zeros_like(self._totals) if taken else self._totals.clone()
        return {"totals": totals, "seen": self.seen.clone(), "seen_before_switch": self.seen_before_switch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, for a state that :func:`check_state` has passed.

        That of other regions is left where it is: their tickets are refused elsewhere, by a message of their own.
        """
        if state["seen"].shape == self.seen.shape:
            self._totals, self.seen = state["totals"].double().cpu().clone(), state["seen"].double().cpu().clone()
            self.seen_before_switch = float(state["seen_before_switch"])

    def _read(self, *, strict: bool) -> None:
        """Read what has been taken in; unless ``strict``, batches that do not tell are left out."""
        batches, self._pending = self._pending, []
        for batch in batches:
            if isinstance(batch, tuple):
                region, loss = batch
                self._totals[:, region] += torch.tensor([float(loss), 1.0], dtype=torch.float64)
                continue
            try:
                samples = batch.sample_losses()
            except NotDerivableError:
                if strict:
                    raise
                continue
            if samples is None:
                continue
            owners = self.partition.lookup(samples[0], check=False)
            inside = owners >= 0
            ones = torch.ones(int(inside.sum()), dtype=torch.float64)
            self._totals[0].index_add_(0, owners[inside], samples[1][inside])
            self._totals[1].index_add_(0, owners[inside], ones)
            self.seen.index_add_(0, owners[inside], ones)


def check_state(state: Mapping[str, Any]) -> None:
    """Refuse what :meth:`RegionLosses.state_dict` cannot have given.

    Raises:
        KeyError: If something is missing.
        TypeError: If it is something else than sums and counts, one for each region.
    """
    totals, seen, before = state["totals"], state["seen"], state["seen_before_switch"]
    if not isinstance(before, float) or not isinstance(totals, Tensor) or not isinstance(seen, Tensor):
        raise TypeError(f"losses by region: {type(totals).__name__}, {type(seen).__name__}, {type(before).__name__}")
    if seen.dim() != 1 or totals.shape != (2, len(seen)) or not totals.is_floating_point() or totals.is_sparse:
        raise TypeError(f"losses by region of the shapes {tuple(totals.shape)} and {tuple(seen.shape)}")


def watch_calls(network: nn.Module, timesteps: TimestepArgument, batch: WatchedBatch) -> Callable[[], None]:
    """Have the calls of a denoiser noted, until the function that is returned is called.

    Compiled code is left alone: what it returns is looked at from outside.

    Args:
        network: The denoiser, or its compiled wrapper, or the ensemble in its place.
        timesteps: Where it takes its timesteps.
        batch: Where calls are noted.
    """

    def note(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        found = next((each for each in _tensors(output) if each.requires_grad and each.dim() > 0), None)
        steps = torch.as_tensor(timesteps.find(args, kwargs)).detach().reshape(-1)
        if found is not None and len(steps) in (1, len(found)):  # one timestep may be given for all rows
            call = WatchedCall(steps.expand(len(found)), found[0].numel())
            batch.calls.append(call)
            found.register_hook(call.take)

    inner = network._compiled_call_impl
    if inner is not None and unwrap(network) is network:  # compiled in place: hooks would be compiled, too

        def called(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            note(args, kwargs, output)
            return output

        network._compiled_call_impl = called

        def restore() -> None:
            network._compiled_call_impl = inner

        return restore
    handle = network.register_forward_hook(lambda _, args, kwargs, output: note(args, kwargs, output), with_kwargs=True)
    return handle.remove


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a denoiser returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, tuple | list):
        for member in value:
            yield from _tensors(member)
    elif is_dataclass(value):
        for name in fields(value):
            yield from _tensors(getattr(value, name.name))
