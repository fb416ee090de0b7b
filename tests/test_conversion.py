import pytest
from models import traced

from lightning_earlybird.conversion import FoundDenoiser


def test_nothing_is_converted_by_a_plan_that_has_not_been_verified() -> None:
    _, plan = traced("hand-written")

    with pytest.raises(ValueError, match="plan has not been verified; use what verify_plan returns"):
        FoundDenoiser(None, plan, 0)
