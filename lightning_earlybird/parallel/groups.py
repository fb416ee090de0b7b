"""The world of ranks split into groups that train apart, and put together again.

Each group's process group stands in for torch's default one, so that everything that Lightning, DDP and torchmetrics do
with "all ranks" is done within the group. Replacing the default group is private API of torch; the alternative,
passing groups to each of them, misses what users and callbacks call themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


class RankGroups:
    """One group of ranks in place of the world, until :meth:`leave`.

    Args:
        groups: The ranks of each group; every rank of the world is in exactly one. The same on all ranks.
        rank: This rank, in the world.
        timeout: For collectives within the group; None takes torch's default.
    """

    def __init__(self, groups: Sequence[tuple[int, ...]], rank: int, timeout: timedelta | None = None) -> None:
        self.rank = rank
        self.group = next(group for group in groups if rank in group)
        # All ranks create all groups, in the same order: creating one is a matter of the whole world.
        handles = [dist.new_group(list(group), timeout=timeout) for group in groups]
        self._world = c10d._get_default_group()
        self._own = handles[list(groups).index(self.group)]
        c10d._update_default_pg(self._own)

    @property
    def size(self) -> int:
        """Ranks in this rank's group."""
        return len(self.group)

    @property
    def position(self) -> int:
        """This rank's number within its group."""
        return self.group.index(self.rank)

    def leave(self) -> bool:
        """Have the world back as torch's default group; no communication.

        Returns:
            Whether that changed anything: not when the world is back already.
        """
        if c10d._world.default_pg is not self._own:
            return False
        c10d._update_default_pg(self._world)
        return True
