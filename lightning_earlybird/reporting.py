"""What a run shows of itself: metrics, figures and tables, for the loggers of a Trainer and for files.

Matplotlib and wandb are imported only where they are used, and figures are drawn without pyplot, so that neither a
notebook's backend nor its open figures are touched.
"""

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.imports import RequirementCache

from lightning_earlybird.convergence import MaskWindow
from lightning_earlybird.durable import file_written_aside
from lightning_earlybird.records import TicketFacts
from lightning_earlybird.regions import TimestepRegion
from lightning_earlybird.search import SearchKey, describe
from lightning_earlybird.text import aligned

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MATPLOTLIB_AVAILABLE = RequirementCache("matplotlib>=3.8")

Cell: TypeAlias = str | int | float | bool | None

TICKET_COLUMNS = (
    "region",
    "sparsity",
    "target",
    "channels_removed",
    "parameters_removed",
    "macs_removed",
    "parameters",
    "macs",
    "step",
    "found",
)

# Okabe and Ito's palette, which stays apart under the common kinds of colour blindness; line styles differ as well.
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#595959"
_THICK: dict[str, Any] = {"color": _BLUE, "lw": 2.2, "marker": "o", "ms": 3, "zorder": 4}
_THIN: dict[str, Any] = {"lw": 1.1, "ls": "--"}


def logger_step(trainer: Trainer) -> int:
    """The step under which Lightning logs its own metrics at this moment.

    W&B draws everything over ``trainer/global_step`` and wants it to ascend, so what a callback logs must carry the
    same number as what ``self.log`` gives right after it. That number counts batches that stepped, from zero, whatever
    the number of optimizers; ``trainer.global_step`` would be ahead of it by at least one.

    Args:
        trainer: A Trainer inside ``fit``.

    Returns:
        The step, at least 0.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress.current
    # The counter moves on after on_train_batch_end; between batches, epoch ends included, it is one ahead of the last.
    within_batch = progress.ready > progress.completed
    return max(0, loop._batches_that_stepped - (0 if within_batch else 1))


# Loggers that have failed and been told of; by identity, as a logger may define equality and not be hashable.
_FAILED: "weakref.WeakValueDictionary[int, Logger]" = weakref.WeakValueDictionary()


@contextmanager
def tolerated(logger: Logger) -> Iterator[None]:
    """Go on where a logger fails, with one warning: a service that is gone is no reason to end days of training."""
    try:
        yield
    except Exception as error:  # loggers talk to any service, and fail in any way
        if _FAILED.get(id(logger)) is not logger:
            _FAILED[id(logger)] = logger
            rank_zero_warn(
                f"{type(logger).__name__} failed to log what the early-bird callbacks gave it "
                f"({type(error).__name__}: {error}). Training goes on, and it is not told again; what is missing there "
                "is in the callbacks and in the checkpoints."
            )


def log_metrics(trainer: Trainer, metrics: Mapping[str, float | None], step: int | None = None) -> None:
    """Gives metrics to every logger of the Trainer.

    A logger that fails is warned about once and does not end the training; so it is with figures and tables.

    Args:
        trainer: The Trainer; without loggers nothing happens.
        metrics: Name -> value; ``None`` stands for "not measured yet" and is left out.
        step: The step to log under; ``None`` takes that of Lightning's own metrics, :func:`logger_step`.
    """
    known = {name: float(value) for name, value in metrics.items() if value is not None}
    if not known:
        return
    for logger in trainer.loggers:
        with tolerated(logger):
            logger.log_metrics(known, step=logger_step(trainer) if step is None else step)
            logger.save()


def log_figure(
    trainer: Trainer,
    name: str,
    figure: "Figure",
    *,
    step: int | None = None,
    folder: str | PathLike[str] | None = None,
) -> None:
    """Gives a figure to W&B and TensorBoard as an image, and writes it to a PNG file when there is a folder.

    Does nothing on ranks other than the first.

    Args:
        trainer: The Trainer; its loggers of other kinds are passed over.
        name: Key of the image, for example ``"earlybird/mask_distance"``; the last part names the file.
        figure: The figure; it is left open and unchanged.
        step: As in :func:`log_metrics`.
        folder: Where the PNG file goes; made when missing. A file that cannot be written is warned about.
    """
    if not trainer.is_global_zero:
        return
    if folder is not None:
        path = Path(folder) / f"{name.rpartition('/')[2]}.png"
        try:
            save_figure(figure, path)
        except OSError as error:
            rank_zero_warn(f"The figure {str(path)!r} could not be written ({error}). Training goes on without it.")
    step = logger_step(trainer) if step is None else step
    for logger in trainer.loggers:
        with tolerated(logger):
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [_pixels(figure)], step=step)
            elif isinstance(logger, TensorBoardLogger):
                # Not add_figure: that imports pyplot.
                logger.experiment.add_image(name, _pixels(figure), step, dataformats="HWC")


def log_ticket_table(trainer: Trainer, name: str, facts: Sequence[TicketFacts], *, step: int | None = None) -> None:
    """Gives the ticket table to W&B as a table and to TensorBoard as text.

    Does nothing on ranks other than the first.

    Args:
        trainer: The Trainer; its loggers of other kinds are passed over.
        name: Key of the table, for example ``"earlybird/tickets"``.
        facts: One entry per ticket, in region order.
        step: As in :func:`log_metrics`.
    """
    if not trainer.is_global_zero:
        return
    step = logger_step(trainer) if step is None else step
    for logger in trainer.loggers:
        with tolerated(logger):
            if isinstance(logger, WandbLogger):
                logger.log_table(name, columns=list(TICKET_COLUMNS), data=ticket_rows(facts), step=step)
            elif isinstance(logger, TensorBoardLogger):
                # Four spaces make a fixed-width block in TensorBoard's Markdown.
                block = "\n".join(f"    {line}" for line in ticket_table(facts).splitlines())
                logger.experiment.add_text(name, block, step)


def save_figure(figure: "Figure", path: str | PathLike[str]) -> None:
    """Writes a figure to a PNG file, which appears whole or not at all.

    Args:
        figure: The figure.
        path: The file; missing folders are made, an existing file is replaced.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with file_written_aside(Path(path)) as file:
        figure.savefig(file, format="png", facecolor="white")


