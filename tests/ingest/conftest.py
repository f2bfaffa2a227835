"""Fixtures of the ingest tests."""

from collections.abc import Iterator

import pytest
from ingest_runs import SMALL_SIZES, content_of, no_beam, run


@pytest.fixture(scope="module")
def steps_alone() -> Iterator[None]:
    """Jobs run their steps one after the other, without Beam."""
    with no_beam():
        yield


@pytest.fixture(scope="module")
def in_a_loop(small_log, small_content, tmp_path_factory) -> dict[str, bytes]:
    """The bytes of a dataset of several units, buckets and shards, made without Beam and other processes."""
    out = tmp_path_factory.mktemp("in_a_loop") / "out"
    with no_beam():
        run(small_log, out, small_content(), **SMALL_SIZES)
    return content_of(out)
