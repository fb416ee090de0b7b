"""How many devices pay off, given measured step times and budgets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_earlybird.parallel.plan import TicketLoad, TicketPlan, check_count, plan_tickets
from lightning_earlybird.text import aligned, duration


@dataclass(frozen=True)
class DeviceTable:
    """Plans for one device, two devices, and so on, and which of these numbers pay off.

    Args:
        plans: The plan for 1, 2, ... devices.
        least_gain: Fraction by which the critical path must be shorter than with the next smaller number that pays off.
    """

    plans: tuple[TicketPlan, ...]
    least_gain: float

    @property
    def paying_off(self) -> tuple[int, ...]:
        """The numbers of devices that pay off, ascending: 1, and each with a path shorter by ``least_gain``."""
        numbers, best = [1], self._paths[0]
        for devices, path in enumerate(self._paths, start=1):
            if path < best and path <= (1 - self.least_gain) * best:
                numbers.append(devices)
                best = path
        return tuple(numbers)

    @property
    def devices(self) -> int:
        """The largest number of devices that pays off."""
        return self.paying_off[-1]

    @property
    def _paths(self) -> list[float]:
        # Never None: `devices_that_pay_off` refuses tickets without a budget.
        return [plan.critical_path_s or 0.0 for plan in self.plans]

    def table(self) -> str:
        """The plans as fixed-width text.

        Returns:
            Lines without a trailing newline: one per number of devices, and one that names the largest that pays off.
        """
        head = ["devices", "critical path", "speed-up", "busy", "device time", "pays off"]
        body = [
            [
                str(devices),
                duration(plan.critical_path_s or 0.0),
                f"{plan.speedup:.2f}",
                f"{plan.efficiency:.0%}",
                duration(plan.total_s or 0.0),
                "yes" if devices in self.paying_off else "no",
            ]
            for devices, plan in enumerate(self.plans, start=1)
        ]
        s = "" if self.devices == 1 else "s"
        last = f"{self.devices} device{s} pay{'s' if not s else ''} off: "
        if self.devices == len(self.plans):
            last += "more were not asked for"
        else:
            last += f"up to {len(self.plans)}, no more make the critical path {self.least_gain:.0%} shorter"
        return "\n".join([aligned(head, body, left=()), last])

    def to_json(self) -> dict[str, Any]:
        """Plain containers that JSON can carry."""
        return {
            "least_gain": self.least_gain,
            "devices": self.devices,
            "paying_off": list(self.paying_off),
            "plans": [plan.to_json() for plan in self.plans],
        }


def devices_that_pay_off(loads: Sequence[TicketLoad], max_devices: int, *, least_gain: float = 0.1) -> DeviceTable:
    """Plans the training of tickets for every number of devices, and says which of them pay off.

    Once every ticket has a device of its own, a further one shortens the critical path only by joining the slowest
    ticket's group, and only where that ticket's steps can be divided.

    Args:
        loads: What each ticket costs, in ticket order; all with a budget of steps.
        max_devices: The largest number of devices to plan for.
        least_gain: Fraction by which a number of devices must shorten the critical path against the next smaller one
            that pays off, in (0, 1).

    Returns:
        The plans, and the numbers of devices that pay off.

    Raises:
        ValueError: If ``max_devices`` is no positive integer, ``least_gain`` lies outside (0, 1), there are no loads,
            or one has no budget.
    """
    check_count("max_devices", max_devices)
    if isinstance(least_gain, bool) or not isinstance(least_gain, int | float) or not 0 < least_gain < 1:
        raise ValueError(
            f"least_gain={least_gain!r} must lie in (0, 1): it is the fraction by which the critical path must become "
            "shorter for more devices to pay off."
        )
    loads = tuple(loads)
    for ticket, load in enumerate(loads):
        if load.steps is None:
            raise ValueError(
                f"loads[{ticket}].steps=None must be a number of steps: training that only time ends takes as long on "
                "any number of devices. Give the budget that you would otherwise set."
            )
    plans = tuple(plan_tickets(loads, world_size) for world_size in range(1, max_devices + 1))
    return DeviceTable(plans, float(least_gain))
