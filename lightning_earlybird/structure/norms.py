"""Group normalisation whose groups differ in width: what pruning leaves of a GroupNorm's statistics groups."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class RaggedGroupNorm(nn.GroupNorm):
    """A GroupNorm over consecutive groups of channels that need not be equally wide.

    Statistics are taken in at least float32; the dtype of the result is that of ``torch.nn.functional.group_norm``, in
    half precision and under autocast as well. The state dict is that of a GroupNorm.

    Args:
        group_sizes: Channels of each group, in order.
        eps: Added to the variance.
        affine: Whether there are a weight and a bias, one number a channel.
        device: Where they are.
        dtype: Their dtype.

    Attributes:
        group_sizes: As given. Nothing else decides over the groups: ``num_groups`` is their number and cannot be set.

    Raises:
        ValueError: There is no group, or one without channels.

    Shape:
        (B, C, *) -> the same, with C = ``sum(group_sizes)``; the memory format is kept.
    """

    group_sizes: tuple[int, ...]

    def __init__(
        self,
        group_sizes: Sequence[int],
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = _checked(group_sizes)
        object.__setattr__(self, "group_sizes", sizes)  # the base class sets num_groups, which is derived from it
        super().__init__(1, sum(sizes), eps, affine, device, dtype)
        self._lay_out(self.weight.device if affine else torch.device(device or torch.get_default_device()))

    @classmethod
    def adopt_(
        cls, norm: nn.GroupNorm, group_sizes: Sequence[int], device: torch.device | None = None
    ) -> "RaggedGroupNorm":
        """Turn a GroupNorm into a ragged one, in place.

        The object stays the same, so that hooks and every other reference to it remain.

        Args:
            norm: A plain GroupNorm whose parameters already have their new width.
            group_sizes: Channels of each group, in order.
            device: Where it will compute, for a norm without parameters; with them it is theirs.

        Raises:
            ValueError: The module is of another class, or the sizes do not add up to its width.
        """
        sizes = _checked(group_sizes)
        if type(norm) is not nn.GroupNorm:
            raise ValueError(
                f"norm must be a plain GroupNorm, but it is a {type(norm).__name__}, whose forward pass may do "
                "something else."
            )
        if sum(sizes) != norm.num_channels:
            raise ValueError(
                f"group_sizes={sizes} add up to {sum(sizes)} channels, but the norm has {norm.num_channels}."
            )
        del norm.num_groups
        norm.group_sizes = sizes  # type: ignore[assignment]
        norm.__class__ = cls
        assert isinstance(norm, cls)
        norm._lay_out(norm.weight.device if norm.affine else device or torch.device("cpu"))
        return norm

    @property
    def num_groups(self) -> int:
        """Number of groups; they need not be equally wide."""
        return len(self.group_sizes)

    @num_groups.setter
    def num_groups(self, value: int) -> None:
        if "_slots" in self.__dict__:  # while the base class is constructed there is nothing to set yet
            raise AttributeError(
                f"num_groups={value} cannot be set on a RaggedGroupNorm, whose groups are {self.group_sizes}."
            )

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel over the channels of its group and all positions."""
        # Written with operations that know how to be differentiated in every way (twice, forward, batched, compiled).
        result_dtype = input.dtype
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Which dtype autocast gives depends on the device; the function itself knows.
            result_dtype = nn.functional.group_norm(input.new_zeros(1, 1, 2), 1).dtype
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        positions = tuple(range(2, x.dim()))
        mean = x.mean(positions) if positions else x
        centred = x - mean.view(mean.shape + (1,) * len(positions))
        # The norm reads the tensor once, where squares would be written out.
        squares = torch.linalg.vector_norm(centred, dim=positions).square() if positions else torch.zeros_like(x)
        variance = squares / math.prod(x.shape[2:])
        # Within a group, the variance is the mean variance of its channels plus the variance of their means: no term is
        # negative, so that nothing cancels, however far the values are from zero.
        slots, channels, counts, taken = (part.to(x.device) for part in (*self._slots, *self._sizes))
        per_group = nn.functional.pad(torch.stack([mean, variance]), (0, 1)).index_select(2, slots)
        means, variances = per_group.unflatten(2, taken.shape)  # (B, groups, widest group), zero where there is none
        centre = means.sum(2, keepdim=True) / counts
        spread = (variances + (means - centre).square() * taken).sum(2, keepdim=True) / counts
        statistics = torch.stack([centre, torch.rsqrt(spread + self.eps)])
        # Back to one number a channel, by way of an expansion: its gradient adds up in a fixed order.
        centre, scale = statistics.expand(-1, -1, *taken.shape).flatten(2).index_select(2, channels)
        if self.affine:
            scale = scale * self.weight
        shift = (mean - centre) * scale
        if self.affine:
            shift = shift + self.bias
        shape = (*scale.shape, *(1 for _ in positions))
        return torch.addcmul(shift.view(shape), centred, scale.view(shape)).to(result_dtype)

    def extra_repr(self) -> str:
        """As for a GroupNorm, with the groups."""
        return f"group_sizes={self.group_sizes}, num_channels={self.num_channels}, eps={self.eps}, affine={self.affine}"

    def _lay_out(self, device: torch.device) -> None:
        """Where the channels lie in a table of (groups, widest group).

        Not buffers: those would have to come and go in everything that pairs a ticket's tensors with the dense ones.
        """
        with torch.device("cpu"):  # whatever the default device is: these numbers have to exist
            sizes = torch.tensor(self.group_sizes)
            taken = torch.arange(int(sizes.max())) < sizes[:, None]
            slots = torch.full(taken.shape, self.num_channels)  # an empty place reads the zero behind the last channel
            slots[taken] = torch.arange(self.num_channels)
        channels = taken.flatten().nonzero().flatten()
        self._slots = (slots.flatten().to(device), channels.to(device))
        self._sizes = (sizes.view(-1, 1).to(device), taken.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RaggedGroupNorm":
        super()._apply(fn, recurse)
        # Computed anew on the device, and not moved: a module may come from the meta device without values.
        self._lay_out(fn(torch.empty(0, device=self._slots[0].device)).device)
        return self


def keep_statistics_groups(ticket: nn.Module, dense: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Have every GroupNorm of a ticket normalise over what is left of its original groups, in place.

    It stays a plain GroupNorm where those are equally wide. Classes derived from GroupNorm are left alone, and so are
    norms that the trace has not seen called: what is done with their groups is not known.

    Args:
        ticket: The network with its new tensors and widths.
        dense: The network it was made from, with the same module names.
        kept: Module name -> shape (dense width,), bool: which channels of its input are left.
    """
    originals = dict(dense.named_modules())
    device = next((parameter.device for parameter in ticket.parameters()), None)
    for name, norm in ticket.named_modules():
        original, stays = originals[name], kept.get(name)
        if type(norm) is not nn.GroupNorm or not isinstance(original, nn.GroupNorm) or stays is None:
            continue
        sizes = [size for size in stays.view(original.num_groups, -1).sum(dim=1).tolist() if size]
        if len(set(sizes)) == 1:
            norm.num_groups = len(sizes)
        else:
            RaggedGroupNorm.adopt_(norm, sizes, device)


def _checked(group_sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(group_sizes)
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"group_sizes={sizes} must be positive numbers of channels, one a group.")
    return sizes
