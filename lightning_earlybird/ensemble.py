"""One module in place of the denoiser: each sample of a batch is sent to the ticket of its timestep's region."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_earlybird.absent import AbsentTicket
from lightning_earlybird.regions import TimestepPartition, TimestepRegion

if TYPE_CHECKING:
    from lightning_earlybird.tickets import EnsembleRecord

_MISSING = object()


@dataclasses.dataclass(frozen=True)
class TimestepArgument:
    """Where a denoiser's ``forward`` takes its timesteps.

    Args:
        name: Keyword under which the timesteps may come, or None.
        position: Index among the positional arguments at which they may come, or None. The keyword goes first.
        trailing: Dimensions of size 1 after the batch that they come with: 0 for (B,), 3 for (B, 1, 1, 1).

    Raises:
        ValueError: If both are None, the position is negative, or there are more dimensions than tensors have.
    """

    name: str | None
    position: int | None
    trailing: int = 0

    def __post_init__(self) -> None:
        if self.name is None and self.position is None:
            raise ValueError(
                "TimestepArgument(name=None, position=None): at least one must be given; "
                "pass the keyword (e.g. 'timestep') or the positional index (e.g. 1)."
            )
        if self.position is not None and self.position < 0:
            raise ValueError(f"TimestepArgument(position={self.position}): must be 0 or more; count from the front.")
        if not 0 <= self.trailing < 64:
            raise ValueError(
                f"TimestepArgument(trailing={self.trailing}): must be at least 0 and below 64, as tensors have at most "
                "64 dimensions; use 0 for timesteps of shape (batch_size,)."
            )

    def find(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The timesteps of a call.

        Raises:
            TypeError: If the call has them neither under the keyword nor at the position.
        """
        if self.name is not None and self.name in kwargs:
            return kwargs[self.name]
        if self.position is not None and self.position < len(args):
            return args[self.position]
        raise TypeError(
            f"the denoiser was called without timesteps: expected {self}, got {len(args)} positional arguments and "
            f"the keywords {sorted(kwargs)}; pass the timesteps as they were passed when the denoiser was found."
        )


@dataclasses.dataclass(frozen=True)
class Turn:
    """One ticket has the word: all samples are its own, whatever other tickets there are.

    Args:
        ticket: Index of the ticket.
        around: Gives a context for each call of the ticket; called with the timesteps, as they came in, and raises if
            one is not the ticket's.
    """

    ticket: int
    around: Callable[[Any], AbstractContextManager[None]]


