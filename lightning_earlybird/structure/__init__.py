"""The structure engine: which channels a denoiser has, and smaller networks made of some of them.

This is the one place that edits modules.
"""

from lightning_earlybird.structure.adapters import attribute_edits
from lightning_earlybird.structure.cost import WidthCost, count_macs, count_parameters
from lightning_earlybird.structure.extract import Norm, TicketSlicer, extract
from lightning_earlybird.structure.norms import RaggedGroupNorm
from lightning_earlybird.structure.plan import ChannelGroup, ChannelPlan, FrozenChannels, StructureError, by_reason
from lightning_earlybird.structure.products import Product
from lightning_earlybird.structure.resize import resize_
from lightning_earlybird.structure.trace import trace_plan
from lightning_earlybird.structure.verify import Verification, failing_masks, verify_plan

__all__ = [
    "ChannelGroup",
    "ChannelPlan",
    "FrozenChannels",
    "Norm",
    "Product",
    "RaggedGroupNorm",
    "StructureError",
    "TicketSlicer",
    "Verification",
    "WidthCost",
    "attribute_edits",
    "by_reason",
    "count_macs",
    "count_parameters",
    "extract",
    "failing_masks",
    "resize_",
    "trace_plan",
    "verify_plan",
]
