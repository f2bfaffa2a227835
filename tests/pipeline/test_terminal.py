"""Numbers as a terminal shows them."""

import pytest

from pipeline.terminal import short_decimal


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8123, ".8123"),
        (10.6, "10.6000"),
        (-0.04, "-.0400"),
        (-10.06, "-10.0600"),
        (0.0, ".0000"),
        (0.99999, "1.0000"),
    ],
)
def test_only_a_leading_zero_is_dropped(value: float, text: str) -> None:
    assert short_decimal(value) == text
    assert float(text) == pytest.approx(value, abs=5e-5)


def test_decimals_are_as_many_as_asked_for() -> None:
    assert [short_decimal(0.05, digits) for digits in (1, 3)] == [".1", ".050"]
