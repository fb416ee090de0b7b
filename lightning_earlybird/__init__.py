"""Early-bird tickets for diffusion models, found and trained within one Lightning fit.

The method is EB-Diff-Train (Early-Bird Diffusion, arXiv 2504.09606): a dense denoiser trains until its pruning masks
settle, and then becomes one small network per timestep region, each trained only where it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_earlybird.detector import EarlyBirdDetector
from lightning_earlybird.draws import draw_uniform, draw_within
from lightning_earlybird.ensemble import TicketEnsemble
from lightning_earlybird.importance import NonFiniteWeightsError
from lightning_earlybird.loading import TicketCheckpoints, load_from_checkpoint
from lightning_earlybird.masks import TicketMask
from lightning_earlybird.parallel.devices import DeviceTable, devices_that_pay_off
from lightning_earlybird.parallel.liaison import RankLostError
from lightning_earlybird.parallel.plan import TicketLoad, TicketPlan, plan_tickets
from lightning_earlybird.parallel.turn_check import TimestepsOutsideError
from lightning_earlybird.pruner import SearchLimitError, TimestepAwarePruner
from lightning_earlybird.regions import TimestepPartition, TimestepRegion
from lightning_earlybird.strategy import MultiTicketStrategy
from lightning_earlybird.tickets import EnsembleFormatError, TicketFacts

if TYPE_CHECKING:
    from lightning_earlybird.sample_logger import SampleLogger
    from lightning_earlybird.sampler import TicketEnsembleSampler
    from lightning_earlybird.schedulers import SpacedDDIMScheduler

__version__ = "0.1.0"

__all__ = [
    "DeviceTable",
    "EarlyBirdDetector",
    "EnsembleFormatError",
    "MultiTicketStrategy",
    "NonFiniteWeightsError",
    "RankLostError",
    "SampleLogger",
    "SearchLimitError",
    "SpacedDDIMScheduler",
    "TicketCheckpoints",
    "TicketEnsemble",
    "TicketEnsembleSampler",
    "TicketFacts",
    "TicketLoad",
    "TicketMask",
    "TicketPlan",
    "TimestepAwarePruner",
    "TimestepPartition",
    "TimestepRegion",
    "TimestepsOutsideError",
    "devices_that_pay_off",
    "draw_uniform",
    "draw_within",
    "load_from_checkpoint",
    "plan_tickets",
]

# Found when they are asked for, as they bring diffusers along, which training does not need. The mixins are there for
# diffusers: it looks for the base class of a pipeline's component in the library that model_index.json names.
_LAZY = {
    "ModelMixin": "diffusers",
    "SampleLogger": "lightning_earlybird.sample_logger",
    "SchedulerMixin": "diffusers",
    "SpacedDDIMScheduler": "lightning_earlybird.schedulers",
    "TicketEnsembleSampler": "lightning_earlybird.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
