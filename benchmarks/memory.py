"""How much memory a call takes at its peak: counted tensor by tensor, and as the growth of a process."""

import re
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while the mode is active and that are alive together.

    Memory that several tensors share (views) counts once, for as long as any of them lives. The count is the same on
    every run: it does not see the allocator, nor workspace inside kernels.

    Attributes:
        peak: The largest number of bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._owners: Counter[int] = Counter()
        self._given: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Weights and inputs were there before.
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in self._owners:
                self._given.add(key)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                key = leaf.untyped_storage()._cdata
                if key not in self._given:
                    self._own(leaf, key)
        return out

    def _own(self, tensor: Tensor, key: int) -> None:
        size = tensor.untyped_storage().nbytes()
        self._now += size if not self._owners[key] else 0
        self._owners[key] += 1
        self.peak = max(self.peak, self._now)

        def release() -> None:
            self._owners[key] -= 1
            if not self._owners[key]:
                del self._owners[key]
                self._now -= size

        weakref.finalize(tensor, release).atexit = False


def live_bytes(task: Callable[[], Any]) -> int:
    """The peak of :class:`LiveBytes` while ``task`` runs."""
    with LiveBytes() as counted:
        task()
    return counted.peak


def growth(task: Callable[[], Any]) -> int | None:
    """By how many bytes the resident memory of this process grows at its peak while ``task`` runs; Linux only.

    Memory that earlier calls have left to the allocator hides part of it: measure in a fresh process.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        before = _status("VmRSS")
        task()
        return _status("VmHWM") - before
    except (OSError, TypeError):
        return None


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"{field} is not in /proc/self/status")
    return int(found[1]) * 1024
