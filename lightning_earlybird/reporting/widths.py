"""The figure of what each ticket has left: channels by layer, for every region."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_earlybird.masks import TicketMask
from lightning_earlybird.regions import TimestepRegion
from lightning_earlybird.reporting.figures import BLUE, GREY, canvas
from lightning_earlybird.search import describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS = 110
_WIDTHS_INCH = (5.6, 24.0)


def widths_figure(masks: Sequence[TicketMask], regions: Sequence[TimestepRegion]) -> "Figure":
    """Kept channels of every channel group, a panel per ticket; the dense network is the outline.

    Groups stand in the order of the network: that of its parameters, with what is called ``mid`` before what is called
    ``up``, as U-Nets run it but diffusers does not register it.

    Args:
        masks: The mask of each ticket, over the same groups.
        regions: The region of each, along the time axis.

    Returns:
        A figure on its own Agg canvas.

    Raises:
        ValueError: If there are no masks, not one for each region, or masks over other groups.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not masks or len(masks) != len(regions):
        raise ValueError(f"masks: {len(masks)} for {len(regions)} regions; give one for each, and at least one.")
    for mask in masks:
        masks[0].check_same_groups(mask)
    names = network_order(list(masks[0].kept))
    least, most = _WIDTHS_INCH
    width = min(most, max(least, 0.19 * len(names) + 1.2))
    tallest = max(map(len, names))
    places = range(len(names))
    dense = [len(masks[0].kept[name]) for name in names]
    # Names are written below the lowest panel, where they need the more room the longer they are.
    with canvas(width, 1.35 * len(masks) + 0.4 + 0.058 * tallest) as figure:
        axes = figure.subplots(len(masks), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axis, mask, region in zip(axes, masks, regions, strict=True):
            kept = [int(mask.kept[name].sum()) for name in names]
            axis.bar(places, kept, width=0.8, color=BLUE, label="ticket")
            axis.stairs(dense, [place - 0.5 for place in range(len(names) + 1)], color=GREY, linewidth=1, label="dense")
            axis.set_title(f"{describe(region)}: {sum(kept)} of {sum(dense)} channels kept", fontsize=9)
            axis.set_ylabel("channels")
            axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
            axis.set_axisbelow(True)
        step = math.ceil(len(names) / _MOST_LABELS)
        axes[-1].set_xticks(places[::step], names[::step], rotation=90, fontsize=6.5)
        axes[-1].set_xlim(-0.7, len(names) - 0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def network_order(names: Sequence[str]) -> list[str]:
    """Channel groups as the network runs through them, as far as their names tell.

    Args:
        names: In the order of the parameters.
    """

    def begins(name: str, word: str) -> bool:
        return name.partition(".")[0].startswith(word)

    up = next((place for place, name in enumerate(names) if begins(name, "up")), len(names))
    middle = [name for name in names[up:] if begins(name, "mid")]
    return [*names[:up], *middle, *(name for name in names[up:] if name not in middle)]
