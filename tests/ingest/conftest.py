"""Fixtures of the ingest tests."""

from collections.abc import Iterator

import pytest
from ingest_runs import no_beam


@pytest.fixture(scope="module")
def steps_alone() -> Iterator[None]:
    """Jobs run their steps one after the other, without Beam."""
    with no_beam():
        yield
