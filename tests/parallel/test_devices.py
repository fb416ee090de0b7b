"""How many devices pay off; and the document that says so."""

import contextlib
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_earlybird.parallel.devices import devices_that_pay_off
from lightning_earlybird.parallel.plan import TicketLoad, plan_tickets

DOCUMENT = Path(__file__).parents[2] / "docs" / "parallel.md"

LOADS = [TicketLoad(1, 60, divisible=True), TicketLoad(1, 30, divisible=True), TicketLoad(1, 30, divisible=True)]


def test_every_number_of_devices_has_its_plan() -> None:
    table = devices_that_pay_off(LOADS, 6)
    assert table.plans == tuple(plan_tickets(LOADS, devices) for devices in range(1, 7))
    assert [plan.critical_path_s for plan in table.plans] == [120, 60, 60, 30, 30, 30]


def test_the_largest_number_that_still_shortens_the_critical_path_is_named() -> None:
    table = devices_that_pay_off(LOADS, 6)
    assert table.paying_off == (1, 2, 4)
    assert table.devices == 4
    assert table.table().splitlines() == [
        "devices  critical path  speed-up  busy  device time  pays off",
        "-------  -------------  --------  ----  -----------  --------",
        "      1      2 min 0 s      1.00  100%    2 min 0 s       yes",
        "      2      1 min 0 s      2.00  100%    2 min 0 s       yes",
        "      3      1 min 0 s      2.00   67%    2 min 0 s        no",
        "      4           30 s      4.00  100%    2 min 0 s       yes",
        "      5           30 s      4.00   80%    2 min 0 s        no",
        "      6           30 s      4.00   67%    2 min 0 s        no",
        "4 devices pay off: up to 6, no more make the critical path 10% shorter",
    ]


def test_small_gains_add_up_until_they_pay_off() -> None:
    # 100, 50, 34, 25, 20, 17, 15 steps: with 40% asked for, 3 and 5 devices are too close to the last that paid.
    table = devices_that_pay_off([TicketLoad(1, 100, divisible=True)], 7, least_gain=0.4)
    assert table.paying_off == (1, 2, 4, 7)
    assert (
        devices_that_pay_off([TicketLoad(1, 100, divisible=True)], 2, least_gain=0.4)
        .table()
        .endswith("2 devices pay off: more were not asked for")
    )


def test_the_gain_asked_for_is_enough() -> None:
    assert devices_that_pay_off([TicketLoad(1, 100, divisible=True)], 2, least_gain=0.5).devices == 2
    assert devices_that_pay_off([TicketLoad(1, 100, divisible=True)], 2, least_gain=0.51).devices == 1


def test_devices_beyond_the_tickets_do_not_pay_off_for_fixed_numbers_of_steps() -> None:
    loads = [TicketLoad(1, steps, divisible=False) for steps in (60, 50, 40)]
    table = devices_that_pay_off(loads, 8)
    assert table.devices == 3
    # They are busy all the same, with larger batches; only the speed-up shows that nothing is gained.
    assert table.plans[7].total_s == 3 * 60 + 3 * 50 + 2 * 40
    assert table.plans[7].speedup == table.plans[2].speedup == 2.5


def test_one_device_pays_off_for_one_fixed_ticket_and_for_nothing_to_train() -> None:
    table = devices_that_pay_off([TicketLoad(1, 60, divisible=False)], 3)
    assert table.table().splitlines()[-1] == ("1 device pays off: up to 3, no more make the critical path 10% shorter")
    assert devices_that_pay_off([TicketLoad(1, 0, divisible=True)], 3).devices == 1


def test_the_table_is_json_too() -> None:
    table = devices_that_pay_off(LOADS, 4, least_gain=0.2)
    data = json.loads(json.dumps(table.to_json(), allow_nan=False))
    assert (data["least_gain"], data["devices"], data["paying_off"]) == (0.2, 4, [1, 2, 4])
    assert data["plans"] == [plan.to_json() for plan in table.plans]


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, True, None, "0.1", float("nan")])
def test_a_gain_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"least_gain={value!r} must lie in (0, 1): it is the fraction by")):
        devices_that_pay_off(LOADS, 3, least_gain=value)


@pytest.mark.parametrize("value", [0, 2.0, True, None])
def test_a_number_of_devices_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=f"max_devices={value!r} must be an integer of at least 1"):
        devices_that_pay_off(LOADS, value)


def test_a_ticket_without_a_budget_and_no_tickets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loads\[1\].steps=None must be a number of steps: .* Give the budget"):
        devices_that_pay_off([LOADS[0], TicketLoad(1, None, divisible=True)], 3)
    with pytest.raises(ValueError, match=r"loads=\[\] must hold at least one ticket"):
        devices_that_pay_off([], 3)


def test_the_tables_in_the_document_are_what_its_snippets_print() -> None:
    blocks = re.findall(r"```(python|text)\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    printed = []
    for (kind, code), (answer, text) in itertools.pairwise(blocks):
        if kind == "python" and "print(" in code:
            assert answer == "text"
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, str(DOCUMENT), "exec"), names)
            assert out.getvalue() == text
            printed.append(text)
    assert len(printed) == 3
