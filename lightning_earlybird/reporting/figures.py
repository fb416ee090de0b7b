"""Figures of the search, drawn without pyplot, so that neither a notebook's backend nor its figures are touched."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.imports import RequirementCache

from lightning_earlybird.convergence import MaskWindow
from lightning_earlybird.durable import file_written_aside
from lightning_earlybird.regions import TimestepRegion
from lightning_earlybird.search import SearchKey, describe

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MATPLOTLIB_AVAILABLE = RequirementCache("matplotlib>=3.8")

# Okabe and Ito's palette, which stays apart under the common kinds of colour blindness; line styles differ as well.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#595959"
_THICK: dict[str, Any] = {"color": BLUE, "lw": 2.2, "marker": "o", "ms": 3, "zorder": 4}
_THIN: dict[str, Any] = {"lw": 1.1, "ls": "--"}


def distance_figure(windows: Mapping[SearchKey, MaskWindow], threshold: float) -> "Figure":
    """Mask distances over training, one panel per sparsity or region.

    Differs from the paper (arXiv 2504.09606): beside the FIFO distance that decides, each panel shows the distance from
    initialisation, the distance to half the training so far, and the null line (two random masks). A mask that keeps
    drifting on a logarithmic clock is then told from one that has settled.

    Args:
        windows: Sparsity (or region) -> its masks.
        threshold: The distance at which a ticket emerges.

    Returns:
        A figure on its own Agg canvas.

    Raises:
        ValueError: If there are no windows.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    with _panels(windows, width=3.6, height=3.5, share=True, layout="constrained") as (figure, axes):
        for axis, (key, masks) in zip(axes, _in_order(windows), strict=True):
            checks = masks.checks
            for values, label, style in (
                ([check.distance for check in checks], "largest distance in the FIFO", _THICK),
                ([check.from_start for check in checks], "to initialisation", _THIN | {"color": ORANGE, "ls": "-."}),
                ([check.from_half for check in checks], "to half the training so far", _THIN | {"color": GREEN}),
            ):
                points = [(check.step, value) for check, value in zip(checks, values, strict=True) if value is not None]
                axis.plot([step for step, _ in points], [value for _, value in points], label=label, **style)
            axis.axhline(threshold, color=RED, linewidth=1.3, label=f"threshold {threshold:g}")
            null = masks.null_distance
            if null is not None:
                axis.axhline(null, color=GREY, linestyle=":", linewidth=1.6, label="two random masks")
            emerged = next((check for check in checks if check.converged), None)
            if emerged is not None and emerged.distance is not None:
                axis.plot([emerged.step], [emerged.distance], "*", color=RED, markersize=13, zorder=5, label="emerged")
            when = "not emerged" if emerged is None else f"emerged at step {emerged.step}"
            axis.set_title(_title(key, f": {when}"))
            axis.set_xlabel("training step")
            axis.grid(color="#DDDDDD", linewidth=0.6)
        # The panels share their limits, and setting any ends their adaptation to what is drawn.
        axes[0].set_xlim(left=0)
        axes[0].set_ylim(bottom=0)
        axes[0].set_ylabel("mask distance")
        # The panels name the same lines; a line that only some have (no null yet, not emerged) still gets its entry.
        named = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        columns = len(named) if len(axes) > 2 else 3 if len(axes) == 2 else 2
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def overlap_figure(windows: Mapping[SearchKey, MaskWindow]) -> "Figure":
    """Distances between all stored masks, a panel per sparsity or region (the heat map of arXiv 1909.11957).

    Args:
        windows: Sparsity (or region) -> its masks.

    Returns:
        A figure on its own Agg canvas. Dark is close; a dark square that grows from the lower right corner is a mask
        that has settled.

    Raises:
        ValueError: If there are no windows.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    with _panels(windows, width=3.3, height=3.4, share=False, layout="compressed") as (figure, axes):
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        pairs = {key: masks.pairwise() for key, masks in _in_order(windows)}
        # One colour scale for all panels, so that they can be compared.
        top = max((float(distances.max()) for _, distances in pairs.values() if distances.numel()), default=0.0)
        scale = Normalize(0.0, top or 1.0)
        for axis, (key, (steps, distances)) in zip(axes, pairs.items(), strict=True):
            axis.set_title(_title(key))
            axis.set_xlabel("mask of training step")
            if not steps:
                axis.text(0.5, 0.5, "no masks yet", ha="center", va="center", transform=axis.transAxes)
                continue
            axis.imshow(distances.numpy(), cmap="viridis", norm=scale, interpolation="nearest")
            # Thinned histories are not evenly spaced, so that the axes are indices with steps as their labels.
            ticks = range(0, len(steps), math.ceil(len(steps) / 6))
            axis.set_xticks(ticks, [str(steps[tick]) for tick in ticks], rotation=45)
            axis.set_yticks(ticks, [str(steps[tick]) for tick in ticks])
        axes[0].set_ylabel("mask of training step")
        figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, label="mask distance", shrink=0.85)
    return figure


def save_figure(figure: "Figure", path: str | PathLike[str]) -> None:
    """Writes a figure to a PNG file, which appears whole or not at all.

    Args:
        figure: The figure.
        path: The file; missing folders are made, an existing file is replaced.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with file_written_aside(Path(path)) as file:
        figure.savefig(file, format="png", facecolor="white")


