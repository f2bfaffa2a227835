"""What jobs print: numbers as a terminal shows them, and pipes whose reader has gone."""

import os
import subprocess
import sys

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


PIPED = """
import sys
from pipeline.terminal import escape_output
escape_output()
for number in range({lines}):
    print("x" * 1000, flush={flush})
{end}
"""


@pytest.mark.parametrize(
    ("lines", "flush", "end", "code"),
    [
        (1, True, "", 141),
        (1000, False, "", 141),
        (1, False, "sys.stdout.flush()", 141),
        (1, False, "", 0),  # what Python would flush as it ends
        (1, False, "sys.exit(3)", 3),
        (0, False, "", 0),
    ],
)
def test_a_reader_that_has_gone_ends_a_process_without_a_traceback(lines, flush, end, code):
    command = [sys.executable, "-c", PIPED.format(lines=lines, flush=flush, end=end)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == code
