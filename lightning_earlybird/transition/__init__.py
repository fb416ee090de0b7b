"""What a Lightning Trainer needs when the denoiser changes its structure in the middle of a fit.

:func:`check_supported` says before training begins whether the switch can work; :func:`replace_denoiser` makes it.
"""

from lightning_earlybird.transition.averages import averaged_modules, initial_share
from lightning_earlybird.transition.checks import check_supported, check_trained
from lightning_earlybird.transition.scores import forget_scores
from lightning_earlybird.transition.switch import (
    let_tickets_idle,
    replace_denoiser,
    replace_outside_trainer,
    unwrap_ddp,
)

__all__ = [
    "averaged_modules",
    "check_supported",
    "check_trained",
    "forget_scores",
    "initial_share",
    "let_tickets_idle",
    "replace_denoiser",
    "replace_outside_trainer",
    "unwrap_ddp",
]