def ticket_rows(facts: Sequence[TicketFacts]) -> list[list[Cell]]:
    """The ticket table as rows under :data:`TICKET_COLUMNS`, for ``wandb.Table`` or a data frame.

    Args:
        facts: One entry per ticket, in region order.

    Returns:
        One row per ticket; what was removed is a fraction in ``[0, 1]``; ``None`` where it was not measured.
    """
    rows: list[list[Cell]] = []
    for fact in facts:
        row: list[Cell] = [_interval(fact.region.start, fact.region.stop), fact.region.sparsity, fact.target]
        row += [fact.achieved_channels, fact.achieved_parameters, fact.achieved_macs]
        row += [fact.parameters[1], None if fact.macs is None else fact.macs[1]]
        row += [fact.step, _origin(fact)]
        rows.append(row)
    return rows


def ticket_metrics(facts: Sequence[TicketFacts]) -> dict[str, float | None]:
    """The ticket table as numbers for loggers that know no tables: nominal sparsity, and what was removed of each kind.

    Args:
        facts: One entry per ticket, in region order.

    Returns:
        ``ticket_N/...`` -> a fraction in ``[0, 1]``; ``None`` where it was not measured.
    """
    metrics: dict[str, float | None] = {}
    for index, fact in enumerate(facts):
        metrics[f"ticket_{index}/sparsity"] = fact.region.sparsity
        metrics[f"ticket_{index}/channels_removed"] = fact.achieved_channels
        metrics[f"ticket_{index}/parameters_removed"] = fact.achieved_parameters
        metrics[f"ticket_{index}/macs_removed"] = fact.achieved_macs
    return metrics


def ticket_table(facts: Sequence[TicketFacts]) -> str:
    """The ticket table as fixed-width text.

    Nominal sparsity stands beside what was achieved: rounding to multiples and channels that cannot be pruned move the
    one, and parameters and MACs fall roughly with the square of the other.

    Args:
        facts: One entry per ticket, in region order.

    Returns:
        Lines without a trailing newline; numbers are aligned to the right.
    """
    head = ["region", "sparsity", "channels", "parameters", "MACs", "step", "found"]
    body = [
        [
            _interval(fact.region.start, fact.region.stop),
            f"{fact.region.sparsity:g}" + ("" if fact.target == "channels" else f" of {fact.target}"),
            *(_removed(counts) for counts in (fact.channels, fact.parameters, fact.macs)),
            "-" if fact.step is None else str(fact.step),
            _origin(fact),
        ]
        for fact in facts
    ]
    return aligned(head, body, left={0, len(head) - 1})


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
                ([check.from_start for check in checks], "to initialisation", _THIN | {"color": _ORANGE, "ls": "-."}),
                ([check.from_half for check in checks], "to half the training so far", _THIN | {"color": _GREEN}),
            ):
                points = [(check.step, value) for check, value in zip(checks, values, strict=True) if value is not None]
                axis.plot([step for step, _ in points], [value for _, value in points], label=label, **style)
            axis.axhline(threshold, color=_RED, linewidth=1.3, label=f"threshold {threshold:g}")
            null = masks.null_distance
            if null is not None:
                axis.axhline(null, color=_GREY, linestyle=":", linewidth=1.6, label="two random masks")
            emerged = next((check for check in checks if check.converged), None)
            if emerged is not None and emerged.distance is not None:
                axis.plot([emerged.step], [emerged.distance], "*", color=_RED, markersize=13, zorder=5, label="emerged")
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
    if not MATPLOTLIB_AVAILABLE:
        raise ModuleNotFoundError(f"Figures need matplotlib: pip install matplotlib. {MATPLOTLIB_AVAILABLE}")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9.0, "axes.titlesize": 10.0, "legend.fontsize": 8.5}):
        # Not narrower than the legend.
        figure = Figure(figsize=(max(width * len(windows) + 1.0, 5.6), height), dpi=150, layout=layout)
        FigureCanvasAgg(figure)
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


def _pixels(figure: "Figure") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # A figure made elsewhere may sit on another canvas, which drawing on a new one would replace.
    own = figure.canvas
    canvas: Any = own if isinstance(own, FigureCanvasAgg) else FigureCanvasAgg(figure)
    canvas.draw()
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    figure.set_canvas(own)
    return pixels


def _interval(start: float, stop: float) -> str:
    opening = "(" if math.isinf(start) else "["
    return f"{opening}{start:g}, {stop:g})"


def _removed(counts: tuple[int, int] | None) -> str:
    if counts is None:
        return "-"
    dense, kept = counts
    return f"-{(dense - kept) / dense:.1%}"


def _origin(fact: TicketFacts) -> str:
    return "emerged" if fact.emerged else "search limit"
