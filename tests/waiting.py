"""Waiting for what other processes and threads do."""

import time
from collections.abc import Callable
from typing import Any

import pytest


def wait_for(holds: Callable[[], Any], what: str = "the condition", seconds: float = 60) -> Any:
    """The first true value of `holds`; fails the test where it has none in time."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.05)
    return value
