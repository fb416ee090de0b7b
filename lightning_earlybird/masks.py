"""Ticket masks: which channels a ticket keeps, named by channel group."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TicketMask:
    """The channels that a ticket keeps.

    Args:
        kept: Channel group name -> bool tensor of shape (channels of the group,) on the CPU; True = kept. The mapping
            is copied, its tensors are not; treat them as constant.

    Raises:
        ValueError: If there are no groups, a tensor is not bool, one-dimensional and on the CPU, or a group keeps no
            channel.
    """

    kept: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", dict(self.kept))
        if not self.kept:
            raise ValueError("kept={} must name at least one channel group; the network has nothing to prune.")
        for name, group in self.kept.items():
            if not isinstance(group, Tensor) or group.dtype != torch.bool or group.ndim != 1:
                found = f"{group.dtype}, shape {tuple(group.shape)}" if isinstance(group, Tensor) else repr(group)
                raise ValueError(f"kept[{name!r}] ({found}) must be a bool tensor of shape (channels,); True = kept.")
            if group.device.type != "cpu":
                raise ValueError(f"kept[{name!r}] is on {group.device}, but masks live on the CPU. Call .cpu() on it.")
            if not bool(group.any()):
                raise ValueError(
                    f"kept[{name!r}] keeps none of its {len(group)} channels, which would cut the network in two. "
                    "Keep at least one, or lower the sparsity."
                )

    @property
    def num_channels(self) -> int:
        """Channels over all groups, kept or not."""
        return sum(len(group) for group in self.kept.values())

    @property
    def num_kept(self) -> int:
        """Channels kept over all groups."""
        return sum(int(group.sum()) for group in self.kept.values())

    @property
    def sparsity(self) -> float:
        """Achieved sparsity: the fraction of channels removed over all groups."""
        return (self.num_channels - self.num_kept) / self.num_channels

    def flat(self) -> Tensor:
        """All groups in a row.

        Returns:
            A new bool tensor of shape (num_channels,), in group order; True = kept.
        """
        return torch.cat(list(self.kept.values()))

    def distance(self, other: "TicketMask") -> float:
        """The mask distance of Early-Bird tickets (arXiv 1909.11957): the normalised Hamming distance.

        Args:
            other: A mask over the same groups; their order does not matter.

        Returns:
            The fraction of channels that one mask keeps and the other does not, in ``[0, 1]``.

        Raises:
            ValueError: If a group is missing from one of the masks or differs in size.
        """
        self.check_same_groups(other)
        differing = sum(int((group ^ other.kept[name]).sum()) for name, group in self.kept.items())
        return differing / self.num_channels

    def null_distance(self) -> float:
        """The distance to expect by chance, against which a measured one means something.

        Two independent, uniformly random masks that keep as many channels of each group as this one differ on average
        by ``sum_g n_g * 2 * s_g * (1 - s_g) / sum_g n_g``, with ``n_g`` the channels of group g and ``s_g`` the
        fraction of them removed.

        Returns:
            That expected distance, in ``[0, 0.5]``.
        """
        expected = 0.0
        for group in self.kept.values():
            size, kept = len(group), int(group.sum())
            # n * 2 * s * (1 - s) with s = (n - kept) / n, with one division for the sake of exactness.
            expected += 2 * (size - kept) * kept / size
        return expected / self.num_channels

    def check_same_groups(self, other: "TicketMask") -> None:
        """Refuses a mask over other channels than this one's.

        Args:
            other: The mask to compare with.

        Raises:
            ValueError: If a group is missing from one of the masks or differs in size; the message names it.
        """
        for name in [*self.kept, *other.kept]:
            sizes = [len(mask.kept[name]) if name in mask.kept else 0 for mask in (self, other)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"The masks differ in group {name!r}: {sizes[0]} channels against {sizes[1]} (0: no such group). "
                    "Masks can be compared only if they were drawn from the same channel plan."
                )

    def state_dict(self) -> dict[str, Tensor]:
        """The mask as plain tensors.

        Returns:
            Group name -> bool tensor of shape (channels,); the dict is new, the tensors are shared.
        """
        return dict(self.kept)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "TicketMask":
        """Inverse of :meth:`state_dict`.

        Args:
            state: What :meth:`state_dict` gave.

        Returns:
            The validated mask.

        Raises:
            ValueError: As for the constructor.
        """
        return cls(state)