def pixels(figure: "Figure") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """A figure as an image, shape (height, width, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # A figure made elsewhere may sit on another canvas, which drawing on a new one would replace.
    own = figure.canvas
    canvas: Any = own if isinstance(own, FigureCanvasAgg) else FigureCanvasAgg(figure)
    canvas.draw()
    image: np.ndarray[Any, np.dtype[np.uint8]] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    figure.set_canvas(own)
    return image


@contextmanager
def canvas(
    width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained"
) -> Iterator["Figure"]:
    """An empty figure on an Agg canvas of its own, to be drawn within the context, where the house style holds.

    Args:
        width: In inches.
        height: In inches.
        layout: Matplotlib's layout engine.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not MATPLOTLIB_AVAILABLE:
        raise ModuleNotFoundError(f"Figures need matplotlib: pip install matplotlib. {MATPLOTLIB_AVAILABLE}")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9.0, "axes.titlesize": 10.0, "legend.fontsize": 8.5}):
        figure = Figure(figsize=(width, height), dpi=150, layout=layout)
        FigureCanvasAgg(figure)
        yield figure


@contextmanager
def _panels(
    windows: Mapping[SearchKey, MaskWindow],
    *,
    width: float,
    height: float,
    share: bool,
    layout: Literal["constrained", "compressed"],
) -> Iterator[tuple["Figure", "list[Axes]"]]:
    """A figure with one panel per window, to be drawn within the context, where the house style holds."""
    if not windows:
        raise ValueError("windows={} must hold at least one sparsity: there is nothing to draw.")
    # Not narrower than the legend.
    with canvas(max(width * len(windows) + 1.0, 5.6), height, layout) as figure:
        axes = figure.subplots(1, len(windows), sharex=share, sharey=share, squeeze=False)
        yield figure, list(axes[0])


def _in_order(windows: Mapping[SearchKey, MaskWindow]) -> list[tuple[SearchKey, MaskWindow]]:
    """By ascending sparsity, or along the time axis."""
    return sorted(windows.items(), key=lambda item: item[0].start if isinstance(item[0], TimestepRegion) else item[0])


def _title(key: SearchKey, more: str = "") -> str:
    """What a panel shows; a region takes a line of its own, or titles of neighbours would run into each other."""
    return (
        f"{describe(key)}\n{more.lstrip(': ')}".strip() if isinstance(key, TimestepRegion) else f"{describe(key)}{more}"
    )
