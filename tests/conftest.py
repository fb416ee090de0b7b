"""Settings for the whole suite."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# The networks are tiny: threads only wait for each other, and results would depend on how many there are. The variable
# keeps Lightning's launchers from raising the number again for the rest of the process, and is for what tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# No deadline: a slow or shared machine is no bug. Derandomized, so that a commit passes or fails the same everywhere.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")

# What Lightning's launchers of several processes leave behind: whoever inherits it takes itself for one of their ranks.
RANKS = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What W&B, and Lightning's logger for it, leave behind: processes that inherit it share the service of this one, which
# goes on without it, and stay offline whatever they are told.
WANDB = {name: os.environ.get(name) for name in ("WANDB_SERVICE", "WANDB_MODE")}


@pytest.fixture(autouse=True)
def _no_test_leaves_a_world_behind() -> Iterator[None]:
    """Fits of one process under a strategy for several neither launch other tests' processes nor warn in them."""
    before = {name: os.environ.get(name) for name in RANKS}
    _restore(WANDB)  # a fixture of the module may have left it
    yield
    _restore(before | WANDB)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
