"""Timestep regions: which ticket serves which part of the time axis (EB-Diff-Train, arXiv 2504.09606)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_earlybird.draws import check_number, rounded
from lightning_earlybird.draws import draw_uniform as draw_uniform
from lightning_earlybird.draws import draw_within as draw_within


@dataclass(frozen=True)
class TimestepRegion:
    """A half-open stretch ``[start, stop)`` of the time axis and the sparsity of the ticket that serves it.

    Args:
        start: First timestep inside the region, in the module's own time unit (integers for DDPM, floats for flows and
            sigmas). May be ``-inf``.
        stop: First timestep after the region, same unit. May be ``inf``.
        sparsity: Fraction of channels removed, in ``[0, 1)``.
        max_steps: Optimizer steps that the region's ticket may train for; ``None`` sets no limit of its own.

    Raises:
        ValueError: If a bound is NaN or no number, ``start >= stop``, ``sparsity`` is outside ``[0, 1)``, or
            ``max_steps`` is not a positive integer.
    """

    start: int | float
    stop: int | float
    sparsity: float
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("start", "stop", "sparsity"):
            check_number(name, getattr(self, name))
        if not self.start < self.stop:
            raise ValueError(
                f"TimestepRegion(start={self.start!r}, stop={self.stop!r}) is empty: start must be below stop, "
                "because a region is the half-open interval [start, stop). Swap or widen the bounds."
            )
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"TimestepRegion(sparsity={self.sparsity!r}) must lie in [0, 1): it is the fraction of channels "
                "removed. Use 0 to keep the network whole."
            )
        steps = self.max_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(
                f"TimestepRegion(max_steps={steps!r}) must be an integer of at least 1, or None for no limit."
            )


RegionLike: TypeAlias = Sequence[int | float | None] | Mapping[str, Any] | TimestepRegion
"""A region, a triple ``(start, stop, sparsity)`` with an optional fourth ``max_steps``, or a mapping of those names."""


@dataclass(frozen=True)
class TimestepPartition:
    """Regions that cover one stretch of the time axis without gap or overlap, in ascending order.

    Args:
        regions: The regions, ascending; each starts exactly where the one before it stops.
        overlap: How far each region's *training* reaches past its upper end into the following region, in the module's
            own time unit. Inference never overlaps.

    Raises:
        ValueError: If there are no regions, they are unsorted, leave a gap or overlap, or if ``overlap`` is negative,
            infinite, or wider than a following region.
    """

    regions: tuple[TimestepRegion, ...]
    overlap: float = 0

    def __post_init__(self) -> None:
        if not self.regions:
            raise ValueError("regions=() must hold at least one region. Give TimestepRegion(start, stop, sparsity).")
        for index in range(1, len(self.regions)):
            _check_neighbours(self.regions[index - 1], self.regions[index], index)
        check_number("overlap", self.overlap)
        if not 0 <= self.overlap < math.inf:
            raise ValueError(
                f"overlap={self.overlap!r} must be at least 0 and finite; it is a length on the time axis."
            )
        for index, region in enumerate(self.regions[1:], start=1):
            if self.overlap > region.stop - region.start:
                raise ValueError(
                    f"overlap={self.overlap!r} must not exceed {region.stop - region.start!r}, the width of the "
                    f"following regions[{index}] = {_interval(region)}, or three tickets share timesteps. Reduce it."
                )

    @classmethod
    def of(cls, regions: Sequence[RegionLike], overlap: float = 0) -> "TimestepPartition":
        """Builds a partition from what a user or a configuration file holds.

        Args:
            regions: Regions, triples ``(start, stop, sparsity)`` with an optional ``max_steps``, or mappings with those
                names; lists and mappings of OmegaConf serve as well.
            overlap: See the class.

        Returns:
            The validated partition.

        Raises:
            ValueError: If an entry is not a region, or the regions do not partition an axis.
        """
        if isinstance(regions, (str, bytes, Mapping)) or not isinstance(regions, Sequence):
            raise ValueError(
                f"regions={regions!r} must be a list of regions, each a TimestepRegion, a triple "
                "(start, stop, sparsity) or a mapping with those names."
            )
        return cls(tuple(_parse_region(region, index) for index, region in enumerate(regions)), overlap)

    @classmethod
    def whole(cls, sparsity: float) -> "TimestepPartition":
        """One region over the whole time axis: the traditional early-bird ticket.

        Args:
            sparsity: Fraction of channels removed, in ``[0, 1)``.

        Returns:
            A partition of the single region ``[-inf, inf)``.
        """
        return cls((TimestepRegion(-math.inf, math.inf, sparsity),))

    @property
    def start(self) -> float:
        """Lower end of the covered axis (inside)."""
        return self.regions[0].start

    @property
    def stop(self) -> float:
        """Upper end of the covered axis (outside, but see :meth:`lookup` for continuous time)."""
        return self.regions[-1].stop

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The distinct sparsities of the regions, ascending."""
        return tuple(sorted({region.sparsity for region in self.regions}))

    def __len__(self) -> int:
        return len(self.regions)

    def __iter__(self) -> Iterator[TimestepRegion]:
        return iter(self.regions)

    def lookup(self, timesteps: Tensor, *, check: bool = True) -> Tensor:
        """Finds each timestep's own region, as inference needs it.

        A *floating* timestep exactly at the last ``stop`` belongs to the last region, because samplers in continuous
        time start there. Bounds are rounded to the dtype of floating timesteps before they are compared.

        Args:
            timesteps: Timesteps, any shape, integer or floating, in the time unit of the regions.
            check: Whether to refuse timesteps outside ``[start, stop)``, which costs one host synchronisation. Without
                it none is needed, and such timesteps get -1: see :meth:`check_inside`.

        Returns:
            Region indices, long, of the same shape and on the same device.

        Raises:
            ValueError: If ``check`` and a timestep lies outside ``[start, stop)`` or is NaN.
        """
        start, *bounds, stop = (rounded(bound, timesteps.dtype) for bound in self._bounds())
        values = timesteps if timesteps.is_floating_point() else timesteps.long()
        indices = torch.zeros_like(values, dtype=torch.long)
        for bound in bounds:
            indices += values >= bound
        below_stop = values <= stop if values.is_floating_point() else values < stop
        # Written as a conjunction of what must hold, so that NaN, which compares false with everything, is outside too.
        indices = torch.where((values >= start) & below_stop, indices, -1)
        if check:
            self.check_inside(timesteps, indices)
        return indices

    def assign(self, timesteps: Tensor, generator: torch.Generator | None = None, *, check: bool = True) -> Tensor:
        """Chooses the region that trains on each timestep: its own, or inside an overlap either neighbour at random.

        Args:
            timesteps: As for :meth:`lookup`.
            generator: Source of the fair coin inside overlaps; drawn on the generator's own device.
            check: As for :meth:`lookup`.

        Returns:
            Region indices, long, of the same shape and on the same device.

        Raises:
            ValueError: If ``check`` and a timestep lies outside ``[start, stop)`` or is NaN.
        """
        indices = self.lookup(timesteps, check=check)
        if self.overlap == 0 or len(self.regions) == 1:
            return indices
        values = timesteps if timesteps.is_floating_point() else timesteps.long()
        device = timesteps.device if generator is None else generator.device
        # One coin per timestep whether or not it is needed: the random stream then depends on the shape alone.
        heads = torch.rand(timesteps.shape, generator=generator, device=device).to(timesteps.device) < 0.5
        # `indices` is not updated in the loop, so that a timestep moves down by one region at most.
        moved = torch.zeros_like(heads)
        for index in range(1, len(self.regions)):
            upper = rounded(self.training_bounds(index - 1)[1], timesteps.dtype)
            moved |= heads & (indices == index) & (values < upper)
        return indices - moved.long()

    def blend(self, timesteps: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
        """How two neighbours share each timestep where outputs are blended instead of switched.

        Inside the overlap above a boundary b, with t in [b, b + overlap), the output is that of both tickets::

            (1 - w) * lower(t) + w * upper(t),    w = (t - b) / overlap

        which is the lower ticket's alone at b and the upper one's from b + overlap on, so that nothing jumps. Both have
        been trained there. Elsewhere w is 1.

        Differs from the paper, which switches at b.

        Args:
            timesteps: As for :meth:`lookup`.
            check: As for :meth:`lookup`.

        Returns:
            Index of each timestep's own region, the upper ticket's, long, and the weight w, double, both of the same
            shape and on the same device. The rest belongs to the region below.

        Raises:
            ValueError: If ``check`` and a timestep lies outside ``[start, stop)`` or is NaN.
        """
        indices = self.lookup(timesteps, check=check)
        weights = torch.ones_like(indices, dtype=torch.float64)
        if self.overlap > 0:
            for index, region in enumerate(self.regions[1:], start=1):
                share = ((timesteps.double() - region.start) / self.overlap).clamp(0, 1)
                weights = torch.where(indices == index, share, weights)
        return indices, weights

    def check_inside(self, timesteps: Tensor, indices: Tensor) -> None:
        """Refuses timesteps that no region serves; costs one host synchronisation.

        Args:
            timesteps: Timesteps, any shape.
            indices: What ``lookup(timesteps, check=False)`` gave for them, -1 where a timestep lies outside.

        Raises:
            ValueError: If an index is -1; the message quotes the first such timestep.
        """
        if timesteps.numel() == 0 or not bool((indices < 0).any()):
            return
        first = timesteps.flatten()[int((indices.flatten() < 0).nonzero()[0])].item()
        raise ValueError(
            f"timesteps hold {first!r}, outside the time axis [{self.start!r}, {self.stop!r}) that the regions cover. "
            "Check the time unit of the regions, or extend the first or last one."
        )

    def training_bounds(self, index: int) -> tuple[float, float]:
        """The interval that a region's ticket trains on: its own, and the overlap above it.

        Args:
            index: Index of the region.

        Returns:
            ``(start, stop + overlap)``, the stop clipped to the end of the axis; half-open.

        Raises:
            IndexError: If there is no such region.
        """
        region = self.regions[index]
        return region.start, min(region.stop + self.overlap, self.stop)

    def to_json(self) -> dict[str, Any]:
        """Describes the partition in plain containers that JSON can carry.

        Returns:
            ``{"regions": [{"start", "stop", "sparsity", "max_steps"}, ...], "overlap"}``, infinite bounds as ``None``.
        """
        regions = [asdict(region) for region in self.regions]
        for region in regions:
            for name in ("start", "stop"):
                if math.isinf(region[name]):
                    region[name] = None
        return {"regions": regions, "overlap": self.overlap}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TimestepPartition":
        """Inverse of :meth:`to_json`.

        Args:
            data: What :meth:`to_json` gave.

        Returns:
            The partition.

        Raises:
            ValueError: If a field is missing, unknown, or breaks a rule of the regions.
        """
        if not isinstance(data, Mapping) or set(data) != {"regions", "overlap"}:
            raise ValueError(f"A partition needs exactly the fields 'regions' and 'overlap', not {_described(data)}.")
        regions = data["regions"]
        if not isinstance(regions, list) or not all(isinstance(region, Mapping) for region in regions):
            raise ValueError(f"regions={regions!r} must be a list of objects, one per region.")
        unbounded = {"start": -math.inf, "stop": math.inf}
        return cls.of(
            [
                {name: unbounded.get(name) if value is None else value for name, value in region.items()}
                for region in regions
            ],
            data["overlap"],
        )

    def _bounds(self) -> list[float]:
        return [self.start, *(region.stop for region in self.regions)]


def _parse_region(region: RegionLike, index: int) -> TimestepRegion:
    if isinstance(region, TimestepRegion):
        return region
    names = [field.name for field in fields(TimestepRegion)]
    if isinstance(region, Mapping):
        given = dict(region)
        if set(given) == {"class_path", "init_args"} and isinstance(given["init_args"], Mapping):
            given = dict(given["init_args"])  # as LightningCLI writes objects
    elif isinstance(region, Sequence) and not isinstance(region, (str, bytes)) and len(region) <= len(names):
        given = dict(zip(names, region, strict=False))
    else:
        given = {}
    if not set(names[:3]) <= set(given) <= set(names):
        raise ValueError(
            f"regions[{index}] = {region!r} must be a TimestepRegion, a triple (start, stop, sparsity) with an "
            f"optional max_steps, or a mapping with the names {', '.join(names)}."
        )
    try:
        return TimestepRegion(**given)
    except ValueError as error:
        raise ValueError(f"regions[{index}]: {error}") from error


def _check_neighbours(lower: TimestepRegion, upper: TimestepRegion, index: int) -> None:
    if upper.start == lower.stop:
        return
    pair = f"regions[{index - 1}] = {_interval(lower)} and regions[{index}] = {_interval(upper)}"
    if upper.start < lower.start:
        raise ValueError(f"{pair} are not sorted: list the regions by ascending start.")
    if upper.start < lower.stop:
        raise ValueError(
            f"{pair} overlap: each timestep must belong to one region. Set start={lower.stop!r} on the second; "
            "the argument overlap= lets neighbours share timesteps in training."
        )
    raise ValueError(f"{pair} leave a gap: set start={lower.stop!r} on the second, or add a region between them.")


def _interval(region: TimestepRegion) -> str:
    return f"[{region.start!r}, {region.stop!r})"


def _described(data: Any) -> str:
    return ", ".join(map(repr, data)) or "none" if isinstance(data, Mapping) else repr(data)
