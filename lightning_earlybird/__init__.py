"""Early-bird tickets for diffusion models, found and trained within one Lightning fit.

The method is EB-Diff-Train (Early-Bird Diffusion, arXiv 2504.09606): a dense denoiser trains until its pruning masks
settle, and then becomes one small network per timestep region, each trained only where it is used.
"""

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
from lightning_earlybird.sample_logger import SampleLogger
from lightning_earlybird.sampler import TicketEnsembleSampler
from lightning_earlybird.strategy import MultiTicketStrategy
from lightning_earlybird.tickets import EnsembleFormatError, TicketFacts

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
