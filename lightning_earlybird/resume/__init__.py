"""What a fit needs to go on from a checkpoint as if it had not been interrupted, and Lightning does not keep."""

from lightning_earlybird.resume.beginning import begins_anew
from lightning_earlybird.resume.continuation import CONTINUATION_KEY, Continuing

__all__ = ["CONTINUATION_KEY", "Continuing", "begins_anew"]