class TicketEnsemble(nn.Module):
    """Takes the place of the denoiser: routes every sample of a batch to the ticket of its timestep's region.

    In training mode a sample whose timestep lies in an overlap goes to one of the two neighbours at random; in
    evaluation mode each goes to its own region. With one timestep for all rows, or all rows in one region, the ticket
    is called with the very arguments that came in. Otherwise each tensor argument with as many rows as there are
    timesteps (inside tuples, lists, dicts and dataclasses, too) is split, and the outputs are put back in the order of
    the rows; the arithmetic inside a ticket, and thus every gradient, is that of calling it by hand on its rows.

    Attributes that the ensemble does not have are looked up on the first ticket if they are plain values (``config``,
    ``dtype``, ``device``); never modules, parameters, tensors or methods, which would speak for one ticket only.

    Where ranks train different tickets (:class:`MultiTicketStrategy`), those of other ranks are absent: an
    :class:`AbsentTicket` keeps their place, so that names and indices are the same everywhere, and samples of their
    regions go to the nearest ticket that is there, with a warning. While a ticket has its ``turn``, every sample goes
    to that one.

    Args:
        tickets: The extracted networks, one per region, in region order. Not copied.
        partition: The regions of the time axis.
        timesteps: Where the tickets' ``forward`` takes the timesteps.

    Raises:
        ValueError: If the number of tickets is not the number of regions.
    """

    tickets: nn.ModuleList
    record: EnsembleRecord | None
    """What saving needs to know besides the weights; None where the ensemble was put together by hand."""
    turn: Turn | None
    """The ticket that all samples go to at present; None routes them by their timesteps."""

    def __init__(self, tickets: Sequence[nn.Module], partition: TimestepPartition, timesteps: TimestepArgument) -> None:
        super().__init__()
        if len(tickets) != len(partition):
            raise ValueError(
                f"tickets has {len(tickets)} networks, but the partition has {len(partition)} regions; "
                "pass one ticket per region, in region order."
            )
        self.tickets = nn.ModuleList(tickets)
        self.partition = partition
        self.timesteps = timesteps
        self.record = None
        self.turn = None
        self._warned_of_absence = False

    @property
    def hosted(self) -> tuple[int, ...]:
        """Indices of the tickets that are here; all of them, unless other ranks train the rest."""
        return tuple(i for i, ticket in enumerate(self.tickets) if not isinstance(ticket, AbsentTicket))

    @property
    def regions(self) -> tuple[TimestepRegion, ...]:
        """The regions, in the order of ``tickets``."""
        return self.partition.regions

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the tickets as the denoiser was called.

        Args:
            *args: As for the denoiser; tensors with one row per timestep are split.
            **kwargs: Likewise.

        Returns:
            What the denoiser returns: tensors with one row per timestep, in the order of the rows, or containers of
            such. Leaves that are not tensors are those of the first ticket that was called.

        Raises:
            TypeError: If the call has no timesteps, or the tickets return different structures.
            ValueError: If a timestep lies outside the regions, if there are several timesteps per row, or if an output
                that has to be put together does not have one row per timestep.
        """
        timesteps = self.timesteps.find(args, kwargs)
        if self.turn is not None:
            with self.turn.around(timesteps):
                return self._ticket(self.turn.ticket)(*args, **kwargs)
        return self._dispatch(self._route(timesteps), args, kwargs)

    def _ticket(self, number: int) -> nn.Module:
        """The ticket that is about to be called."""
        return self.tickets[number]

    def _dispatch(self, rows: Mapping[int, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls each ticket on its rows, ``{ticket: row indices}``, and puts the outputs together."""
        if len(rows) == 1:
            return self._ticket(next(iter(rows)))(*args, **kwargs)
        batch_size = sum(len(index) for index in rows.values())
        outputs = []
        for number, index in rows.items():

            def take(tensor: Tensor, index: Tensor = index) -> Tensor:
                return select_rows(tensor, index, batch_size)

            outputs.append(self._ticket(number)(*map_tensors(args, take), **map_tensors(kwargs, take)))
        sizes = [len(index) for index in rows.values()]
        # Sorting the rows by ticket is undone by the inverse permutation: one cat and one index_select per tensor.
        order = torch.argsort(torch.cat(list(rows.values())))
        return _merge(outputs, sizes, order, "output")

    def _route(self, timesteps: Any) -> dict[int, Tensor]:
        """Which rows go to which ticket: ``{ticket: row indices}`` in region order, on the CPU.

        The timesteps are brought to the host first, so that a call waits for the device once and no more.
        """
        hosted = self.hosted
        everything = {hosted[0]: torch.empty(0, dtype=torch.long)}
        if len(self.regions) == 1 and math.isinf(self.partition.start) and math.isinf(self.partition.stop):
            return everything
        steps = one_per_row(timesteps)
        if steps.numel() == 0:
            return everything
        owners = self.partition.assign(steps) if self.training else self.partition.lookup(steps)
        if len(hosted) < len(self.tickets):
            owners = self._among(hosted, owners)
        return rows_by_ticket(owners)

    def _among(self, hosted: tuple[int, ...], owners: Tensor) -> Tensor:
        """The nearest ticket that is here in place of each that is not."""
        nearest = (torch.arange(len(self.tickets))[:, None] - torch.tensor(hosted)).abs().argmin(1)
        here = torch.tensor(hosted)[nearest][owners]
        if not self._warned_of_absence and not torch.equal(here, owners):
            self._warned_of_absence = True
            warnings.warn(
                f"the tickets {sorted(set(owners.tolist()) - set(hosted))} are trained by other ranks; their samples "
                f"are given to the nearest of the tickets {list(hosted)}, which are here, and what comes out for them "
                "means nothing. Between the switch and the end of the fit, evaluate with timesteps that are drawn by "
                "`sample_timesteps` or torch.randint, and sample after the fit.",
                stacklevel=2,
            )
        return here

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names are marks that torch and diffusers set on single modules; dunders belong to protocols.
            tickets = self.__dict__.get("_modules", {}).get("tickets")
            if name.startswith("_") or tickets is None:
                raise
        first = next((ticket for ticket in tickets if not isinstance(ticket, AbsentTicket)), None)
        value = getattr(first, name, _MISSING)
        if value is _MISSING or isinstance(value, (nn.Module, Tensor)) or inspect.isroutine(value):
            raise AttributeError(
                f"'{type(self).__name__}' has no attribute '{name}': the denoiser has become {len(tickets)} tickets; "
                f"modules, tensors and methods are theirs, as in `.tickets[0].{name}`."
            )
        return value


def one_per_row(timesteps: Any) -> Tensor:
    """The timesteps of a call on the host: shape (batch_size,), or (1,) where all rows share one.

    Raises:
        TypeError: If they are neither a tensor nor a number.
        ValueError: If there are several timesteps per row.
    """
    if isinstance(timesteps, Tensor):
        steps = timesteps.detach().to("cpu")
    elif isinstance(timesteps, Real):
        # A Python float keeps all its digits, so that it compares with the regions' bounds as it was written.
        steps = torch.tensor(timesteps, dtype=torch.float64 if isinstance(timesteps, float) else None)
    else:
        raise TypeError(f"timesteps is a {type(timesteps).__name__}, expected a tensor or a number; convert it first.")
    if steps.numel() > 1 and steps.numel() != steps.shape[0]:
        raise ValueError(
            f"timesteps has shape {tuple(steps.shape)}, expected one timestep per row, shape (batch_size,) or "
            "(batch_size, 1, ...), or a scalar; a ticket is chosen for whole rows only."
        )
    return steps.reshape(-1)


def rows_by_ticket(owners: Tensor) -> dict[int, Tensor]:
    """``{ticket: its row indices}`` in region order, of the tickets' indices by row, which are on the CPU."""
    return {number: torch.nonzero(owners == number).flatten() for number in sorted(set(owners.tolist()))}


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested tuples, lists, dicts and dataclasses with ``function`` applied to every tensor in them."""
    return rebuild(
        [value], lambda leaves, path: function(leaves[0]) if isinstance(leaves[0], Tensor) else leaves[0], ""
    )


def select_rows(tensor: Tensor, index: Tensor, batch_size: int) -> Tensor:
    """The given rows of a tensor with one row per sample; any other tensor is returned as it is.

    Args:
        tensor: Shape (batch_size, ...) to be split; every other shape is shared by all rows.
        index: Row indices, shape (rows,), on any device.
        batch_size: Number of samples in the batch.
    """
    if tensor.dim() == 0 or tensor.shape[0] != batch_size:
        return tensor
    return tensor.index_select(0, index.to(tensor.device, non_blocking=True))


def _merge(outputs: list[Any], sizes: list[int], order: Tensor, path: str) -> Any:
    """Puts the tickets' outputs together; ``order[row]`` is where that row stands among the concatenated rows."""

    def leaf(leaves: list[Any], path: str) -> Any:
        if not isinstance(leaves[0], Tensor):
            return leaves[0]
        for tensor, size in zip(leaves, sizes, strict=True):
            if tensor.dim() == 0 or tensor.shape[0] != size:
                raise ValueError(
                    f"{path} has shape {tuple(tensor.shape)} for {size} rows: tickets called on parts of a batch must "
                    "return one row per sample; compute losses and other reductions outside of the denoiser."
                )
        return torch.cat(leaves).index_select(0, order.to(leaves[0].device, non_blocking=True))

    return rebuild(outputs, leaf, path)


def rebuild(values: list[Any], leaf: Callable[[list[Any], str], Any], path: str) -> Any:
    """Walks equal structures side by side and builds one of the same kind from what ``leaf`` makes of their leaves."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        kinds = sorted({type(value).__name__ for value in values})
        raise TypeError(f"{path}: the tickets return different types, {kinds}; they must agree to be put together.")

    # Dataclasses come first: diffusers' outputs are dicts, too, but must be built through their fields.
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first) if field.init]
        parts = {name: rebuild([getattr(v, name) for v in values], leaf, f"{path}.{name}") for name in names}
        return dataclasses.replace(first, **parts)
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            keys = [sorted(map(str, value)) for value in values]
            raise TypeError(f"{path}: the tickets return different keys, {keys}; they must agree to be put together.")
        items = {key: rebuild([value[key] for value in values], leaf, f"{path}[{key!r}]") for key in first}
        return items if type(first) is dict else type(first)(items)
    if isinstance(first, (tuple, list)):
        if any(len(value) != len(first) for value in values):
            sizes = [len(value) for value in values]
            raise TypeError(
                f"{path}: the tickets return different lengths, {sizes}; they must agree to be put together."
            )
        members = [rebuild([v[i] for v in values], leaf, f"{path}[{i}]") for i in range(len(first))]
        if hasattr(first, "_fields"):
            return type(first)(*members)
        return members if type(first) is list else type(first)(members)
    return leaf(values, path)
